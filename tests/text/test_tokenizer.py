"""Tokenizers against sentencepiece's, tiktoken's and Hugging Face tokenizers' own results."""

import base64
import contextlib
import io
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.errors import CheckpointError, ConfigError
from tpilite.text import tokenizer as module
from tpilite.text.tokenizer import LLAMA3_PATTERN, StreamDecoder, Tokenizer, load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizer"
N_BPE = 400 + 256
N_SENTENCEPIECE = 400
SENTENCES = [
    "Once upon a time there was a little fox who lived by the river.",
    "The fox was not afraid of the water, and the water was not afraid of the fox.",
    "One day the hare asked: where does the river end? It ends in the sea, said the fox!",
    "They walked and walked, 12 days and 345 steps, until they saw the big blue sea.",
] * 5
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

derandomized = settings(derandomize=True, deadline=None, max_examples=150)


def train(**options: object) -> bytes:
    """A sentencepiece model in the manner of Llama 2's, of 400 pieces."""
    model = io.BytesIO()
    arguments: dict[str, object] = {
        "vocab_size": N_SENTENCEPIECE,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, **{**arguments, **options}
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def plain_model() -> bytes:
    return train()


@pytest.fixture(scope="module")
def marked_model() -> bytes:
    return train(user_defined_symbols=["<|im_start|>", "fox"], control_symbols=["<|im_end|>"])


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bpe")
    shutil.copy(FIXTURES / "tokenizer.model", folder)
    return loaded(folder, N_BPE)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory, plain_model: bytes) -> Tokenizer:
    return loaded(write(tmp_path_factory.mktemp("sentencepiece"), plain_model), N_SENTENCEPIECE)


@pytest.fixture(scope="module", params=["bpe", "pieces"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def write(folder: Path, model: bytes, **config: object) -> Path:
    """`folder` with this tokenizer.model, and tokenizer_config.json where `config` is given."""
    (folder / "tokenizer.model").write_bytes(model)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path, vocab_size: int) -> Tokenizer:
    tokenizer = load_tokenizer(folder, vocab_size)
    assert tokenizer is not None
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int], after: list[int] | None = None) -> list[str]:
    decoder = StreamDecoder(tokenizer, after or [])
    return [*(decoder.add(token_id) for token_id in ids), decoder.finish()]


def same_damage(text: str) -> str:
    """The text with each run of U+FFFD as one: how many stand for some bad bytes is nobody's standard."""
    return re.sub("\ufffd+", "\ufffd", text)


# ---- text to ids


def test_sentencepiece_gives_its_own_ids_after_bos(pieces: Tokenizer, plain_model: bytes) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=plain_model)
    for text in (*SENTENCES[:4], "", " ", "  two  spaces ", "日本 🌊\n\tx", "nul\0byte"):
        assert pieces.encode(text) == [reference.bos_id(), *reference.encode(text)]


def test_json_alone_gives_the_ids_of_hugging_face(tmp_path: Path, bpe: Tokenizer) -> None:
    shutil.copy(FIXTURES / "tokenizer.json", tmp_path)
    tokenizer = loaded(tmp_path, 512)
    expected = json.loads((FIXTURES / "expected.json").read_text())
    assert len(expected) == 8
    for text, ids in expected:
        assert tokenizer.encode(text, bos=False) == ids
        assert bpe.encode(text, bos=False) == ids
    assert tokenizer.specials == {"<|begin_of_text|>": 400, "<|end_of_text|>": 401, "<|eot_id|>": 402}
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.n_tokens) == (400, {401, 402}, 403)


@derandomized
@given(text=TEXTS)
def test_decoding_gives_the_text_back(either: Tokenizer, text: str) -> None:
    if either.spaced:
        text = text.replace("▁", " ")  # sentencepiece's own sign for a space
    assert either.decode(either.encode(text)) == text


