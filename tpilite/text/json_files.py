"""A `tokenizer.json` of byte-pair encoding, as the library `tokenizers` writes and runs it.

Its parts are read for what they say, whatever the model's name: added tokens, normalizer, pre_tokenizer,
model, decoder, and of the post_processor whether BOS and EOS stand around a text. What is not understood is
an error that names it. Ids are those of `tokenizers`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpilite.errors import CheckpointError
from tpilite.text.added_tokens import (
    TEXT_BEGIN,
    AddedToken,
    TokenizerSettings,
    TokenNames,
    check_vocabulary,
)
from tpilite.text.bpe import BytePairs, spaced_words, word_encoder
from tpilite.text.decoders import read_decoder
from tpilite.text.normalizers import keeps_all, read_normalizer
from tpilite.text.parts import Part
from tpilite.text.pretokenizers import BYTE_CHARACTERS, PreTokenizer, to_byte_characters
from tpilite.text.tokenizer import Tokenizer

# Between the two tokens of a merge where tokens hold spaces: no character, and so in no token.
_NO_CHARACTER = "\U0010ffff"
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def from_json(
    path: Path,
    content: Mapping[str, Any],
    settings: TokenizerSettings,
    vocab_size: int,
    model_name: str = "model",
) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes. Raises `CheckpointError` for damage and other kinds.

    `model_name` is how messages call its model.
    """
    normalizer = _part(path, content, "normalizer")
    pre_tokenizer = PreTokenizer(_part(path, content, "pre_tokenizer"))
    pairs = _read_model(Part.of(path, model_name, content.get("model")), vocab_size)
    added = _placed(path, settings.added, pairs.vocab)
    around = _read_post_processor(_part(path, content, "post_processor"))
    needed = {*settings.ends, settings.bos, settings.eos}
    ends = [i for i, token in added.items() if token.text in needed]
    check_vocabulary(path, max([*ends, around.before or 0, around.after or 0]) + 1, vocab_size)
    names = TokenNames.of(added, path, vocab_size)
    decoder = read_decoder(_part(path, content, "decoder"))
    tokens = [b""] * (max(pairs.vocab.values()) + 1)
    for token, token_id in pairs.vocab.items():
        tokens[token_id] = decoder.token_bytes(token)
    tokens = names.extend(tokens)
    specials = names.specials
    ends = [specials[name] for name in settings.ends if name in specials]
    begin = specials.get(TEXT_BEGIN) if around.before is None else around.before
    ids = {**pairs.vocab, **specials}
    return Tokenizer(
        tokens,
        _plain_encoder(pre_tokenizer, pairs),
        vocab_size=vocab_size,
        names=names,
        bos=ids.get(settings.bos or "", begin),
        eos=ids.get(settings.eos or "", next(iter(ends), around.after)),
        more_eos=ends,
        add_bos=around.before is not None if settings.add_bos is None else settings.add_bos,
        add_eos=around.after is not None if settings.add_eos is None else settings.add_eos,
        normalize=read_normalizer(normalizer),
        spaced=frozenset(i for i, token in enumerate(tokens) if decoder.strips_space and token[:1] == b" "),
        is_lossless=pre_tokenizer.keeps_all
        and keeps_all(normalizer)
        and _knows_bytes(pairs, pre_tokenizer.is_byte_level),
    )


def _part(path: Path, content: Mapping[str, Any], name: str) -> Part | None:
    value = content.get(name)
    return None if value is None else Part.of(path, name, value)


