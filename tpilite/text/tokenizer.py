"""Text to ids and back, by the tokenizer files of a model's folder.

Three kinds, told apart by their content: a sentencepiece `tokenizer.model` (Llama 2), a tiktoken
`tokenizer.model` (Llama 3; also in `original/`), and Llama 3's `tokenizer.json` where it stands alone.
All become one `Tokenizer`: a table of each id's bytes, the special tokens by name, and a function that
encodes text in which nothing is special.
"""

import codecs
import logging
import re
from binascii import a2b_base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken

from tpilite.config import read_json
from tpilite.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The special tokens behind Llama 3's BPE ranks, as 3.1 and 3.2 name them; the rest are reserved. Llama
# 3.0 has reserved names for some of these, which then stand in its tokenizer_config.json.
_N_LLAMA3_SPECIALS = 256
_LLAMA3_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_LLAMA3_BOS = "<|begin_of_text|>"
_LLAMA3_EOS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

# tiktoken's pattern overflows its stack on a million spaces in a row (seen with 0.14), and its merging is
# quadratic on long runs in older releases. Llama's own code cuts text at these lengths, so ids stay its.
_MAX_CHARS = 400_000
_MAX_RUN_CHARS = 25_000

# Piece types and fields of the normalizer in sentencepiece_model.proto.
_CONTROL, _USER_DEFINED = 3, 4
_ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 3, 4

# A user-defined piece of this shape is a special token; others (runs of spaces, digits) are text.
_MARKUP = re.compile(r"▁?[<\[].+[>\]]")


class Tokenizer:
    """Text to ids and back, for one model.

    `specials` holds the tokens that text never becomes unless `allow_special` asks for it, and that decoded
    text does not show. `add_bos` says whether the model's prompts begin with BOS. `eos_id` is the token that
    the model's templates call EOS, one of `eos_ids`.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],  # by id; empty for those without text
        encode_plain: Callable[[str], list[int]],
        *,
        vocab_size: int,
        names: "_Names",
        bos: int | None,
        eos: int | None,
        more_eos: Iterable[int] = (),
        add_bos: bool,
        spaced: frozenset[int] = frozenset(),  # tokens that lose one leading space where a text begins
        strip_all: bool = False,  # also the next such token, while there is no text yet
    ) -> None:
        self.specials: Mapping[str, int] = names.specials
        self.special_ids = frozenset(names.specials.values())
        self.bos_id = bos
        self.eos_id = eos
        self.eos_ids = frozenset([*more_eos] if eos is None else [eos, *more_eos])
        self.add_bos = add_bos
        self.n_tokens = len(tokens)
        self.vocab_size = vocab_size
        self.spaced = spaced
        self.strip_all = strip_all
        self._tokens = tokens
        self._encode_plain = encode_plain
        self._words = names.words
        self._find_special = _any_of(names.specials)
        self._find_word = _any_of(names.words)

    def encode(self, text: str, bos: bool = True, allow_special: bool = False) -> list[int]:
        """The ids of `text`, after BOS where the model wants it and `bos` does not forbid it.

        With `allow_special`, the names of special tokens in the text become these tokens.
        """
        ids = [self.bos_id] if bos and self.add_bos and self.bos_id is not None else []
        text = _whole_characters(text)
        for part in self.split_specials(text) if allow_special else [text]:
            if isinstance(part, int):
                ids.append(part)
                continue
            for word in self._find_word.split(part) if self._find_word else [part]:
                word_id = self._words.get(word)
                ids += self._encode_plain(word) if word_id is None else [word_id]
        return ids

    def split_specials(self, text: str) -> list[str | int]:
        """The text with its special tokens' names replaced by their ids, in order."""
        if self._find_special is None:
            return [text]
        return [self.specials.get(part, part) for part in self._find_special.split(text) if part]

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        """The text of `ids`: of their own, or as what follows the text of `after`.

        Bytes that are no UTF-8 become U+FFFD. Raises `ConfigError` for ids outside of the vocabulary.
        """
        decoder = StreamDecoder(self, after)
        return "".join([decoder.add(token_id) for token_id in ids]) + decoder.finish()

    def special(self, name: str) -> int | None:
        """The id of the special token with this name."""
        return self.specials.get(name)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text; empty for special tokens and the vocabulary's unused rows."""
        if 0 <= token_id < self.n_tokens:
            return self._tokens[token_id]
        if 0 <= token_id < self.vocab_size:
            return b""
        raise ConfigError(f"token id {token_id} is outside of the model's vocabulary of {self.vocab_size}")


