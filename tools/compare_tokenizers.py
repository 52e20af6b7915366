"""Compares the ids and texts of this project's tokenizers with those of the library `tokenizers`.

    python tools/compare_tokenizers.py [--lines 50000] [--folder DIR ...] [NAME ...]
    python tools/compare_tokenizers.py --fixtures

Development only: needs `tokenizers`. Small tokenizers are trained here in the shape of each family (all, or
those that are named); each DIR holds the tokenizer.json of a real one. Every line is hard: thirty scripts,
digits, runs of spaces, emoji, code, control characters, names of added tokens. It is encoded with and
without special tokens, and decoded. Any difference is shown and is the exit code. --fixtures writes
tests/fixtures/tokenizers.json instead: small tokenizers, hard lines, and the ids that `tokenizers` gives.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(_TESTS))

from hard_texts import hard_lines  # noqa: E402
from tokenizer_families import ADDED, FAMILIES, expected, family  # noqa: E402

from tpilite.formats.model_files import ModelFiles  # noqa: E402
from tpilite.text.load import load_tokenizer  # noqa: E402

_SHOWN = 5
_SHORT = 60  # characters of a line in the fixtures


def _loaded(content: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        return load_tokenizer(ModelFiles(Path(folder)), 10**6)


def compare(name: str, content: dict[str, Any], lines: Sequence[str]) -> int:
    """The number of lines of which ids or text differ."""
    ours = _loaded(content)
    begin, n_different = time.perf_counter(), 0
    # Of added words theirs shows the bytes for whose characters it takes them, and special tokens that are
    # matched in normalized text at all.
    unlike = {t["id"] for t in content["added_tokens"] if not t["special"] or t["normalized"]}
    for specials in (True, False):
        theirs = expected(content, specials)
        for line in lines:
            right = theirs.encode(line).ids
            found = ours.encode(line, allow_special=specials)
            wrong = found != right
            same = [i for i in right if i not in unlike]
            text, shown = ours.decode(same), theirs.decode(same, skip_special_tokens=True)
            if wrong or ("\ufffd" not in shown and text != shown):
                n_different += 1
                if n_different <= _SHOWN:
                    print(f"  {line!r}\n  {found if wrong else text!r}\n  {right if wrong else shown!r}")
    print(
        f"{name}: {2 * len(lines)} lines, {n_different} differ, {time.perf_counter() - begin:.0f} s",
        flush=True,
    )
    return n_different


def write_fixtures() -> None:
    """Writes the small tokenizers, the lines and the ids for the test suite."""
    lines = [line for line in hard_lines(200, seed=2, more=ADDED) if len(line) <= _SHORT][:40]
    lines += ["", " ", "word", "a word, words"]
    cases = []
    for name in FAMILIES:
        content = family(name, vocab_size=420, n_lines=400)
        ids = [expected(content, specials=True).encode(line).ids for line in lines]
        cases.append({"name": name, "tokenizer.json": content, "ids": ids})
    text = json.dumps({"lines": lines, "cases": cases}, ensure_ascii=False, separators=(",", ":"))
    (_TESTS / "fixtures" / "tokenizers.json").write_text(text + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, action="append", default=[])
    parser.add_argument("--fixtures", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.fixtures:
        write_fixtures()
        return 0
    n_different = 0
    for folder in options.folder:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        names = tuple(token["content"] for token in content["added_tokens"][:20])
        n_different += compare(folder.name, content, list(hard_lines(options.lines, more=names)))
    for name in options.names or (FAMILIES if not options.folder else ()):
        lines = list(hard_lines(options.lines, more=ADDED))
        n_different += compare(name, family(name), lines)
    return int(n_different > 0)


if __name__ == "__main__":
    sys.exit(main())
