"""Splitting: what each step does to a text, as `tokenizers` does it."""

from pathlib import Path
from typing import Any

import pytest

from tpilite.text.parts import Part
from tpilite.text.pretokenizers import PreTokenizer, from_byte_characters, to_byte_characters


def split(text: str, value: dict[str, Any], at_start: bool = True) -> list[str]:
    return PreTokenizer(Part.of(Path("tokenizer.json"), "pre_tokenizer", value)).split(text, at_start)


@pytest.mark.parametrize(
    ("behavior", "pieces"),
    [
        ("Isolated", ["the", "-", "final", "-", "-", "countdown", "-"]),
        ("Removed", ["the", "final", "countdown"]),
        ("Contiguous", ["the", "-", "final", "--", "countdown", "-"]),
        ("MergedWithPrevious", ["the-", "final-", "-", "countdown-"]),
        ("MergedWithNext", ["the", "-final", "-", "-countdown", "-"]),
    ],
)
def test_behaviors_of_a_split(behavior: str, pieces: list[str]) -> None:
    pattern = {"type": "Split", "behavior": behavior}
    for found in ({"String": "-"}, {"Regex": "-"}, {"Regex": "(-)"}):
        assert split("the-final--countdown-", {**pattern, "pattern": found, "invert": False}) == pieces
    inverted = {**pattern, "pattern": {"Regex": "[^-]+"}, "invert": True}
    if behavior in ("Contiguous", "Removed"):
        assert split("the-final--countdown-", inverted) == pieces


def test_metaspace_puts_its_sign_in_front_where_its_scheme_says() -> None:
    for scheme, at_start, pieces in (
        ("always", False, ["▁a", "▁", "▁b"]),
        ("first", True, ["▁a", "▁", "▁b"]),
        ("first", False, ["a", "▁", "▁b"]),
        ("never", True, ["a", "▁", "▁b"]),
    ):
        value = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
        assert split("a  b", value, at_start) == pieces
    older = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False, "split": False}
    assert split("a  b", older) == ["a▁▁b"]
    assert split("", older) == []


def test_byte_level_splits_as_gpt_2_did_and_maps_bytes_at_last() -> None:
    value = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    assert split("It's 12é", value) == [" It", "'s", " 12", "é"]
    later = {"type": "Digits", "individual_digits": True}
    assert split("a 1é", {"type": "Sequence", "pretokenizers": [value, later]}) == ["Ġa", "Ġ", "1", "Ã©"]


def test_digits_and_punctuation() -> None:
    assert split("a12", {"type": "Digits", "individual_digits": False}) == ["a", "12"]
    assert split("a12", {"type": "Digits", "individual_digits": True}) == ["a", "1", "2"]
    assert split("a!?b", {"type": "Punctuation"}) == ["a", "!", "?", "b"]
    assert split("a b", {"type": "WhitespaceSplit"}) == ["a", "b"]


def test_patterns_that_match_nothing_cut_nothing() -> None:
    value = {"type": "Split", "pattern": {"Regex": "x*"}, "behavior": "Isolated", "invert": False}
    assert split("axxb", value) == ["a", "xx", "b"]


def test_sets_inside_sets() -> None:
    value = {"type": "Split", "pattern": {"Regex": "[a-z&&[^b]]+"}, "behavior": "Isolated"}
    assert split("abc[d]", value) == ["a", "b", "c", "[", "d", "]"]


def test_byte_characters_stand_for_every_byte() -> None:
    every = bytes(range(256)).decode("latin-1")
    characters = to_byte_characters(every)
    assert from_byte_characters(characters) == every.encode()
    assert not any(char.isspace() for char in characters)
    with pytest.raises(UnicodeEncodeError):
        from_byte_characters("漢")