def test_half_surrogate_pairs_become_replacement_characters(either: Tokenizer) -> None:
    assert either.decode(either.encode("a\ud83db")) == "a\ufffdb"
    assert either.decode(either.encode("\ud83c\udf0a")) == "🌊"


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


def test_the_real_llama_3(shared_tokenizers: Path) -> None:
    tokenizer = loaded(shared_tokenizers / "llama3", 128256)
    assert (tokenizer.n_tokens, tokenizer.bos_id) == (128256, 128000)
    assert tokenizer.eos_ids == {128001, 128008, 128009}
    published = {
        "<|finetune_right_pad_id|>": 128004,
        "<|reserved_special_token_2|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_247|>": 128255,
    }
    assert {name: tokenizer.special(name) for name in published} == published
    assert tokenizer.encode("Hello world") == [128000, 9906, 1917]
    text = "größer 🌊  日本\n\n\tx = [1, 2] <|eot_id|> I'LL 1234567"
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- special tokens


@derandomized
@given(text=TRICKY)
def test_text_never_becomes_a_special_token(either: Tokenizer, text: str) -> None:
    ids = either.encode(text, bos=False)
    assert not either.special_ids.intersection(ids)
    assert either.decode(ids) == text


@derandomized
@given(parts=st.lists(st.sampled_from(["<s>", "</s>", "<|eot_id|>", "<|begin_of_text|>", "a ", "<|"])))
def test_allowed_names_become_special_tokens(either: Tokenizer, parts: list[str]) -> None:
    ids = either.encode("".join(parts), bos=False, allow_special=True)
    found = [token_id for token_id in ids if token_id in either.special_ids]
    assert found == [either.specials[part] for part in parts if part in either.specials]


def test_user_defined_markup_is_special_and_other_user_defined_pieces_are_text(
    tmp_path: Path, marked_model: bytes
) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=marked_model)
    start, end = reference.piece_to_id("<|im_start|>"), reference.piece_to_id("<|im_end|>")
    text = "the <|im_start|>fox<|im_end|>"
    assert start in reference.encode(text)
    tokenizer = loaded(write(tmp_path, marked_model), N_SENTENCEPIECE)
    assert tokenizer.special_ids == {1, 2, start, end}
    ids = tokenizer.encode(text, bos=False)
    assert not tokenizer.special_ids.intersection(ids)
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


def test_tokenizer_config_names_and_adds_tokens(tmp_path: Path, plain_model: bytes) -> None:
    added = {
        "0": {"content": "<unk>", "special": True},
        "2": {"content": "</s>", "special": True},
        "400": {"content": "<|im_end|>", "special": True},
        "401": {"content": "<think>", "special": False},
        "402": {"content": "<|im_end|>!", "special": True},
    }
    folder = write(tmp_path, plain_model, added_tokens_decoder=added, eos_token={"content": "<|im_end|>"})
    tokenizer = loaded(folder, 403)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 400, {2, 400})
    assert tokenizer.n_tokens == 403
    assert tokenizer.special("<unk>") is None
    assert tokenizer.decode([0]) == " \u2047 "  # the unknown piece stands for text, as sentencepiece shows it
    assert tokenizer.encode("<|im_end|>!<|im_end|>", bos=False, allow_special=True) == [402, 400]
    ids = tokenizer.encode("fox<think><|im_end|>", bos=False)
    assert ids.count(401) == 1
    assert 400 not in ids
    assert tokenizer.decode(ids) == "fox<think> <|im_end|>"
    assert tokenizer.decode([400, 401, 400]) == "<think>"


def test_reserved_names_of_llama_3_come_from_tokenizer_config(tmp_path: Path) -> None:
    added = {"408": {"content": "<|reserved_special_token_4|>", "special": True}}
    folder = write(tmp_path, (FIXTURES / "tokenizer.model").read_bytes(), added_tokens_decoder=added)
    tokenizer = loaded(folder, N_BPE)
    assert tokenizer.special("<|eom_id|>") is None
    assert tokenizer.special("<|reserved_special_token_4|>") == 408
    assert tokenizer.eos_ids == {401, 409}


