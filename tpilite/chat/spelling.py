"""Special tokens that a conversation spells, told from those that a chat template writes.

A template sees what its users wrote, and may do with it what it likes. What counts is the text that it makes
of that. Which special tokens in it are the users' is found by rendering a second time, with stand-ins of
Unicode's private use for characters: for all that can begin a special token, or, where the template looks at
these, for those that do begin one.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tpilite.errors import ConfigError
from tpilite.text.tokenizer import Tokenizer

Render = Callable[[dict[str, Any]], str]


class Spelling:
    """Renders conversations so that the special tokens they spell stay text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        names = tokenizer.specials
        whole = "|".join(map(re.escape, names))
        self._begins = re.compile(f"(?={whole})" if whole else r"(?!)")
        self._cut = {name[:length] for name in names for length in range(1, len(name))}
        self._longest = max(map(len, self._cut), default=0)

    def encode(self, render: Render, written: dict[str, Any]) -> list[int]:
        """The ids of the text that `render` makes of what was written, which is what JSON can hold.

        Raises `ConfigError` where the template changes what is written so that it cannot be told apart.
        """
        return self._encoded(*self._guarded(render, written))

    def _encoded(self, rendered: str, shown: Mapping[int, str]) -> list[int]:
        ids: list[int] = []
        for part in self._tokenizer.split_specials(rendered):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._tokenizer.encode(part.translate(shown), bos=False, at_start=not ids)
        return ids

    def _guarded(self, render: Render, written: dict[str, Any]) -> tuple[str, Mapping[int, str]]:
        """The rendered text with its stand-ins, and what these stand for."""
        plain = render(written)
        stand_ins = self._stand_ins("".join(_texts(written)))
        shown = {ord(stand_in): char for char, stand_in in stand_ins.items()}
        table = str.maketrans(stand_ins)
        guarded = _changed(written, lambda text: text.translate(table))
        if guarded == written:
            return plain, {}
        rendered = render(guarded)
        if rendered.translate(shown) == plain:
            return rendered, shown
        if self._specials(rendered) == self._specials(plain):
            return plain, {}
        rendered = render(_changed(written, lambda text: self._replaced(text, stand_ins)))
        if rendered.translate(shown) == plain:
            return rendered, shown
        raise ConfigError(
            "the model's chat template changes a message that spells a special token of the model, so that "
            "the two cannot be told apart; write the message without it"
        )

    def _stand_ins(self, text: str) -> dict[str, str]:
        """For each character that begins a special token, one of private use that is not in the text."""
        unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
        return {name[0]: next(unused) for name in self._tokenizer.specials}

    def _specials(self, text: str) -> list[int]:
        return [part for part in self._tokenizer.split_specials(text) if isinstance(part, int)]

    def _replaced(self, text: str, stand_ins: Mapping[str, str]) -> str:
        """The text with a stand-in where a special token's name begins.

        Also where one may begin at the end of the text, once that is trimmed, for what follows to complete.
        """
        end = len(text.rstrip())
        starts = {found.start() for found in self._begins.finditer(text)}
        starts |= {i for i in range(max(0, end - self._longest), end) if text[i:end] in self._cut}
        return "".join(stand_ins[char] if i in starts else char for i, char in enumerate(text))


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """What was written, with its texts changed, those that are keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _changed(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(entry, change) for entry in value]
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    entries: Iterable[Any] = ()
    if isinstance(value, Mapping):
        entries = (*value.keys(), *value.values())
    elif isinstance(value, list | tuple):
        entries = value
    for entry in entries:
        yield from _texts(entry)
