"""What a tokenizer.json does to a text before it is split: its normalizer."""

import unicodedata
from collections.abc import Callable
from functools import partial

import regex

from tpilite.text.parts import Part

Normalize = Callable[[str], str]

_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_SPACES_AT_START, _SPACES_AT_END = regex.compile(r"\A\s+"), regex.compile(r"\s+\Z")


def read_normalizer(part: Part | None) -> Normalize:
    """The function that normalizes a text as the part says. Raises `CheckpointError`."""
    steps = [_step(step) for step in part.steps("normalizers")] if part else []

    def normalize(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return normalize


def keeps_all(part: Part | None) -> bool:
    """Whether the normalized text has all that the text has, with other signs for spaces at most."""
    return part is None or all(step.kind in ("Prepend", "Replace") for step in part.steps("normalizers"))


def _step(part: Part) -> Normalize:
    if part.kind in _FORMS:
        return partial(unicodedata.normalize, part.kind)  # type: ignore[arg-type]
    match part.kind:
        case "Prepend":
            start = part.text("prepend")
            return lambda text: start + text if text else text
        case "Replace":
            return replacement(part)
        case "Lowercase":
            # A character at a time: Python alone has another sigma for the end of a word.
            return lambda text: "".join([char.lower() for char in text])
        case "StripAccents":
            return lambda text: "".join([c for c in text if not unicodedata.category(c).startswith("M")])
        case "Strip":
            left, right = part.flag("strip_left", True), part.flag("strip_right", True)
            return lambda text: _stripped(text, left, right)
    return part.refuse(f"{part.kind!r}")


def replacement(part: Part) -> Normalize:
    """The function that puts the part's content where its pattern matches."""
    content = part.text("content")
    match part.fields.get("pattern"):
        case {"String": str(text)} if text:
            return lambda value: value.replace(text, content)
    found = part.pattern()
    return lambda value: found.sub(lambda _: content, value)


def _stripped(text: str, left: bool, right: bool) -> str:
    if left:
        text = _SPACES_AT_START.sub("", text)
    return _SPACES_AT_END.sub("", text) if right else text
