"""sentencepiece models as tokenizers, against sentencepiece's own results; and damaged ones."""

import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import N_SENTENCEPIECE, SENTENCES, derandomized, loaded, refused, train, write

from tpilite.text import sentencepiece_files
from tpilite.text.tokenizer import Tokenizer


def same_damage(text: str) -> str:
    """The text with each run of U+FFFD as one: how many stand for some bad bytes is nobody's standard."""
    return re.sub("\ufffd+", "\ufffd", text)


@pytest.fixture(scope="module")
def marked_model() -> bytes:
    return train(user_defined_symbols=["<|im_start|>", "fox"], control_symbols=["<|im_end|>"])


def test_sentencepiece_gives_its_own_ids_after_bos(pieces: Tokenizer, plain_model: bytes) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=plain_model)
    for text in (*SENTENCES[:4], "", " ", "  two  spaces ", "日本 🌊\n\tx", "nul\0byte"):
        assert pieces.encode(text) == [reference.bos_id(), *reference.encode(text)]


def test_the_real_llama_2(shared_tokenizers: Path) -> None:
    tokenizer = loaded(shared_tokenizers / "llama2", 32000)
    assert (tokenizer.n_tokens, tokenizer.bos_id, tokenizer.eos_ids) == (32000, 1, {2})
    assert tokenizer.specials == {"<s>": 1, "</s>": 2}
    assert tokenizer.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]
    path = str(shared_tokenizers / "llama2" / "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=path)
    text = "größer 🌊  日本\n\n\tx = [1, 2]</s> <0x0A>"
    assert tokenizer.encode(text, bos=False) == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_model_without_bos_has_none(tmp_path: Path) -> None:
    tokenizer = loaded(write(tmp_path, train(bos_id=-1)), 400)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("") == []


def test_user_defined_markup_is_special_and_other_user_defined_pieces_are_text(
    tmp_path: Path, marked_model: bytes
) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=marked_model)
    start, end = reference.piece_to_id("<|im_start|>"), reference.piece_to_id("<|im_end|>")
    text = "the <|im_start|>fox<|im_end|>"
    assert start in reference.encode(text)
    tokenizer = loaded(write(tmp_path, marked_model), N_SENTENCEPIECE)
    assert set(tokenizer.specials.values()) == {1, 2, start, end}
    ids = tokenizer.encode(text, bos=False)
    assert not set(tokenizer.specials.values()).intersection(ids)
    assert reference.piece_to_id("fox") in ids
    assert tokenizer.decode(ids) == text
    ids = tokenizer.encode(text, bos=False, allow_special=True)
    assert start in ids
    assert end in ids
    assert tokenizer.decode(ids) == "the  fox"  # each part between special tokens gets its leading space


def test_normalization_cannot_make_a_special_token(tmp_path: Path) -> None:
    model = train(normalization_rule_name="nfkc", user_defined_symbols=["<|im_start|>"])
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    wide = "\uff1c\uff5cim_start\uff5c\uff1e"  # NFKC makes these <|im_start|>
    tokenizer = loaded(write(tmp_path, model), N_SENTENCEPIECE)
    start = tokenizer.specials["<|im_start|>"]
    assert start in reference.encode(wide)
    assert start not in tokenizer.encode(wide)


@derandomized
@given(data=st.data())
def test_decoding_is_sentencepieces_own(data: st.DataObject, pieces: Tokenizer, plain_model: bytes) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=plain_model)
    ids = data.draw(st.lists(st.integers(0, N_SENTENCEPIECE - 1)))
    assert same_damage(pieces.decode(ids)) == same_damage(reference.decode(ids))


@pytest.mark.parametrize("remove_extra_whitespaces", [False, True])
@pytest.mark.parametrize("add_dummy_prefix", [False, True])
def test_leading_spaces_are_stripped_as_sentencepiece_does(
    tmp_path: Path, add_dummy_prefix: bool, remove_extra_whitespaces: bool
) -> None:
    model = train(add_dummy_prefix=add_dummy_prefix, remove_extra_whitespaces=remove_extra_whitespaces)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = loaded(write(tmp_path, model), N_SENTENCEPIECE)
    space, fox, byte = (reference.piece_to_id(piece) for piece in ("▁", "▁fox", "<0x20>"))
    assert reference.unk_id() not in (space, fox)
    for ids in (
        [fox, fox],
        [space, space, fox],
        [1, space, fox],
        [byte, fox],
        [space, 1, byte, space],
        [0, fox],
    ):
        assert tokenizer.decode(ids) == reference.decode(ids), ids


def test_a_message_cut_anywhere_has_no_more_fields_than_before_the_cut() -> None:
    message = b"\x0a\x03abc" + b"\x18\x96\x01" + b"\x15\x00\x00\x80\x3f" + b"\x12\x00"
    whole = [(1, b"abc"), (3, 150), (2, b"\x00\x00\x80\x3f"), (2, b"")]
    ends = {0: 0, 5: 1, 8: 2, 13: 3, 15: 4}
    for length in range(16):
        if length in ends:
            assert list(sentencepiece_files.protobuf(message[:length])) == whole[: ends[length]]
        else:
            with pytest.raises((ValueError, IndexError)):
                list(sentencepiece_files.protobuf(message[:length]))


def test_a_sentencepiece_model_cut_anywhere_is_refused(
    tmp_path: Path, plain_model: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    for length in range(0, len(plain_model), 37):
        refused(write(tmp_path, plain_model[:length]), 400, "damaged")
    assert capfd.readouterr().err == ""
