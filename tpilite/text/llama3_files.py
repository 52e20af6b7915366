"""Llama 3's tokenizer files: tiktoken's `tokenizer.model`, and the `tokenizer.json` made from it."""

import re
from binascii import a2b_base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tiktoken

from tpilite.errors import CheckpointError
from tpilite.text.added_tokens import (
    AddedToken,
    TokenizerSettings,
    TokenNames,
    check_vocabulary,
    read_json_added,
)
from tpilite.text.tokenizer import Tokenizer

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The special tokens behind Llama 3's BPE ranks, as 3.1 and 3.2 name them; the rest are reserved. Llama
# 3.0 has reserved names for some of these, which then stand in its tokenizer_config.json.
_N_SPECIALS = 256
_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_BOS = "<|begin_of_text|>"
_EOS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

# tiktoken's pattern overflows its stack on a million spaces in a row (seen with 0.14), and its merging is
# quadratic on long runs in older releases. Llama's own code cuts text at these lengths, so ids stay its.
_MAX_CHARS = 400_000
_MAX_RUN_CHARS = 25_000


def is_tiktoken(raw: bytes) -> bool:
    """Whether a tokenizer.model begins as tiktoken's do."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", raw) is not None


def is_llama3_json(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json describes the tiktoken encoding of Llama 3, whatever its vocabulary."""
    model = content["model"]
    match content.get("pre_tokenizer"):
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern == PATTERN:
            return (
                model.get("type") == "BPE"
                and model.get("ignore_merges") is True
                and content.get("normalizer") is None
            )
    return False


def from_tiktoken(path: Path, raw: bytes, settings: TokenizerSettings, vocab_size: int) -> Tokenizer:
    """The tokenizer of a tokenizer.model of BPE ranks, its special tokens named as Llama 3 was published."""
    ranks = _read_ranks(path, raw)
    n = len(ranks)
    names = {n + i: name for i, name in _SPECIALS.items()}
    reserved = (i for i in range(n, n + _N_SPECIALS) if i not in names)
    names.update({i: f"<|reserved_special_token_{k}|>" for k, i in enumerate(reserved)})
    published = {i: AddedToken(name, special=True) for i, name in names.items()}
    check_vocabulary(path, n + _N_SPECIALS, vocab_size)
    return _from_ranks(path, ranks, published, settings, vocab_size)


def from_json(
    path: Path, content: Mapping[str, Any], settings: TokenizerSettings, vocab_size: int
) -> Tokenizer:
    """The tokenizer of Llama 3's tokenizer.json, as the tiktoken encoding from which that was made.

    There the order of the ids is the order of the merges (`ignore_merges`), so the merges need no reading.
    """
    added = read_json_added(path, content)
    to_byte = {ord(char): byte for byte, char in enumerate(_byte_characters())}
    try:
        ranks = {
            token.translate(to_byte).encode("latin-1"): rank
            for token, rank in content["model"]["vocab"].items()
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
    added: dict[int, AddedToken],
    settings: TokenizerSettings,
    vocab_size: int,
) -> Tokenizer:
    """The tokenizer of BPE ranks that are used with Llama 3's pattern, and of tokens added behind them."""
    missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
    if missing:
        raise CheckpointError(f"{path} has no token for {missing} of the 256 bytes; download it again")
    n_ranks = len(ranks)
    # The settings' names come last, so that they count where a name is given twice.
    added = {i: token for i, token in added.items() if i not in settings.added}
    added.update({i: token for i, token in settings.added.items() if i >= n_ranks})
    needed = {*_EOS, settings.bos or _BOS, settings.eos}
    ends = [i + 1 for i, token in added.items() if token.text in needed]
    check_vocabulary(path, max([n_ranks, *ends]), vocab_size)
    tokens = [b""] * n_ranks
    for token, rank in ranks.items():
        tokens[rank] = token
    names = TokenNames.of(added, path, vocab_size)
    specials = names.specials
    encoding = tiktoken.Encoding(path.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode_plain(text: str, _: bool) -> list[int]:
        return [i for piece in _bounded(text) for i in encoding.encode_ordinary(piece)]

    return Tokenizer(
        names.extend(tokens),
        encode_plain,
        vocab_size=vocab_size,
        names=names,
        bos=specials.get(settings.bos or _BOS, specials.get(_BOS)),
        eos=specials.get(settings.eos or _EOS[0], specials.get(_EOS[0])),
        more_eos=[specials[name] for name in _EOS if name in specials],
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


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE files, as GPT-2 chose them.

    Printable ones stand for themselves, the others for those from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