def test_added_tokens_beyond_the_vocabulary_are_left_out(
    tmp_path: Path, plain_model: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, plain_model)
    (folder / "added_tokens.json").write_text('{"<pad>": 400}')
    with caplog.at_level(logging.WARNING):
        tokenizer = loaded(folder, 400)
    assert tokenizer.special("<pad>") is None
    assert "<pad>" in caplog.text
    assert loaded(folder, 401).special("<pad>") == 400


@pytest.mark.parametrize(
    ("config", "with_bos"),
    [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False), ({"x": 1}, True)],
)
def test_bos_as_the_config_says(
    tmp_path: Path, plain_model: bytes, config: dict[str, object], with_bos: bool
) -> None:
    tokenizer = loaded(write(tmp_path, plain_model, **config), 400)
    assert tokenizer.encode("")[:1] == ([1] if with_bos else [])
    assert tokenizer.encode("", bos=False) == []


def test_a_model_without_bos_has_none(tmp_path: Path) -> None:
    tokenizer = loaded(write(tmp_path, train(bos_id=-1)), 400)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("") == []


# ---- ids to text


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


@derandomized
@given(ids=st.lists(st.integers(0, N_BPE - 1)))
def test_decoding_is_tiktokens_own(ids: list[int], bpe: Tokenizer) -> None:
    lines = (FIXTURES / "tokenizer.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    reference = tiktoken.Encoding(
        "reference", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    runs: list[list[int]] = [[]]  # tiktoken shows special tokens; ours end a character and are not shown
    for token_id in ids:
        if token_id < 400:
            runs[-1].append(token_id)
        else:
            runs.append([])
    assert bpe.decode(ids) == "".join(map(reference.decode, runs))


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


# ---- long texts


def cut_by_counting(text: str, max_run: int) -> Iterator[str]:
    """The text cut where more than `max_run` characters of one kind, space or not, follow each other."""
    start = run = 0
    for i, character in enumerate(text):
        run = run + 1 if i > start and character.isspace() == text[i - 1].isspace() else 1
        if run > max_run:
            yield text[start:i]
            start, run = i, 1
    yield text[start:]


@derandomized
@given(text=st.text("ab  \n\u3000\x1c", max_size=60))
def test_long_runs_are_cut_as_llamas_code_cuts_them(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MAX_CHARS", 17)
        patch.setattr(module, "_MAX_RUN_CHARS", 3)
        chunks = [text[i : i + 17] for i in range(0, len(text), 17)]
        assert list(module._bounded(text)) == [
            piece for chunk in chunks for piece in cut_by_counting(chunk, 3)
        ]


@pytest.mark.parametrize("character", ["a", " ", "\n"])
def test_a_million_equal_characters(bpe: Tokenizer, character: str) -> None:
    text = character * 1_000_000
    assert bpe.decode(bpe.encode(text)) == text


# ---- which files, and damaged ones


def test_no_tokenizer_files(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path, 100) is None


def test_the_original_folder_and_its_precedence(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    shutil.copy(FIXTURES / "tokenizer.model", tmp_path / "original")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert loaded(tmp_path, N_BPE).n_tokens == N_BPE


def refused(folder: Path, vocab_size: int, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(folder, vocab_size)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, plain_model: bytes) -> None:
    refused(write(tmp_path, plain_model), 399, "has 400 tokens, but config.json says vocab_size = 399")
    refused(write(tmp_path, (FIXTURES / "tokenizer.model").read_bytes()), N_BPE - 1, f"has {N_BPE} tokens")
    (tmp_path / "tokenizer.model").unlink()
    shutil.copy(FIXTURES / "tokenizer.json", tmp_path)
    refused(tmp_path, 402, "has 403 tokens")


def test_a_message_cut_anywhere_has_no_more_fields_than_before_the_cut() -> None:
    message = b"\x0a\x03abc" + b"\x18\x96\x01" + b"\x15\x00\x00\x80\x3f" + b"\x12\x00"
    whole = [(1, b"abc"), (3, 150), (2, b"\x00\x00\x80\x3f"), (2, b"")]
    ends = {0: 0, 5: 1, 8: 2, 13: 3, 15: 4}
    for length in range(16):
        if length in ends:
            assert list(module._protobuf(message[:length])) == whole[: ends[length]]
        else:
            with pytest.raises((ValueError, IndexError)):
                list(module._protobuf(message[:length]))


def test_a_sentencepiece_model_cut_anywhere_is_refused(
    tmp_path: Path, plain_model: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    for length in range(0, len(plain_model), 37):
        refused(write(tmp_path, plain_model[:length]), 400, "damaged")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"PK\x03\x04 something else entirely", "neither a sentencepiece nor a tiktoken model"),
        (b"IQ== 0\nIg== 1\nIw==", "damaged"),
        (b"IQ== 0\nIg== 2\n", "damaged: 2 ranks do not count 2 tokens from 0"),
        (b"IQ== 0\nIQ== 1\n", "damaged: 2 ranks do not count 1 tokens"),
        (b"IQ== 0\nI 1\n", "damaged"),
        (b"IQ== 0\nIg== one\n", "damaged"),
        (b"IQ== 0\nIg== 1\n", "no token for 254 of the 256 bytes"),
    ],
)
def test_a_damaged_model_is_refused(tmp_path: Path, model: bytes, words: str) -> None:
    refused(write(tmp_path, model), 1000, words)


@derandomized
@given(data=st.data())
def test_damage_never_escapes_as_anything_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, plain_model: bytes
) -> None:
    model = bytearray(data.draw(st.sampled_from([plain_model, (FIXTURES / "tokenizer.model").read_bytes()])))
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    folder = write(tmp_path_factory.mktemp("damaged", numbered=True), bytes(model))
    with contextlib.suppress(CheckpointError):
        load_tokenizer(folder, 1000)


