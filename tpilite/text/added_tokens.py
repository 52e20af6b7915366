"""The tokens that are matched by name: what tokenizer_config.json and its like add to a vocabulary."""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from tpilite.errors import CheckpointError
from tpilite.formats.json_file import read_json

logger = logging.getLogger(__name__)

# A token of this shape is special where its file does not tell; others (runs of spaces, digits) are text.
MARKUP = re.compile(r"▁?[<\[].+[>\]]")


# What Llama 3's models begin a text with, and end it or a turn with. A tokenizer that has such special tokens
# begins and ends with them where its files name no others.
TEXT_BEGIN = "<|begin_of_text|>"
TURN_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
# Where a text gets a space in front: every part between special tokens, as sentencepiece and the first
# tokenizer.json do it; the same, but for parts that begin with a space; only where the text begins; nowhere.
PREFIX_SPACES = ("sentencepiece", "always", "first", "never")

_SPACE = regex.compile(r"\s")
# What Unicode's rules for regular expressions call a word character.
_WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")


@dataclass(frozen=True)
class AddedToken:
    """A token that was added to a vocabulary under a name."""

    text: str
    special: bool  # otherwise a word like any other, but matched before the rest of the text
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False  # and behind it
    single_word: bool = False  # no part of a word
    normalized: bool = False  # matched in the normalized text, by its normalized name


class NameFinder:
    """Finds the names of added tokens in a text: the leftmost, and of several there the longest."""

    def __init__(self, tokens: Mapping[int, AddedToken], write: Callable[[str], str] = str) -> None:
        written = {write(token.text): (i, token) for i, token in tokens.items()}
        self._named = {name: written[name] for name in sorted(written, key=len, reverse=True) if name}

    def split(self, text: str, specials: bool = True) -> list[str | int]:
        """The text around the names, and the ids of these, in order. Without `specials`, those are text."""
        present = [re.escape(name) for name in self._named if name in text]
        parts: list[str | int] = []
        done = 0
        for match in re.finditer("|".join(present), text) if present else ():
            token_id, token = self._named[match[0]]
            start, end = match.span()
            if token.special and not specials:
                continue
            if token.single_word and (_at(_WORD, text, start - 1) or _at(_WORD, text, end)):
                continue
            while token.lstrip and start > done and _at(_SPACE, text, start - 1):
                start -= 1
            while token.rstrip and _at(_SPACE, text, end):
                end += 1
            parts += [text[done:start], token_id]
            done = end
        return [part for part in [*parts, text[done:]] if part != ""]


def _at(pattern: "regex.Pattern[str]", text: str, place: int) -> bool:
    return 0 <= place < len(text) and pattern.match(text, place) is not None


