"""Llama 3's `tokenizer.model`: byte-pair ranks in the manner of tiktoken, run by tiktoken itself."""

import re
from binascii import a2b_base64
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from tpilite.errors import CheckpointError
from tpilite.text.added_tokens import (
    TEXT_BEGIN,
    TURN_ENDS,
    AddedToken,
    TokenizerSettings,
    TokenNames,
    check_vocabulary,
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
    0: TEXT_BEGIN,
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}

# tiktoken's pattern overflows its stack on a million spaces in a row (seen with 0.14), and its merging is
# quadratic on long runs in older releases. Llama's own code cuts text at these lengths, so ids stay its.
_MAX_CHARS = 400_000
_MAX_RUN_CHARS = 25_000


def is_tiktoken(raw: bytes) -> bool:
    """Whether a tokenizer.model begins as tiktoken's do."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", raw) is not None


def from_tiktoken(path: Path, raw: bytes, settings: TokenizerSettings, vocab_size: int) -> Tokenizer:
    """The tokenizer of a tokenizer.model of BPE ranks, its special tokens named as Llama 3 was published."""
    ranks = read_ranks(path, raw)
    n = len(ranks)
    published = {n + i: name for i, name in _SPECIALS.items()}
    reserved = (i for i in range(n, n + _N_SPECIALS) if i not in published)
    published.update({i: f"<|reserved_special_token_{k}|>" for k, i in enumerate(reserved)})
    added = {i: AddedToken(name, special=True) for i, name in published.items()}
    # The settings' names come last, so that they count where a name is given twice.
    added = {i: token for i, token in added.items() if i not in settings.added}
    added.update({i: token for i, token in settings.added.items() if i >= n})
    check_vocabulary(path, n + _N_SPECIALS, vocab_size)
    tokens = [b""] * n
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
        bos=specials.get(settings.bos or TEXT_BEGIN, specials.get(TEXT_BEGIN)),
        eos=specials.get(settings.eos or TURN_ENDS[0], specials.get(TURN_ENDS[0])),
        more_eos=[specials[name] for name in settings.ends if name in specials],
        add_bos=settings.add_bos is not False,
        add_eos=settings.add_eos is True,
    )


def read_ranks(path: Path, raw: bytes) -> dict[bytes, int]:
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
    missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
    if missing:
        raise CheckpointError(f"{path} has no token for {missing} of the 256 bytes; download it again")
    return ranks


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