def _read_model(part: Part, vocab_size: int) -> BytePairs:
    if part.fields.get("type", "BPE") != "BPE":
        part.refuse(f"the type {part.fields['type']!r}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if part.fields.get(key):
            part.refuse(f"{key} = {part.fields[key]!r}")
    vocab = _read_vocab(part, vocab_size)
    unknown = None if part.fields.get("unk_token") is None else part.text("unk_token")
    if unknown is not None and unknown not in vocab:
        part.damaged(f"an unk_token {unknown[:40]!r} that is not in its vocabulary")
    ranks, separator = _read_merges(part, vocab)
    return BytePairs(
        vocab,
        ranks,
        separator,
        unknown,
        fuse_unknown=part.flag("fuse_unk", False),
        byte_fallback=part.flag("byte_fallback", False),
        whole_tokens=part.flag("ignore_merges", False),
    )


def _read_vocab(part: Part, vocab_size: int) -> dict[str, int]:
    vocab = part.fields.get("vocab")
    if not isinstance(vocab, dict) or set(map(type, vocab.values())) != {int} or min(vocab.values()) < 0:
        part.damaged("no vocabulary of tokens and their ids")
    ids = set(vocab.values())
    if len(ids) != len(vocab):
        part.damaged(f"one id for several of its {len(vocab)} tokens")
    check_vocabulary(part.path, max(ids) + 1, vocab_size)
    return vocab


def _read_merges(part: Part, vocab: Mapping[str, int]) -> tuple[dict[str, int], str]:
    """The rank of each merge by its two tokens, and what stands between these.

    A file has ["a b", ...] or, where tokens hold spaces too, [["a", "b"], ...].
    """
    merges = part.fields.get("merges")
    if not isinstance(merges, list) or not merges:
        part.damaged("no merges")
    separator = " "
    if isinstance(merges[0], list):
        if any(" " in token for token in vocab):
            separator = _NO_CHARACTER
        merges = [
            separator.join(pair) if isinstance(pair, list) and set(map(type, pair)) == {str} else pair
            for pair in merges
        ]
    for merge in merges:
        left, _, right = merge.partition(separator) if isinstance(merge, str) else ("", "", "")
        if left not in vocab or right not in vocab or left + right not in vocab:
            part.damaged(f"the merge {str(merge)[:60]!r}, which does not make one token of two")
    return dict(zip(merges, range(len(merges)), strict=True)), separator


def _knows_bytes(pairs: BytePairs, is_byte_level: bool) -> bool:
    """Whether there is a token for each byte of a text. What is without one is left out of it."""
    if is_byte_level:
        return all(char in pairs.vocab for char in BYTE_CHARACTERS)
    return pairs.byte_fallback and all(token in pairs.vocab for token in _BYTE_TOKENS)


def _placed(path: Path, added: Mapping[int, AddedToken], vocab: Mapping[str, int]) -> dict[int, AddedToken]:
    """The added tokens by the ids that they have: the vocabulary's, where it holds them too."""
    taken = set(vocab.values())
    for token_id, token in added.items():
        if token_id in taken and token.text not in vocab:
            raise CheckpointError(
                f"{path} has the added token {token.text[:40]!r} with the id {token_id}, which is another "
                "token's; download it again"
            )
    return {vocab.get(token.text, token_id): token for token_id, token in added.items()}


@dataclass(frozen=True)
class _Around:
    """The ids that stand around a text."""

    before: int | None = None
    after: int | None = None


def _read_post_processor(part: Part | None) -> _Around:
    around = _Around()
    for step in part.steps("processors") if part else ():
        if step.kind == "TemplateProcessing":
            around = _read_template(step)
        elif step.kind != "ByteLevel":  # that one concerns the places of tokens in a text alone
            step.refuse(f"{step.kind!r}")
    return around


def _read_template(part: Part) -> _Around:
    rows: list[list[int]] = [[]]  # what stands before the text, and behind it
    try:
        for item in part.fields["single"]:
            if "SpecialToken" in item:
                rows[-1] += part.fields["special_tokens"][item["SpecialToken"]["id"]]["ids"]
            else:
                rows.append([])
        before, after = rows
        if set(map(type, before + after)) - {int} or min(before + after, default=0) < 0:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        part.damaged("a template that cannot be read")
    if len(before) > 1 or len(after) > 1:
        part.refuse(f"{len(before)} tokens before a text and {len(after)} behind it")
    return _Around(next(iter(before), None), next(iter(after), None))


def _plain_encoder(pre_tokenizer: PreTokenizer, pairs: BytePairs) -> Callable[[str, bool], list[int]]:
    split = pre_tokenizer.split
    if pre_tokenizer.maps_bytes:
        encode = word_encoder(lambda piece: pairs.encode(to_byte_characters(piece)))
        return lambda text, at_start: encode(split(text, at_start))
    encode = word_encoder(pairs.encode)
    if not pairs.words_stay_apart():
        return lambda text, at_start: encode(split(text, at_start))
    return lambda text, at_start: encode(
        [word for piece in split(text, at_start) for word in spaced_words(piece)]
    )
