"""How a tokenizer.json splits a text into pieces, inside which its tokens stay: its pre_tokenizer.

A pre-tokenizer is a row of steps, each of which splits the pieces of the step before. Patterns are
Oniguruma's in the file and run here by `regex`, whose Unicode is the newer one: only characters newer than
the file's program are split otherwise.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import regex

from tpilite.text.parts import Part

Step = Callable[[list[str], bool], list[str]]  # pieces, and whether the first begins a text -> pieces
Marked = tuple[str, bool]  # a stretch of text, and whether the pattern matched it

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE files, as GPT-2 chose them.

    Printable ones stand for themselves, the others for those from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
_TO_CHARACTER = dict(enumerate(BYTE_CHARACTERS))
_TO_BYTE = {ord(char): byte for byte, char in _TO_CHARACTER.items()}


def to_byte_characters(text: str) -> str:
    """The text's UTF-8, with a character for each byte."""
    return text.encode().decode("latin-1").translate(_TO_CHARACTER)


def from_byte_characters(token: str) -> bytes:
    """The bytes that a token's characters stand for. Raises `UnicodeEncodeError` where one has none."""
    return token.translate(_TO_BYTE).encode("latin-1")


class PreTokenizer:
    """Splits texts as a pre_tokenizer says.

    `is_byte_level` says whether tokens are made of byte characters. `maps_bytes`: the pieces become
    `to_byte_characters` at last. That is left to whoever encodes a piece, who may know it already.
    """

    def __init__(self, part: Part | None) -> None:
        parts = list(part.steps("pretokenizers")) if part else []
        self.maps_bytes = bool(parts) and parts[-1].kind == "ByteLevel"
        self.is_byte_level = any(part.kind == "ByteLevel" for part in parts)
        self.keeps_all = all(_keeps_all(part) for part in parts)
        self._steps: list[Step] = []
        for number, step in enumerate(parts, 1):
            self._steps += _steps(step, maps_bytes=number < len(parts))

    def split(self, text: str, at_start: bool) -> list[str]:
        """The pieces of a text. `at_start`: nothing stands before it."""
        pieces = [text] if text else []
        for step in self._steps:
            pieces = step(pieces, at_start)
        return pieces


def _keeps_all(part: Part) -> bool:
    return part.kind != "WhitespaceSplit" and part.fields.get("behavior") != "Removed"


def _steps(part: Part, maps_bytes: bool) -> Iterator[Step]:
    """The steps of one pre-tokenizer that is no sequence."""
    match part.kind:
        case "ByteLevel":
            if part.flag("add_prefix_space", True):
                yield lambda pieces, _: [p if p.startswith(" ") else f" {p}" for p in pieces]
            if part.flag("use_regex", True):
                yield _split(part, regex.compile(GPT2), "Isolated")
            if maps_bytes:
                yield lambda pieces, _: [to_byte_characters(piece) for piece in pieces]
        case "Split":
            yield _split(part, part.pattern(), part.text("behavior"), part.flag("invert", False))
        case "Digits":
            alone = part.flag("individual_digits", False)
            yield _split(part, regex.compile(r"\p{N}" if alone else r"\p{N}+"), "Isolated")
        case "Punctuation":
            behavior = part.text("behavior") if "behavior" in part.fields else "Isolated"
            yield _split(part, regex.compile(r"[\p{P}!-/:-@\[-`{-~]"), behavior)
        case "WhitespaceSplit":
            yield _split(part, regex.compile(r"\s"), "Removed")
        case "Metaspace":
            yield from _metaspace(part)
        case _:
            part.refuse(f"{part.kind!r}")


def _metaspace(part: Part) -> Iterator[Step]:
    """Spaces become the sign for them, one is put in front, and pieces begin with it."""
    sign = part.text("replacement")
    scheme = metaspace_scheme(part)
    yield lambda pieces, _: [piece.replace(" ", sign) for piece in pieces]
    if scheme == "always":
        yield lambda pieces, _: [p if p.startswith(sign) else sign + p for p in pieces]
    elif scheme == "first":

        def first(pieces: list[str], at_start: bool) -> list[str]:
            prefixed = at_start and pieces and not pieces[0].startswith(sign)
            return [sign + pieces[0], *pieces[1:]] if prefixed else pieces

        yield first
    if part.flag("split", True):
        yield _split(part, regex.compile(regex.escape(sign)), "MergedWithNext")


def metaspace_scheme(part: Part) -> str:
    """Where a Metaspace puts a space in front: "always", "first" or "never"."""
    if part.flag("add_prefix_space", True) is False:
        return "never"
    scheme = part.fields.get("prepend_scheme", "always")
    return scheme if scheme in ("always", "first", "never") else part.refuse(f"prepend_scheme {scheme!r}")


def _split(part: Part, pattern: "regex.Pattern[str]", behavior: str, invert: bool = False) -> Step:
    """The step that splits pieces by a pattern. Raises `CheckpointError` for an unknown behavior."""
    merge = _BEHAVIORS.get(behavior) or part.refuse(f"the behavior {behavior!r}")
    if behavior == "Isolated" and not pattern.groups:
        return lambda pieces, _: [found for piece in pieces for found in _isolated(piece, pattern)]

    def split(pieces: list[str], _: bool) -> list[str]:
        found = []
        for piece in pieces:
            marked = [(text, matched != invert) for text, matched in _marked(piece, pattern) if text]
            found += merge(marked)
        return found

    return split


def _isolated(text: str, pattern: "regex.Pattern[str]") -> list[str]:
    """The matches and what lies between, in order."""
    found: list[str] = pattern.findall(text)
    if sum(map(len, found)) == len(text):  # nothing lies between: true of nearly all texts and patterns
        return found if "" not in found else [piece for piece in found if piece]
    return [piece for piece, _ in _marked(text, pattern) if piece]


def _marked(text: str, pattern: "regex.Pattern[str]") -> Iterator[Marked]:
    end = 0
    for match in pattern.finditer(text):
        yield text[end : match.start()], False
        yield match[0], True
        end = match.end()
    yield text[end:], False


def _contiguous(marked: Iterable[Marked]) -> list[str]:
    return ["".join(text for text, _ in run) for _, run in groupby(marked, key=lambda item: item[1])]


def _with_previous(marked: Iterable[Marked]) -> list[str]:
    """Each match with the stretch before it; of several in a row the first only."""
    pieces: list[str] = []
    after_match = False
    for text, matched in marked:
        if matched and not after_match and pieces:
            pieces[-1] += text
        else:
            pieces.append(text)
        after_match = matched
    return pieces


def _with_next(marked: list[Marked]) -> list[str]:
    """Each match with the stretch behind it; of several in a row the last only."""
    pieces: list[str] = []
    before_match = False
    for text, matched in reversed(marked):
        if matched and not before_match and pieces:
            pieces[-1] = text + pieces[-1]
        else:
            pieces.append(text)
        before_match = matched
    return pieces[::-1]


_BEHAVIORS: dict[str, Callable[[list[Marked]], list[str]]] = {
    "Isolated": lambda marked: [text for text, _ in marked],
    "Removed": lambda marked: [text for text, matched in marked if not matched],
    "Contiguous": _contiguous,
    "MergedWithPrevious": _with_previous,
    "MergedWithNext": _with_next,
}