class StreamDecoder:
    """Text as its ids arrive, in whole characters.

        decoder = StreamDecoder(tokenizer, after=prompt_ids)
        for token_id in new_ids:
            show(decoder.add(token_id))
        show(decoder.finish())

    The pieces add up to `tokenizer.decode(new_ids, after=prompt_ids)`. A sentencepiece text loses the
    space before its first word, which its encoder put there, so a continuation must know that it is one.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True
        for token_id in after:
            self.add(token_id)

    def add(self, token_id: int) -> str:
        """The characters that this token completes. Raises `ConfigError` for an id out of range."""
        token = self._tokenizer.token_bytes(token_id)
        if not token:
            return self.finish()
        if self._at_start:
            if token_id in self._tokenizer.spaced:
                token = token[1:]
            self._at_start = self._tokenizer.strip_all and not token
        return self._utf8.decode(token)

    def finish(self) -> str:
        """What was held back: U+FFFD where the ids ended inside a character."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a model folder; None where it has no tokenizer files.

    Raises `CheckpointError` for damaged files, unsupported kinds, and ids beyond `vocab_size`.
    """
    settings = _Settings.from_folder(folder)
    for path in (folder / "tokenizer.model", folder / "original" / "tokenizer.model"):
        if path.is_file():
            return _from_model_file(path, settings, vocab_size)
    path = folder / "tokenizer.json"
    return _from_json(path, settings, vocab_size) if path.is_file() else None


def _from_model_file(path: Path, settings: "_Settings", vocab_size: int) -> Tokenizer:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if raw.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is only Git LFS's pointer to the tokenizer; run: git lfs pull")
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", raw):
        ranks = _read_ranks(path, raw)
        n = len(ranks)
        names = {n + i: name for i, name in _LLAMA3_SPECIALS.items()}
        reserved = (i for i in range(n, n + _N_LLAMA3_SPECIALS) if i not in names)
        names.update({i: f"<|reserved_special_token_{k}|>" for k, i in enumerate(reserved)})
        published = {i: _AddedToken(name, special=True) for i, name in names.items()}
        _check_fit(path, n + _N_LLAMA3_SPECIALS, vocab_size)
        return _from_ranks(path, ranks, published, settings, vocab_size)
    return _from_sentencepiece(path, raw, settings, vocab_size)


# ---- tiktoken


def _read_ranks(path: Path, raw: bytes) -> dict[bytes, int]:
    """The BPE ranks of a tiktoken file: lines of a token in base64 and its rank, counted from 0."""
    columns = raw.split()
    try:
        ids = list(map(int, columns[1::2]))
        ranks = dict(zip(map(a2b_base64, columns[::2]), ids, strict=True))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); expected lines of a base64 token and its rank; download it again"
        ) from None
    if ids != list(range(len(ranks))):
        raise CheckpointError(
            f"{path} is damaged: {len(ids)} ranks do not count {len(ranks)} tokens from 0; download it again"
        )
    return ranks


def _from_ranks(
    path: Path,
    ranks: dict[bytes, int],
    added: "dict[int, _AddedToken]",
    settings: "_Settings",
    vocab_size: int,
) -> Tokenizer:
    missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
    if missing:
        raise CheckpointError(f"{path} has no token for {missing} of the 256 bytes; download it again")
    n_ranks = len(ranks)
    # The settings' names come last, so that they count where a name is given twice.
    added = {i: token for i, token in added.items() if i not in settings.added}
    added.update({i: token for i, token in settings.added.items() if i >= n_ranks})
    needed = {*_LLAMA3_EOS, settings.bos or _LLAMA3_BOS, settings.eos}
    ends = [i + 1 for i, token in added.items() if token.text in needed]
    _check_fit(path, max([n_ranks, *ends]), vocab_size)
    tokens = [b""] * n_ranks
    for token, rank in ranks.items():
        tokens[rank] = token
    names = _Names.of(added, path, vocab_size)
    specials = names.specials
    encoding = tiktoken.Encoding(path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode_plain(text: str) -> list[int]:
        return [i for piece in _bounded(text) for i in encoding.encode_ordinary(piece)]

    return Tokenizer(
        names.extend(tokens),
        encode_plain,
        vocab_size=vocab_size,
        names=names,
        bos=specials.get(settings.bos or _LLAMA3_BOS, specials.get(_LLAMA3_BOS)),
        eos=specials.get(settings.eos or _LLAMA3_EOS[0], specials.get(_LLAMA3_EOS[0])),
        more_eos=[specials[name] for name in _LLAMA3_EOS if name in specials],
        add_bos=settings.add_bos,
    )


def _bounded(text: str) -> Iterator[str]:
    """The text in pieces that tiktoken can take, cut where Llama's own code cuts."""
    for start in range(0, len(text), _MAX_CHARS):
        chunk = text[start : start + _MAX_CHARS]
        begin = 0
        if len(chunk) > _MAX_RUN_CHARS:
            for run in re.finditer(r"\S+|\s+", chunk):
                for cut in range(run.start() + _MAX_RUN_CHARS, run.end(), _MAX_RUN_CHARS):
                    yield chunk[begin:cut]
                    begin = cut
        yield chunk[begin:]


