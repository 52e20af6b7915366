"""Addresses as users write them."""

import pytest

from tpilite.errors import ConfigError
from tpilite.net.address import format_address, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pi", ("pi", 29700)),
        ("pi.local:81", ("pi.local", 81)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("fe80::1", ("fe80::1", 29700)),
        ("[fe80::1]", ("fe80::1", 29700)),
        ("[::1]:81", ("::1", 81)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text, 29700) == expected
    assert parse_address(format_address(expected), 1) == expected


@pytest.mark.parametrize(
    "text",
    ["", ":81", "pi:", "pi:0", "pi:65536", "pi:x", "pi:٣", "pi:-1", "[::1", "[::1]:", "[::1]81", "[]:81",
     "a b", "pi:999999999"],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST, HOST:PORT or"):
        parse_address(text, 29700)
