"""Text to ids and back by either kind of tokenizer: nothing is lost, nothing becomes special."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import N_BPE, derandomized, loaded, write

from tpilite.errors import ConfigError
from tpilite.text.tokenizer import StreamDecoder, Tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
NAMES = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|reserved_special_token_7|>",
]
TRICKY = st.lists(st.sampled_from([*NAMES, "<", "|", ">", "s", " ", "eot_id", "a", "\n"])).map("".join)


def streamed(tokenizer: Tokenizer, ids: list[int], after: list[int] | None = None) -> list[str]:
    decoder = StreamDecoder(tokenizer, after or [])
    return [*(decoder.add(token_id) for token_id in ids), decoder.finish()]


@derandomized
@given(text=TEXTS)
def test_decoding_gives_the_text_back(either: Tokenizer, text: str) -> None:
    if either.spaced:
        text = text.replace("▁", " ")  # sentencepiece's own sign for a space
    assert either.decode(either.encode(text)) == text


def test_half_surrogate_pairs_become_replacement_characters(either: Tokenizer) -> None:
    assert either.decode(either.encode("a\ud83db")) == "a\ufffdb"
    assert either.decode(either.encode("\ud83c\udf0a")) == "🌊"


@derandomized
@given(text=TRICKY)
def test_text_never_becomes_a_special_token(either: Tokenizer, text: str) -> None:
    ids = either.encode(text, bos=False)
    assert not set(either.specials.values()).intersection(ids)
    assert either.decode(ids) == text


@derandomized
@given(parts=st.lists(st.sampled_from(["<s>", "</s>", "<|eot_id|>", "<|begin_of_text|>", "a ", "<|"])))
def test_allowed_names_become_special_tokens(either: Tokenizer, parts: list[str]) -> None:
    ids = either.encode("".join(parts), bos=False, allow_special=True)
    found = [token_id for token_id in ids if token_id in set(either.specials.values())]
    assert found == [either.specials[part] for part in parts if part in either.specials]


@derandomized
@given(data=st.data())
def test_stream_pieces_add_up(data: st.DataObject, either: Tokenizer) -> None:
    ids = data.draw(st.lists(st.integers(0, either.vocab_size - 1)))
    assert "".join(streamed(either, ids)) == either.decode(ids)
    cut = data.draw(st.integers(0, len(ids)))
    after = streamed(either, ids[cut:], after=ids[:cut])
    assert "".join(after) == either.decode(ids[cut:], after=ids[:cut])
    decoder = StreamDecoder(either)
    before = "".join(decoder.add(token_id) for token_id in ids[:cut])
    assert before + "".join(after) == either.decode(ids)


@derandomized
@given(text=st.text("aé日🌊 \n", max_size=20))
def test_streams_never_show_half_a_character(either: Tokenizer, text: str) -> None:
    ids = either.encode(text)
    shown = streamed(either, ids)
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(shown) == text


def test_a_continuation_keeps_its_leading_space(pieces: Tokenizer) -> None:
    ids = pieces.encode("the fox was the fox")
    cut = len(pieces.encode("the fox"))
    assert pieces.decode(ids[cut:]) == "was the fox"
    assert pieces.decode(ids[cut:], after=ids[:cut]) == " was the fox"
    assert pieces.decode(ids[1:], after=ids[:1]) == "the fox was the fox"


def test_ids_end_inside_a_character(either: Tokenizer) -> None:
    ids = either.encode("a🦊", bos=False)
    assert len(ids) > 2
    assert streamed(either, ids[:-1])[-1] == "\ufffd"
    assert either.decode(ids[-1:], after=ids[:-1]) == "🦊"


def test_unused_rows_of_the_vocabulary_have_no_text(tmp_path: Path, plain_model: bytes) -> None:
    tokenizer = loaded(write(tmp_path, plain_model), 448)
    assert tokenizer.n_tokens == 400
    assert tokenizer.decode([400, 447]) == ""


@pytest.mark.parametrize("token_id", [-1, N_BPE, 10**12])
def test_ids_out_of_range_are_refused(either: Tokenizer, token_id: int) -> None:
    with pytest.raises(ConfigError, match=rf"token id {token_id} is outside .* of {either.vocab_size}"):
        either.decode([token_id])
    with pytest.raises(ConfigError, match="outside"):
        StreamDecoder(either).add(token_id)
