"""The parts of a tokenizer.json, read with checks: its normalizer, pre_tokenizer, model and so on."""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import regex

from tpilite.errors import CheckpointError

# What Oniguruma, for which these patterns are written, understands otherwise than `regex` does: hexadecimal
# digits and other escapes of Ruby, named classes, a repeated count, and the flags m, s and x.
_FOREIGN = re.compile(r"(?<!\\)(?:\\\\)*(?:\\[hHRUXGKkgzZ]|\[\^?\[:|\{[\d,]+\}\+|\(\?[a-z]*-?[a-z]*[msx])")
_OF_SETS = re.compile(r"\\.|\[\^?\]?|\]|&&|--|\|\||~~", re.DOTALL)
_NESTED = {"[", "[^", "&&"}


@dataclass(frozen=True)
class Part:
    """An object of a tokenizer.json, with the name by which errors call it."""

    path: Path
    name: str  # "pre_tokenizer" and the like
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path, name: str, value: Any) -> "Part":
        """The part that a value of the file describes. Raises `CheckpointError` where it is no object."""
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{path} is damaged: its {name} is no object but {str(value)[:40]!r}; download it again"
            )
        return cls(path, name, value)

    @property
    def kind(self) -> str:
        return self.text("type")

    def text(self, key: str) -> str:
        return self._checked(key, str, self.fields.get(key))

    def flag(self, key: str, default: bool) -> bool:
        return self._checked(key, bool, self.fields.get(key, default))

    def number(self, key: str) -> int:
        return self._checked(key, int, self.fields.get(key))

    def _checked(self, key: str, expected: type, value: Any) -> Any:
        if type(value) is not expected:
            self.damaged(f"{key} = {str(value)[:40]!r}, no {_KINDS[expected]}")
        return value

    def steps(self, key: str) -> Iterator["Part"]:
        """The part itself, or the parts of a sequence, which its file has under `key`, and theirs in turn."""
        waiting = [self]
        while waiting:
            part = waiting.pop(0)
            if part.kind != "Sequence":
                yield part
                continue
            values = self._checked(key, list, part.fields.get(key))
            waiting[:0] = [Part.of(self.path, self.name, value) for value in values]

    def pattern(self, key: str = "pattern") -> "regex.Pattern[str]":
        """The compiled `pattern`, {"String": plain text} or {"Regex": Oniguruma's syntax}."""
        match self.fields.get(key):
            case {"String": str(text)}:
                return regex.compile(regex.escape(text))
            case {"Regex": str(text)}:
                return self._compiled(text)
        return self.refuse(f"the {key} {self.fields.get(key)!r}")

    def _compiled(self, text: str) -> "regex.Pattern[str]":
        foreign = _FOREIGN.search(text)
        if foreign:
            self.refuse(f"{foreign[0]!r} in a pattern")
        # Version 1 has sets inside sets, and with the flag i more letters that are alike.
        signs = _inside_sets(text)
        nested = not signs.isdisjoint(_NESTED)
        if nested and (signs - _NESTED or "(?i" in text):
            self.refuse(f"a pattern of sets inside sets, {text!r}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of sets that version 1 reads otherwise
                # In Oniguruma ^ and $ are the ends of each line.
                return regex.compile(text, regex.MULTILINE | (regex.V1 if nested else regex.V0))
        except (regex.error, RecursionError, OverflowError) as error:
            return self.refuse(f"a pattern that cannot be read ({error})")

    def damaged(self, what: str) -> NoReturn:
        """Raises `CheckpointError` that tells what is wrong with the part."""
        raise CheckpointError(f"{self.path} is damaged: its {self.name} has {what}; download it again")

    def refuse(self, what: str) -> NoReturn:
        """Raises `CheckpointError` that names what the tokenizer needs and is not supported."""
        raise CheckpointError(
            f"{self.path} has in its {self.name} {what[:120]}, which is not supported; put the model's "
            "tokenizer.model beside it, if there is one"
        )


_KINDS = {str: "text", bool: "true or false", int: "whole number", list: "list"}


def _inside_sets(pattern: str) -> set[str]:
    """What stands in the sets of a pattern of the signs that begin sets in them or join them."""
    found, depth = set(), 0
    for sign in _OF_SETS.findall(pattern):
        if sign.startswith("\\"):
            continue
        if depth and sign != "]":
            found.add(sign)
        depth += sign.startswith("[") - (sign == "]" and depth > 0)
    return found
