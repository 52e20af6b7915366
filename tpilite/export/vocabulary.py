"""The tokenizer of a model's folder, as the metadata of a GGUF file: what `text.gguf_vocab` reads, written.

A sentencepiece model goes in by its pieces and scores ("llama"), byte-level pairs by their merges ("gpt2").
How these split a text is said by the name of a family that does the same to `_PROBE`. A tokenizer.json in the
manner of sentencepiece is given scores that make the same merges.
"""

import logging
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tpilite.errors import ConfigError
from tpilite.formats.json_file import read_json
from tpilite.formats.model_files import ModelFiles
from tpilite.text.added_tokens import TokenizerSettings
from tpilite.text.gguf_vocab import (
    BYTE,
    CONTROL,
    FAMILIES,
    KEY,
    NO_VOCAB,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_TOKENS,
    from_gguf,
    splits_of,
)
from tpilite.text.load import load_tokenizer, read_model_file, tokenizer_file
from tpilite.text.parts import Part
from tpilite.text.pretokenizers import BYTE_CHARACTERS, PreTokenizer
from tpilite.text.sentencepiece_files import protobuf, records_and_rules
from tpilite.text.templates import DEFAULT, find_templates
from tpilite.text.tiktoken_files import is_tiktoken, read_ranks
from tpilite.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_BPE, _ADD_DUMMY_PREFIX, _MODEL_TYPE = 2, 3, 3  # of sentencepiece_model.proto
_TEMPLATE = "tokenizer.chat_template"
_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")

# What tells the families of splits apart: contractions, capitals, digits, signs, white space, scripts.
_PROBE = (
    "Hello World, it's I'LL don'T  2 33 333 4444 55555  x=y+12;\n\n\n   \t tab\r\n end. ?!... (a) [b] $"
    "%/path\n McDonald HTTPServer caf\xe9 na\xefve stra\xdfe \u0417\u0434\u0440\u0430\u0432\u0441\u0442"
    "\u0432\u0443\u0439 \u4f60\u597d\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \u30ab\u30bf "
    "\uc548\ub155 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27"
    "\u0e31\u0e2a\u0e14\u0e35 \u0663\u0664 \U0001f600\U0001f680 _under_ -1.5e3 a\u0301b \u2014 \u201cq"
    "\u201d  "
)


@dataclass
class _Vocab:
    """A vocabulary by ids, before added tokens are put in."""

    texts: Mapping[int, str]
    values: dict[str, Any]  # the metadata that this kind has alone, by name
    types: Mapping[int, int] = field(default_factory=dict)  # where they are not normal
    scores: Mapping[int, float] | None = None


def vocabulary_of(files: ModelFiles, vocab_size: int) -> dict[str, Any]:
    """The metadata of a folder's tokenizer and chat templates, with a token for each row of the model.

    Says in a warning where who reads it would get other tokens. Raises `ConfigError` for a tokenizer that
    GGUF has no name for.
    """
    path = tokenizer_file(files.folder)
    tokenizer = load_tokenizer(files, vocab_size)
    if path is None or tokenizer is None:
        return {f"{KEY}model": NO_VOCAB}
    vocab = _read(path)
    texts, types = dict(vocab.texts), dict(vocab.types)
    for token_id, token in tokenizer.added.items():
        texts[token_id] = token.text
        types[token_id] = CONTROL if token.special else USER_DEFINED
    ids = range(vocab_size)
    unused = {i: f"[PAD{i}]" for i in ids if i not in texts}
    texts |= unused
    types |= dict.fromkeys(unused, UNUSED)
    values = vocab.values | {
        "tokens": [texts[i] for i in ids],
        "token_type": np.array([types.get(i, NORMAL) for i in ids], np.int32),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "unknown_token_id": next((i for i, kind in types.items() if kind == UNKNOWN), None),
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
    }
    if vocab.scores is not None:
        if BYTE not in types.values():
            logger.warning(
                "%s has no tokens of single bytes: llama.cpp ends at a character that is no token", path
            )
        lowest = min(vocab.scores.values()) - 1
        values["scores"] = np.array([vocab.scores.get(i, lowest) for i in ids], np.float32)
    metadata = {KEY + name: value for name, value in values.items() if value is not None}
    _compare(path, tokenizer, from_gguf(path, metadata, vocab_size))
    return metadata | _templates(files, tokenizer)


def _templates(files: ModelFiles, tokenizer: Tokenizer) -> dict[str, str]:
    found = find_templates(files, tokenizer.specials)
    return {_TEMPLATE if name == DEFAULT else f"{_TEMPLATE}.{name}": text for name, text in found.items()}


