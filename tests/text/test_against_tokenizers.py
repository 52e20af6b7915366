"""Any text against the library `tokenizers` itself, where it is installed."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hard_texts import hard_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import loaded

pytest.importorskip("tokenizers")

from tokenizer_families import ADDED, FAMILIES, expected, family

from tpilite.text.tokenizer import Tokenizer

_HARD = list(hard_lines(200, seed=3, more=ADDED))
_TEXTS = st.one_of(
    st.sampled_from(_HARD),
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40),
    st.lists(st.sampled_from([*ADDED, " ", "  ", "\n", "a", "é", "▁", "'s", "12", "-"]), max_size=12).map(
        "".join
    ),
)


@functools.cache
def both(name: str) -> tuple[Tokenizer, Any, Any]:
    """Ours, and theirs with and without special tokens."""
    content = family(name, vocab_size=700, n_lines=600)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        return loaded(Path(folder), 10_000), expected(content, True), expected(content, False)


@settings(deadline=None, max_examples=60)
@given(text=_TEXTS, specials=st.booleans())
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_the_same(name: str, text: str, specials: bool) -> None:
    if name in ("folded", "behaviors"):
        # Python's Unicode is newer than that by which theirs normalizes.
        text = "".join(char for char in text if char in "".join(_HARD) or char.isascii())
    ours, with_specials, without = both(name)
    theirs = with_specials if specials else without
    assert ours.encode(text, allow_special=specials) == theirs.encode(text).ids