def changed_json(**changes: object) -> str:
    whole = json.loads((FIXTURES / "tokenizer.json").read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = whole
        for parent in parents:
            place = place[parent]
        place[key] = value
    return json.dumps(whole)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "no model"),
        (changed_json(model__byte_fallback=True), "download tokenizer.model"),
        (changed_json(model__type="Unigram"), "download tokenizer.model"),
        (changed_json(model__type="WordPiece"), "not of the kind of Llama 3"),
        (changed_json(model__ignore_merges=False), "not of the kind of Llama 3"),
        (changed_json(normalizer={"type": "NFC"}), "not of the kind of Llama 3"),
        (changed_json(pre_tokenizer=None), "not of the kind of Llama 3"),
        (changed_json(model__vocab=None), "damaged"),
        (changed_json(model__vocab={"a": 0, "b": "1"}), "damaged"),
        (changed_json(model__vocab={"a": 0, "b": 2}), "damaged"),
        (changed_json(model__vocab={"a": 0, "漢": 1}), "damaged"),
        (changed_json(model__vocab={"a": 0, "b": 1}), "no token for 254"),
        (changed_json(added_tokens={}), "no list of added_tokens"),
        (changed_json(added_tokens=[{"content": "x"}]), "added token"),
        (changed_json(added_tokens=[{"id": -4, "content": "x"}]), "added token"),
        (changed_json(added_tokens=["x"]), "added token"),
    ],
)
def test_json_of_another_kind_or_damaged_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    refused(tmp_path, 1000, words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"add_bos_token": "yes"}, "add_bos_token"),
        ({"added_tokens_decoder": [1]}, "no object"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, "added token"),
        ({"added_tokens_decoder": {"1": {"content": ""}}}, "added token"),
        ({"added_tokens_decoder": {"1": "y"}}, "added token"),
    ],
)
def test_damaged_settings_are_refused(
    tmp_path: Path, plain_model: bytes, config: dict[str, object], words: str
) -> None:
    refused(write(tmp_path, plain_model, **config), 1000, words)