def _read(path: Path) -> _Vocab:
    if path.suffix == ".json":
        return _of_json(path)
    raw = read_model_file(path)
    return _of_tiktoken(path, raw) if is_tiktoken(raw) else _of_sentencepiece(path, raw)


def _of_sentencepiece(path: Path, raw: bytes) -> _Vocab:
    records, rules = records_and_rules(raw)
    trainer = b"".join(value for number, value in protobuf(raw) if number == 2 and isinstance(value, bytes))
    if dict(protobuf(trainer)).get(_MODEL_TYPE) != _BPE:
        raise ConfigError(
            f"{path} is no model of byte pairs, and a GGUF file can hold no other; leave out --export"
        )
    pieces = [dict(protobuf(record)) for record in records]
    prefix = rules.get(_ADD_DUMMY_PREFIX, 1) and TokenizerSettings.from_folder(path.parent).prefix_space
    return _Vocab(
        {i: _text(piece.get(1)) for i, piece in enumerate(pieces)},
        {"model": "llama", "pre": "default", "add_space_prefix": prefix not in (0, "never")},
        {i: int(_number(piece.get(3, NORMAL))) for i, piece in enumerate(pieces)},
        {i: _float(piece.get(2)) for i, piece in enumerate(pieces)},
    )


def _text(value: int | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else ""


def _number(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value


def _float(value: int | bytes | None) -> float:
    return float(struct.unpack("<f", value)[0]) if isinstance(value, bytes) else 0.0


def _of_tiktoken(path: Path, raw: bytes) -> _Vocab:
    ranks = read_ranks(path, raw)
    texts = {token: "".join(BYTE_CHARACTERS[byte] for byte in token) for token in ranks}
    pairs = (_last_merge(token, ranks) for token in ranks)
    merges = [f"{texts[pair[0]]} {texts[pair[1]]}" for pair in pairs if pair]
    return _Vocab(
        {rank: texts[token] for token, rank in ranks.items()},
        {"model": "gpt2", "pre": "llama-bpe", "merges": merges},
    )


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that the merges of lower ranks leave of a token; None where there are not two."""
    parts = re.findall(rb"(?s).", token)
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        if min(pairs) == len(ranks):
            break
        place = pairs.index(min(pairs))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _of_json(path: Path) -> _Vocab:
    content = read_json(path)
    model = content["model"]
    pairs = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    texts = {i: token for token, i in model["vocab"].items()}
    part = content.get("pre_tokenizer")
    splits = PreTokenizer(None if part is None else Part.of(path, "pre_tokenizer", part))
    if splits.is_byte_level:
        family = _family(path, splits, ignores_merges=bool(model.get("ignore_merges")))
        return _Vocab(texts, {"model": "gpt2", "pre": family, "merges": [" ".join(pair) for pair in pairs]})
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs, 1):
        ranks.setdefault("".join(pair), rank)
    types = {i: BYTE for i, token in texts.items() if _BYTE_NAME.fullmatch(token)}
    types |= {i: UNKNOWN for i, token in texts.items() if token == model.get("unk_token")}
    prefix = TokenizerSettings.from_folder(path.parent).prefix_space != "never"
    return _Vocab(
        texts,
        {"model": "llama", "pre": "default", "add_space_prefix": prefix},
        types,
        {i: float(-ranks.get(token, 0)) for i, token in texts.items()},
    )


def _family(path: Path, splits: PreTokenizer, *, ignores_merges: bool) -> str:
    """The family that splits texts in the same way. Raises `ConfigError`."""
    wanted = splits.split(_PROBE, True)
    fitting = (
        family
        for family in FAMILIES
        if (family in WHOLE_TOKENS) is ignores_merges
        and PreTokenizer(Part.of(path, "pre_tokenizer", splits_of(family))).split(_PROBE, True) == wanted
    )
    found = next(fitting, None)
    if found is None:
        raise ConfigError(
            f"{path} splits texts in a way that GGUF files have no name for; leave out --export"
        )
    return found


def _compare(path: Path, tokenizer: Tokenizer, written: Tokenizer | None) -> None:
    """Says so where the tokenizer that was written gives other tokens than the one that was read."""
    assert written is not None
    specials = "".join(list(tokenizer.specials)[:8])
    for text in (*_PROBE.splitlines(), _PROBE, f"a {specials} b{specials}c", "  two  spaces", " one"):
        for allow_special in (False, True):
            tokens = [one.encode(text, allow_special=allow_special) for one in (tokenizer, written)]
            if tokens[0] != tokens[1]:
                logger.warning(
                    "%s cannot be said in a GGUF file as it is: some texts become other tokens, as %.40r",
                    path,
                    text,
                )
                return
