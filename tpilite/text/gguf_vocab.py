"""The tokenizer that the metadata of a GGUF file holds, `tokenizer.ggml.*`.

Of its two kinds, "llama" is a sentencepiece model (pieces, scores, types): one is made in memory, and
sentencepiece runs it. "gpt2" is byte-level byte-pair encoding: it is read as the tokenizer.json that it was
made from. How that splits a text is not in the file, but only a name for it, `tokenizer.ggml.pre`, which the
program that writes such files takes from a table of its own; what each name stands for is said below.
"""

import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tpilite.errors import CheckpointError
from tpilite.text.added_tokens import TURN_ENDS, AddedToken, TokenizerSettings
from tpilite.text.json_files import from_json
from tpilite.text.pretokenizers import GPT2
from tpilite.text.sentencepiece_files import NOT_READ, read_model
from tpilite.text.tiktoken_files import PATTERN as LLAMA3
from tpilite.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

KEY = "tokenizer.ggml."
NO_VOCAB = "no_vocab"  # the model of a file that is converted without one
_MAX_NUMBER = 1e38  # of 32 bits

# Types of tokens, the same numbers as in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# What ends a turn in chats, beside the file's own end tokens; as special tokens only.
_CHAT_ENDS = (
    *TURN_ENDS,
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_DIGIT_ALONE = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


def _by_case(behind: str, digits: str) -> str:
    """The pattern that parts a word where capitals begin, with what belongs to a word behind it."""
    return f"{_LETTERS}{_UPPER}*{_LOWER}+{behind}|{_LETTERS}{_UPPER}+{_LOWER}*{behind}|{digits}|{_SIGNS}"


# The patterns by which a text is split, one after the other, of each name; the first name is the family's.
_PATTERNS: dict[tuple[str, ...], list[str]] = {
    ("default",): [r"[\p{P}$+<=>\^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion"): [GPT2],
    ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"): [r"\p{N}", GPT2],
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): [LLAMA3],
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): [LLAMA3],
    ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "grok-2"): [_DIGIT_ALONE],
    ("qwen35",): [
        _DIGIT_ALONE.replace(r"\p{L}+|", r"[\p{L}\p{M}]+|").replace(
            r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
        )
    ],
    ("tekken",): [_by_case("", r"\p{N}")],
    ("gpt-4o", "llama4", "kanana2"): [_by_case(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")],
    ("deepseek-llm",): [
        "[\r\n]",
        "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
        "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
        "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
        "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
        "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
        "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
        "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
        "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
        "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
        "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
        "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
        "\U0001e900-\U0001e943]+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _HAN,
        r"\p{N}",
    ],
    ("deepseek-coder",): ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}"],
    ("deepseek-v3", "hunyuan-dense"): [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    ("seed-coder",): [
        f"{_CONTRACTIONS}|{_LETTERS}" r"\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
_FAMILIES = {name: names[0] for names in _PATTERNS for name in names}
_SPLITS = {names[0]: patterns for names, patterns in _PATTERNS.items()}
FAMILIES = tuple(_SPLITS)  # by their first names
# Pieces that are tokens stay whole, and texts begin with BOS where the file does not say otherwise.
WHOLE_TOKENS = _BOS_FIRST = {"llama-bpe", "tekken"}
_COMPOSED = {"qwen2", "qwen35"}  # their own normalizer is NFC


def from_gguf(path: Path, metadata: Mapping[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a GGUF file's metadata, None where that has none. `path` is for messages.

    Raises `CheckpointError` for damage, for another kind than "llama" and "gpt2", for an unknown `pre`, and
    for tokens beyond `vocab_size`.
    """
    named = metadata.get(KEY + "model", NO_VOCAB)
    if isinstance(named, str) and named == NO_VOCAB:
        return None
    vocab = _Vocab(path, metadata)
    kind = vocab.text("model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path} has a tokenizer of the kind {kind[:40]!r} ({KEY}model); supported are llama and gpt2"
        )
    if len(vocab.tokens) > vocab_size:
        raise CheckpointError(
            f"{path} is damaged: it has {len(vocab.tokens)} {KEY}tokens, but a vocabulary of {vocab_size}, "
            "the rows of its token_embd.weight; download it again"
        )
    return _from_pairs(vocab, vocab_size) if kind == "gpt2" else _from_pieces(vocab, vocab_size)


class _Vocab:
    """The tokens of a file and the values about them, with their types checked."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self._metadata = path, metadata
        self.tokens = self.texts("tokens")
        self.types = self.numbers("token_type", default=NORMAL)

    def get(self, key: str) -> Any:
        return self._metadata.get(KEY + key)

    def text(self, key: str) -> str:
        value = self.get(key)
        return value if isinstance(value, str) else self.damaged(key, "text")

    def flag(self, key: str) -> bool | None:
        value = self.get(key)
        return value if value is None or isinstance(value, bool) else self.damaged(key, "true or false")

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not value or set(map(type, value)) != {str}:
            return self.damaged(key, "a list of text")
        return value

    def numbers(self, key: str, default: float | None = None) -> list[float]:
        """A number for each token, by default the same for all."""
        value = self.get(key)
        if value is None and default is not None:
            return [default] * len(self.tokens)
        try:
            numbers = [*map(float, value)]
        except (TypeError, ValueError, OverflowError):
            numbers = []
        if len(numbers) != len(self.tokens) or not all(abs(n) < _MAX_NUMBER for n in numbers):
            self.damaged(key, "a number for each token")
        return numbers

    def token(self, key: str) -> str | None:
        """The text of the token whose id stands under `key`. One beyond the vocabulary is none."""
        value = self.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            return self.damaged(key, "the id of a token")
        return None if value is None or value >= len(self.tokens) else self.tokens[value]

    def damaged(self, key: str, expected: str) -> Any:
        """Raises `CheckpointError` for a value that is missing, or is another than expected."""
        value = self.get(key)
        found = f"none of {KEY}{key}" if value is None else f"{KEY}{key} = {str(value)[:40]!r}"
        raise CheckpointError(
            f"{self.path} is damaged: it has {found}; expected {expected}: download it again"
        )


def _settings(vocab: _Vocab, add_bos: bool) -> TokenizerSettings:
    """What tokenizer_config.json would say: the added tokens, and which of them begin and end texts."""
    added = {
        i: AddedToken(text, special=kind != USER_DEFINED)
        for i, (text, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and text
    }
    said = vocab.flag("add_bos_token")
    return TokenizerSettings(
        add_bos if said is None else said,
        vocab.flag("add_eos_token"),
        vocab.token("bos_token_id"),
        vocab.token("eos_token_id"),
        added,
        "never" if vocab.flag("add_space_prefix") is False else "sentencepiece",
        (*filter(None, map(vocab.token, ("eot_token_id", "eom_token_id"))), *_CHAT_ENDS),
    )


def _from_pairs(vocab: _Vocab, vocab_size: int) -> Tokenizer:
    """The tokenizer of byte-level pairs, by way of the tokenizer.json that says the same."""
    family = _family(vocab)
    ids = dict(zip(vocab.tokens, range(len(vocab.tokens)), strict=True))
    if len(ids) != len(vocab.tokens):
        vocab.damaged("tokens", "different tokens")
    content = {
        "normalizer": {"type": "NFC"} if family in _COMPOSED else None,
        "pre_tokenizer": splits_of(family),
        "decoder": {"type": "ByteLevel"},
        "model": {"vocab": ids, "merges": vocab.texts("merges"), "ignore_merges": family in WHOLE_TOKENS},
    }
    settings = _settings(vocab, add_bos=family in _BOS_FIRST)
    return from_json(vocab.path, content, settings, vocab_size, model_name=f"{KEY}merges")


def splits_of(family: str) -> dict[str, Any]:
    """How texts are split in one of the `FAMILIES`, as a tokenizer.json says it."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        for pattern in _SPLITS[family]
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, level]}


def _family(vocab: _Vocab) -> str:
    """The first of the names for the way in which the file's text is split."""
    if vocab.get("pre") is None:
        logger.warning("%s does not say how its tokenizer splits a text; the default is used", vocab.path)
        return "default"
    name = vocab.text("pre")
    if name not in _FAMILIES:
        raise CheckpointError(
            f"{vocab.path} has a tokenizer that splits texts as {name[:40]!r} ({KEY}pre), which is not "
            f"known here; known are {', '.join(sorted(_FAMILIES))}"
        )
    return _FAMILIES[name]


def _from_pieces(vocab: _Vocab, vocab_size: int) -> Tokenizer:
    """The tokenizer of pieces and scores, by way of the sentencepiece model that says the same."""
    model, settings = _sentencepiece_model(vocab), _settings(vocab, add_bos=True)
    try:
        return read_model(vocab.path, model, settings, vocab_size)
    except NOT_READ:
        raise CheckpointError(
            f"{vocab.path} is damaged: its {KEY}tokens, scores and token_type are not a sentencepiece "
            "model's, whose pieces differ; download it again"
        ) from None


def _sentencepiece_model(vocab: _Vocab) -> bytes:
    """The model in sentencepiece's own format: sentencepiece_model.proto."""
    types = [int(kind) if NORMAL <= kind <= BYTE else NORMAL for kind in vocab.types]
    if UNKNOWN not in types:
        unknown = vocab.token("unknown_token_id")
        types[0 if unknown is None else vocab.tokens.index(unknown)] = UNKNOWN
    pieces = zip(vocab.tokens, vocab.numbers("scores"), types, strict=True)
    records = []
    for text, score, kind in pieces:
        fields = (
            _field(1, text.encode(errors="replace")) + b"\x15" + struct.pack("<f", score) + _field(3, kind)
        )
        records.append(_field(1, fields))
    # The trainer's settings: BPE, bytes for what is no piece.
    trainer = _field(3, 2) + _field(35, int(BYTE in types))
    prefix = vocab.flag("add_space_prefix") is not False
    rules = _field(1, b"identity") + _field(3, int(prefix)) + _field(4, 0) + _field(5, 1)
    return b"".join(records) + _field(2, trainer) + _field(3, rules)


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return bytes(_varint(number << 3)) + bytes(_varint(value))
    return bytes(_varint(number << 3 | 2)) + bytes(_varint(len(value))) + value


def _varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