def _from_json(path: Path, settings: "_Settings", vocab_size: int) -> Tokenizer:
    """Llama 3's tokenizer.json as the tiktoken encoding from which it was made.

    There the order of the ids is the order of the merges (`ignore_merges`), so the merges need no reading.
    """
    whole = read_json(path)
    model, entries = whole.get("model"), whole.get("added_tokens", [])
    if not isinstance(model, dict) or not isinstance(entries, list):
        raise CheckpointError(f"{path} has no model or no list of added_tokens; download it again")
    if model.get("byte_fallback") or model.get("type") == "Unigram":
        raise CheckpointError(
            f"{path} describes a sentencepiece tokenizer, which is read from tokenizer.model only; "
            "download tokenizer.model from where the model came from, into the same folder"
        )
    if not (
        model.get("type") == "BPE"
        and model.get("ignore_merges") is True
        and whole.get("normalizer") is None
        and _is_llama3_split(whole.get("pre_tokenizer"))
    ):
        raise CheckpointError(
            f"{path} is not of the kind of Llama 3 (byte-level BPE with its pattern and ignore_merges), the "
            "only one that is supported; put the model's tokenizer.model beside it"
        )
    added = _read_added(path, ((e.get("id") if isinstance(e, dict) else None, e) for e in entries))
    to_byte = {ord(char): byte for byte, char in enumerate(_byte_characters())}
    try:
        ranks = {
            token.translate(to_byte).encode("latin-1"): rank
            for token, rank in model["vocab"].items()
            if rank not in added
        }
        counted = sorted(ranks.values()) == list(range(len(ranks)))
    except (KeyError, AttributeError, TypeError, UnicodeEncodeError):
        counted = False
    if not counted:
        raise CheckpointError(
            f"{path} is damaged: expected a vocabulary of byte-level BPE tokens counted from 0; "
            "download it again"
        )
    return _from_ranks(path, ranks, added, settings, vocab_size)


def _is_llama3_split(pre_tokenizer: Any) -> bool:
    match pre_tokenizer:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern == LLAMA3_PATTERN
    return False


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE files, as GPT-2 chose them.

    Printable ones stand for themselves, the others for those from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


# ---- sentencepiece


def _from_sentencepiece(path: Path, raw: bytes, settings: "_Settings", vocab_size: int) -> Tokenizer:
    try:
        return _read_sentencepiece(path, raw, settings, vocab_size)
    except (ValueError, IndexError, RuntimeError):
        raise CheckpointError(
            f"{path} is damaged, or neither a sentencepiece nor a tiktoken model; download it again"
        ) from None


