"""exchange.c by itself; tests/net/test_exchange.py compares it with the exchange in Python."""

from pathlib import Path

from c_programs import assert_prints, built

from tpilite.native import exchange

_SOURCE = Path(exchange.__file__).with_name("exchange.c")


def test_below_sanitizers(tmp_path):
    options = ["-fsanitize=address,undefined", "-fno-sanitize-recover", "-g", "-O1"]
    assert_prints("right\n", built(tmp_path, _SOURCE, "exchange_main.c", "cc", *options))
