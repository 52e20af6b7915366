"""sentencepiece models, of Llama 2's `tokenizer.model` and the like, run by sentencepiece itself."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from tpilite.errors import CheckpointError
from tpilite.text.added_tokens import MARKUP, AddedToken, TokenizerSettings, TokenNames, check_vocabulary
from tpilite.text.tokenizer import Tokenizer

# Piece types and fields of the normalizer in sentencepiece_model.proto.
_CONTROL, _USER_DEFINED = 3, 4
_ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 3, 4

NOT_READ = (ValueError, IndexError, RuntimeError)  # ours, and sentencepiece's


def from_sentencepiece(path: Path, raw: bytes, settings: TokenizerSettings, vocab_size: int) -> Tokenizer:
    """The tokenizer of a sentencepiece model. Raises `CheckpointError` where `raw` is no whole one."""
    try:
        return read_model(path, raw, settings, vocab_size)
    except NOT_READ:
        raise CheckpointError(
            f"{path} is damaged, or neither a sentencepiece nor a tiktoken model; download it again"
        ) from None


def read_model(path: Path, raw: bytes, settings: TokenizerSettings, vocab_size: int) -> Tokenizer:
    """The tokenizer. Raises one of `NOT_READ` where `raw` is no whole model."""
    records, rules = records_and_rules(raw)
    processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
    n_pieces = processor.get_piece_size()
    check_vocabulary(path, n_pieces, vocab_size)
    pieces: list[str] = processor.id_to_piece(list(range(n_pieces)))
    added = {i: AddedToken(pieces[i], special=True) for i in _special_ids(processor, pieces, records)}
    for token_id, token in settings.added.items():
        # What sentencepiece itself takes for text stays its own; the unknown piece stands for text.
        if token_id >= n_pieces or (token.special and token_id != processor.unk_id()):
            added[token_id] = token
    names = TokenNames.of(added, path, vocab_size)
    tokens = _token_bytes(processor, pieces)
    in_text = {i for i in names.specials.values() if i < n_pieces and not processor.is_control(i)}
    prefix_space = settings.prefix_space if rules.get(_ADD_DUMMY_PREFIX, 1) else "never"
    if in_text:
        processor = sentencepiece.SentencePieceProcessor(model_proto=_edited(raw, in_text))
    bare = processor
    if prefix_space != "sentencepiece":
        bare = sentencepiece.SentencePieceProcessor(model_proto=_edited(raw, in_text, add_prefix=False))
    strip_all = bool(rules.get(_REMOVE_EXTRA_WHITESPACES, 1))
    strips = strip_all or prefix_space != "never"

    def encode_plain(text: str, at_start: bool) -> list[int]:
        prefixed = prefix_space == "sentencepiece" or (
            not text.startswith((" ", "\u2581"))
            and (prefix_space == "always" or (prefix_space == "first" and at_start))
        )
        return (processor if prefixed else bare).encode(text)

    specials = names.specials
    bos = specials.get(settings.bos or "", processor.bos_id())
    eos = specials.get(settings.eos or "", processor.eos_id())
    return Tokenizer(
        names.extend(tokens),
        encode_plain,
        vocab_size=vocab_size,
        names=names,
        bos=bos if bos >= 0 else None,
        eos=eos if eos >= 0 else None,
        more_eos={processor.eos_id(), *(specials[name] for name in settings.ends if name in specials)} - {-1},
        add_bos=settings.add_bos is not False,
        add_eos=settings.add_eos is True,
        spaced=frozenset(i for i, piece in enumerate(pieces) if strips and piece.startswith("\u2581")),
        strip_all=strip_all,
        # A normalizer drops spaces; unknown characters in a row are one token, where there are none of bytes.
        is_lossless=not strip_all and any(map(processor.is_byte, range(n_pieces))),
    )


def records_and_rules(raw: bytes) -> tuple[list[bytes], dict[int, int | bytes]]:
    """Each piece's protobuf message, in the order of their ids, and the fields of the normalizer."""
    fields = list(protobuf(raw))
    records = [value for number, value in fields if number == 1 and isinstance(value, bytes)]
    normalizer = b"".join(value for number, value in fields if number == 3 and isinstance(value, bytes))
    # The trainer's settings follow the pieces: a file without them ends too early.
    if not records or all(number != 2 for number, _ in fields):
        raise ValueError("no pieces or no settings")
    return records, dict(protobuf(normalizer))


def _special_ids(
    processor: sentencepiece.SentencePieceProcessor, pieces: Sequence[str], records: Sequence[bytes]
) -> Iterator[int]:
    """The ids of control pieces, and of those that the model's maker defined as markup."""
    for token_id, piece in enumerate(pieces):
        if processor.is_control(token_id) or (
            MARKUP.fullmatch(piece) and dict(protobuf(records[token_id])).get(3) == _USER_DEFINED
        ):
            yield token_id


def _token_bytes(processor: sentencepiece.SentencePieceProcessor, pieces: Sequence[str]) -> list[bytes]:
    """What each piece adds to a text; nothing for control pieces."""
    tokens = [piece.replace("\u2581", " ").encode() for piece in pieces]
    tokens[processor.unk_id()] = processor.decode([processor.unk_id()]).encode()
    for token_id, piece in enumerate(pieces):
        if processor.is_byte(token_id):
            tokens[token_id] = bytes.fromhex(piece[3:5])  # <0x0A>
        elif processor.is_control(token_id):
            tokens[token_id] = b""
    return tokens


def _edited(raw: bytes, control: set[int], add_prefix: bool = True) -> bytes:
    """The sentencepiece model with these pieces made control symbols, which no text can become.

    Without `add_prefix` it puts no space before a text. A protobuf's last value of a field counts, so the new
    values are appended.
    """
    model = bytearray()
    token_id = 0
    for number, value in protobuf(raw):
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} is no message")
        if number == 1:
            if token_id in control:
                value += bytes([3 << 3, _CONTROL])
            token_id += 1
        elif number == 3 and not add_prefix:
            value += bytes([_ADD_DUMMY_PREFIX << 3, 0])
        model += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(model)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def protobuf(message: bytes) -> Iterator[tuple[int, int | bytes]]:
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