def _read_sentencepiece(path: Path, raw: bytes, settings: "_Settings", vocab_size: int) -> Tokenizer:
    """The tokenizer. Raises `ValueError`, `IndexError` or `RuntimeError` where `raw` is no whole model."""
    fields = list(_protobuf(raw))
    records = [value for number, value in fields if number == 1 and isinstance(value, bytes)]
    normalizer = b"".join(value for number, value in fields if number == 3 and isinstance(value, bytes))
    rules = dict(_protobuf(normalizer))
    # The trainer's settings follow the pieces: a file without them ends too early.
    if not records or all(number != 2 for number, _ in fields):
        raise ValueError("no pieces or no settings")
    processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
    n_pieces = processor.get_piece_size()
    pieces = processor.id_to_piece(list(range(n_pieces)))
    added = {}
    for token_id, piece in enumerate(pieces):
        if processor.is_control(token_id) or (
            _MARKUP.fullmatch(piece) and dict(_protobuf(records[token_id])).get(3) == _USER_DEFINED
        ):
            added[token_id] = _AddedToken(piece, special=True)
    _check_fit(path, n_pieces, vocab_size)

    unknown_id = processor.unk_id()
    for token_id, token in settings.added.items():
        # What sentencepiece itself takes for text stays its own; the unknown piece stands for text.
        if token_id >= n_pieces or (token.special and token_id != unknown_id):
            added[token_id] = token
    names = _Names.of(added, path, vocab_size)
    in_text = {i for i in names.specials.values() if i < n_pieces and not processor.is_control(i)}
    if in_text:
        processor = sentencepiece.SentencePieceProcessor(model_proto=_as_control(raw, in_text))

    tokens = [piece.replace("\u2581", " ").encode() for piece in pieces]
    tokens[unknown_id] = processor.decode([unknown_id]).encode()
    for token_id in range(n_pieces):
        if processor.is_byte(token_id):
            tokens[token_id] = bytes.fromhex(pieces[token_id][3:5])  # <0x0A>
        elif processor.is_control(token_id):
            tokens[token_id] = b""
    strip_all = bool(rules.get(_REMOVE_EXTRA_WHITESPACES, 1))
    strips = strip_all or rules.get(_ADD_DUMMY_PREFIX, 1)
    bos = names.specials.get(settings.bos or "", processor.bos_id())
    eos = names.specials.get(settings.eos or "", processor.eos_id())
    return Tokenizer(
        names.extend(tokens),
        processor.encode,
        vocab_size=vocab_size,
        names=names,
        bos=bos if bos >= 0 else None,
        eos=eos if eos >= 0 else None,
        more_eos={processor.eos_id()} - {-1},
        add_bos=settings.add_bos,
        spaced=frozenset(i for i, piece in enumerate(pieces) if strips and piece.startswith("\u2581")),
        strip_all=strip_all,
    )


def _as_control(raw: bytes, ids: set[int]) -> bytes:
    """The sentencepiece model with these pieces made control symbols, which no text can become.

    A protobuf's last value of a field counts, so the new type is appended to the piece's own record.
    """
    model = bytearray()
    token_id = 0
    for number, value in _protobuf(raw):
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} is no message")
        if number == 1:
            if token_id in ids:
                value += bytes([3 << 3, _CONTROL])
            token_id += 1
        model += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(model)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _protobuf(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message, as number and value: an int for a varint, else the bytes.

    Raises `ValueError` or `IndexError` where the bytes are no such message.
    """
    position, end = 0, len(message)
    while position < end:
        key, position = _read_varint(message, position)
        wire_type = key & 7
        if wire_type == 0:
            value, position = _read_varint(message, position)
            yield key >> 3, value
            continue
        if wire_type == 2:
            length, position = _read_varint(message, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"byte {position} begins no field")
        if length > end - position:
            raise ValueError(f"it ends after {end} bytes, inside a field")
        yield key >> 3, message[position : position + length]
        position += length


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError(f"byte {position} is inside a number of more than 64 bits")


# ---- what tokenizer_config.json adds


@dataclass(frozen=True)
class _AddedToken:
    text: str
    special: bool  # otherwise a word like any other, but matched before the rest of the text


@dataclass(frozen=True)
class _Names:
    """The ids of the tokens that are matched by name: special ones, and words."""

    specials: dict[str, int]
    words: dict[str, int]

    @classmethod
    def of(cls, added: Mapping[int, _AddedToken], path: Path, vocab_size: int) -> "_Names":
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
class _Settings:
    """What tokenizer_config.json says; without one, what both Llama 2 and 3 do."""

    add_bos: bool
    bos: str | None
    eos: str | None
    added: dict[int, _AddedToken]

    @classmethod
    def from_folder(cls, folder: Path) -> "_Settings":
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
            token_name(config.get("bos_token")),
            token_name(config.get("eos_token")),
            _read_added(path, (table or {}).items()),
        )


def token_name(value: Any) -> str | None:
    """The name in a tokenizer_config.json's `bos_token` and the like: a string, or an object around it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_added(path: Path, entries: Iterable[tuple[Any, Any]]) -> dict[int, _AddedToken]:
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
        added[number] = _AddedToken(text, bool(special))
    return added


# ---- shared


def _check_fit(path: Path, n_tokens: int, vocab_size: int) -> None:
    if n_tokens > vocab_size:
        raise CheckpointError(
            f"{path} has {n_tokens} tokens, but config.json says vocab_size = {vocab_size}; "
            "use the tokenizer that came with the model"
        )


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of the names, the longest first, and keeps it when splitting."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _whole_characters(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON and command lines can hold, made U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
