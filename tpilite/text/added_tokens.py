"""The tokens that are matched by name: what tokenizer_config.json and its like add to a vocabulary."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpilite.config import read_json
from tpilite.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AddedToken:
    """A token that was added to a vocabulary under a name."""

    text: str
    special: bool  # otherwise a word like any other, but matched before the rest of the text


@dataclass(frozen=True)
class TokenNames:
    """The ids of the tokens that are matched by name: special ones, and words."""

    specials: dict[str, int]
    words: dict[str, int]

    @classmethod
    def of(cls, added: Mapping[int, AddedToken], path: Path, vocab_size: int) -> "TokenNames":
        """The names of the added tokens, but for those beyond the model's vocabulary, which are warned of."""
        beyond = [token.text for i, token in added.items() if i >= vocab_size]
        if beyond:
            # Llama 2 was published with such a padding token. The model has no row for it.
            logger.warning("%s: %s left out, beyond the model's vocabulary", path.parent, ", ".join(beyond))
        fitting = {i: token for i, token in added.items() if i < vocab_size}
        return cls(
            {token.text: i for i, token in fitting.items() if token.special},
            {token.text: i for i, token in fitting.items() if not token.special},
        )

    def extend(self, tokens: list[bytes]) -> list[bytes]:
        """The table of tokens with these names' texts, which for special ones is nothing."""
        ids = [*self.specials.values(), *self.words.values()]
        tokens += [b""] * (max(ids, default=-1) + 1 - len(tokens))
        for token_id in self.specials.values():
            tokens[token_id] = b""
        for text, token_id in self.words.items():
            tokens[token_id] = text.encode()
        return tokens


@dataclass(frozen=True)
class TokenizerSettings:
    """What tokenizer_config.json says; without one, what both Llama 2 and 3 do."""

    add_bos: bool
    bos: str | None
    eos: str | None
    added: dict[int, AddedToken]

    @classmethod
    def from_folder(cls, folder: Path) -> "TokenizerSettings":
        """The settings of a model folder. Raises `CheckpointError` where its files are damaged."""
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        add_bos = config.get("add_bos_token")
        if add_bos not in (None, True, False):
            raise CheckpointError(f"{path} has add_bos_token = {add_bos!r}; expected true or false")
        older = folder / "added_tokens.json"  # {text: id}, before added_tokens_decoder
        table = config.get("added_tokens_decoder")
        if table is None and older.is_file():
            path, table = older, {i: {"content": text} for text, i in read_json(older).items()}
        if not isinstance(table, dict | None):
            raise CheckpointError(f"{path} has added tokens that are no object; download it again")
        return cls(
            add_bos is not False,
            _token_name(config.get("bos_token")),
            _token_name(config.get("eos_token")),
            read_added(path, (table or {}).items()),
        )


def _token_name(value: Any) -> str | None:
    """The name in a tokenizer_config.json's `bos_token` and the like: a string, or an object around it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


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
        added[number] = AddedToken(text, bool(special))
    return added


def check_vocabulary(path: Path, n_tokens: int, vocab_size: int) -> None:
    """Raises `CheckpointError` where a tokenizer has tokens for which the model has no row."""
    if n_tokens > vocab_size:
        raise CheckpointError(
            f"{path} has {n_tokens} tokens, but config.json says vocab_size = {vocab_size}; "
            "use the tokenizer that came with the model"
        )