@dataclass(frozen=True)
class TokenNames:
    """The tokens that are matched by name, for which the model has a row."""

    by_id: Mapping[int, AddedToken]

    @classmethod
    def of(cls, added: Mapping[int, AddedToken], path: Path, vocab_size: int) -> "TokenNames":
        """The names of the added tokens, but for those beyond the model's vocabulary, which are warned of."""
        beyond = [token.text for i, token in added.items() if i >= vocab_size]
        if beyond:
            # Llama 2 was published with such a padding token. The model has no row for it.
            logger.warning("%s: %s left out, beyond the model's vocabulary", path.parent, ", ".join(beyond))
        return cls({i: token for i, token in added.items() if i < vocab_size})

    @property
    def specials(self) -> dict[str, int]:
        return {token.text: i for i, token in self.by_id.items() if token.special}

    def by_normalized(self) -> tuple[dict[int, AddedToken], dict[int, AddedToken]]:
        """The tokens that are found in the text as it is, and those that are found in the normalized one."""
        plain = {i: token for i, token in self.by_id.items() if not token.normalized}
        return plain, {i: token for i, token in self.by_id.items() if token.normalized}

    def extend(self, tokens: list[bytes]) -> list[bytes]:
        """The table of tokens with these names' texts, which for special ones is nothing."""
        tokens += [b""] * (max(self.by_id, default=-1) + 1 - len(tokens))
        for token_id, token in self.by_id.items():
            tokens[token_id] = b"" if token.special else token.text.encode(errors="replace")
        return tokens


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside a vocabulary say; without any, what the vocabulary's own file says."""

    add_bos: bool | None  # None where they say nothing of it
    add_eos: bool | None
    bos: str | None
    eos: str | None
    added: dict[int, AddedToken]
    prefix_space: str  # one of PREFIX_SPACES, where the vocabulary is one of those that put a space in front
    ends: tuple[str, ...] = TURN_ENDS  # special tokens that end a text or a turn, beside EOS

    @classmethod
    def from_folder(cls, folder: Path) -> "TokenizerSettings":
        """The settings of a model folder. Raises `CheckpointError` where its files are damaged.

        A token counts as the newest kind of file says that knows it: added_tokens.json, then tokenizer.json,
        which since transformers 5 may be the only one, then the table in tokenizer_config.json.
        """
        path = folder / "tokenizer_config.json"
        config = _read_if_there(path)
        older_names = _read_if_there(folder / "special_tokens_map.json")
        for key in ("add_bos_token", "add_eos_token"):
            if config.get(key) not in (None, True, False):
                raise CheckpointError(f"{path} has {key} = {config[key]!r}; expected true or false")
        head = _head(folder / "tokenizer.json")
        table = config.get("added_tokens_decoder") or {}
        if not isinstance(table, dict):
            raise CheckpointError(f"{path} has added tokens that are no object; download it again")
        added = _read_older(folder / "added_tokens.json", older_names)
        added |= read_json_added(folder / "tokenizer.json", head)
        added |= read_added(path, table.items())
        names = older_names | config
        return cls(
            config.get("add_bos_token"),
            config.get("add_eos_token"),
            _token_name(names.get("bos_token")),
            _token_name(names.get("eos_token")),
            added,
            "never" if config.get("add_prefix_space") is False else _prefix_space(head),
        )


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _head(path: Path) -> dict[str, Any]:
    """A tokenizer.json without its model, which is long and comes last in files as they are written."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    with contextlib.suppress(ValueError, RecursionError):
        head = json.loads(raw[: raw.index(b'"model"')].rstrip().removesuffix(b",") + b"}")
        if "added_tokens" in head:
            return head
    return read_json(path)


def _read_older(path: Path, older_names: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The tokens of an added_tokens.json, {text: id}: special where special_tokens_map.json names them.

    Where there is no such file, or a token looks like markup, it is special too.
    """
    special: set[Any] = set()
    for value in older_names.values():
        special |= {_token_name(entry) for entry in (value if isinstance(value, list) else [value])}
    return read_added(
        path,
        (
            (i, {"content": text, "special": not special or text in special or bool(MARKUP.fullmatch(text))})
            for text, i in _read_if_there(path).items()
        ),
    )


def _prefix_space(head: Mapping[str, Any]) -> str:
    """Where a tokenizer.json puts a space in front of a text, as one of `PREFIX_SPACES`."""
    for step in _steps(head.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            return scheme if scheme in PREFIX_SPACES else "sentencepiece"
    steps = _steps(head.get("normalizer"), "normalizers")
    replaces = any(step.get("type") == "Replace" for step in steps)
    return "never" if replaces and not any(s.get("type") == "Prepend" for s in steps) else "sentencepiece"


def _steps(value: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre_tokenizer: itself, or those of a sequence."""
    steps = value.get(key, [value]) if isinstance(value, dict) else []
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _token_name(value: Any) -> str | None:
    """The name in a tokenizer_config.json's `bos_token` and the like: a string, or an object around it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def read_json_added(path: Path, content: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The added tokens of a tokenizer.json. Raises `CheckpointError`."""
    entries = content.get("added_tokens", [])
    if not isinstance(entries, list):
        raise CheckpointError(f"{path} has no list of added_tokens; download it again")
    return read_added(path, ((e.get("id") if isinstance(e, dict) else None, e) for e in entries))


def read_added(path: Path, entries: Iterable[tuple[Any, Any]]) -> dict[int, AddedToken]:
    """The added tokens that a file's pairs of an id and an object describe. Raises `CheckpointError`."""
    added = {}
    for token_id, entry in entries:
        try:
            number, text, special = int(token_id), entry["content"], entry.get("special", True)
            if number < 0 or not isinstance(text, str) or not text:
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(
                f"{path} has the added token {str(entry)[:60]} with id {str(token_id)[:20]}; "
                "expected a whole number and an object with the token's content"
            ) from None
        special = bool(special)
        lstrip, rstrip, single = (entry.get(key) is True for key in ("lstrip", "rstrip", "single_word"))
        normalized = entry.get("normalized", not special) is True
        added[number] = AddedToken(text, special, lstrip, rstrip, single, normalized)
    return added


def check_vocabulary(path: Path, n_tokens: int, vocab_size: int) -> None:
    """Raises `CheckpointError` where a tokenizer has tokens for which the model has no row."""
    if n_tokens > vocab_size:
        raise CheckpointError(
            f"{path} has {n_tokens} tokens, but config.json says vocab_size = {vocab_size}; "
            "use the tokenizer that came with the model"
        )
