"""Normalizers of a tokenizer.json, one by one and in a row."""

from pathlib import Path
from typing import Any

import pytest

from tpilite.text.normalizers import keeps_all, read_normalizer
from tpilite.text.parts import Part


def part(value: dict[str, Any]) -> Part:
    return Part.of(Path("tokenizer.json"), "normalizer", value)


@pytest.mark.parametrize(
    ("value", "text", "normalized"),
    [
        ({"type": "NFC"}, "e\u0301\ufb01", "\u00e9\ufb01"),
        ({"type": "NFKC"}, "e\u0301\ufb01", "\u00e9fi"),
        ({"type": "NFD"}, "\u00e9", "e\u0301"),
        ({"type": "NFKD"}, "\u00e9\ufb01", "e\u0301fi"),
        ({"type": "Lowercase"}, "\u039f\u03a3 A\u0130", "\u03bf\u03c3 ai\u0307"),
        ({"type": "StripAccents"}, "e\u0301\u093e", "e"),
        ({"type": "Strip", "strip_left": True, "strip_right": False}, "\u3000 a ", "a "),
        ({"type": "Strip", "strip_left": False, "strip_right": True}, " a\n", " a"),
        ({"type": "Prepend", "prepend": "_"}, "a", "_a"),
        ({"type": "Prepend", "prepend": "_"}, "", ""),
        ({"type": "Replace", "pattern": {"String": "."}, "content": "\\1"}, "a.b", "a\\1b"),
        ({"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": r"\g<0>"}, "a  b", r"a\g<0>b"),
        (
            {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "Prepend", "prepend": "A"}]},
            "B",
            "Ab",
        ),
        ({"type": "Sequence", "normalizers": []}, "B", "B"),
    ],
)
def test_each_normalizer(value: dict[str, Any], text: str, normalized: str) -> None:
    assert read_normalizer(part(value))(text) == normalized


def test_only_signs_for_spaces_keep_all_of_a_text() -> None:
    prepend = {"type": "Prepend", "prepend": "_"}
    assert keeps_all(None)
    assert keeps_all(part({"type": "Sequence", "normalizers": [prepend]}))
    assert not keeps_all(part({"type": "Sequence", "normalizers": [prepend, {"type": "NFC"}]}))
