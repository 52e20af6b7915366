"""The model that ships: its files are what they claim to be, and the grammar that made its text is sound."""

import hashlib
import importlib
import itertools
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tpilite" / "shipped" / "fable"
MAX_BYTES = 4_000_000


@pytest.fixture(scope="module")
def grammar() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools" / "fable"))
        yield importlib.import_module("grammar")


@pytest.fixture(scope="module")
def stories(grammar: ModuleType) -> list[str]:
    return list(itertools.islice(grammar.stories(7), 400))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))


def test_same_seed_tells_the_same_stories_on_every_python(grammar: ModuleType) -> None:
    """Another digest is another training text: the weights would no longer come from this repository."""
    text = "\n".join(itertools.islice(grammar.stories(1), 200))
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "f4e9320cd09d1b07d939e1eb616d19b38d0318358c4f2fb08c733873ae3d2cfe"
    )


def test_another_seed_tells_others(grammar: ModuleType, stories: list[str]) -> None:
    assert not set(stories) & set(itertools.islice(grammar.stories(8), 400))
    assert len(set(stories)) == len(stories)


def test_stories_are_well_formed(stories: list[str]) -> None:
    for story in stories:
        assert not re.search(r"[][{}|]|  |\n|[.,] ?[.,]", story), (
            story
        )  # marks of the grammar, empty alternatives
        assert re.search(r'[.!?]"?$', story), story
        assert story.count('"') % 2 == 0, story
        assert not re.search(r'(?:^"?|[.!?] "?)[a-z]', story), story  # every sentence has its capital letter
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", story), story
        assert not re.search(r"\b(\w+) \1\b", story), story
        assert not re.search(r"\b(they|[Ww]e) (was|am)\b|\b(he|she|I) (were|are)\b", story), story
        assert 40 <= len(story.split()) <= 250, story


def test_a_story_keeps_its_hero_from_the_first_sentence_to_the_last(stories: list[str]) -> None:
    """A named child who opens the story is there in its second half too."""
    checked = 0
    for story in stories:
        opened = re.match(
            r"(?:Once upon a time,? )?[Tt]here was (?:once )?a (?:\w+ )?(?:girl|boy) \w+ (\w+)\.", story
        )
        if opened:
            checked += 1
            assert opened[1] in story[len(story) // 2 :], story
    assert checked > 10


def test_folder_holds_a_whole_model_within_its_size() -> None:
    names = {path.name for path in MODEL.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= MAX_BYTES


def test_config_has_grouped_kv_heads_that_clusters_can_split() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["head_dim"] % 2 == 0
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]


def test_weights_are_bfloat16_of_the_shapes_that_the_config_tells() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    with (MODEL / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    expected = {"model.norm.weight": [hidden]}
    expected |= {
        name: [config["vocab_size"], hidden] for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
            "self_attn.q_proj": [queries, hidden],
            "self_attn.k_proj": [keys, hidden],
            "self_attn.v_proj": [keys, hidden],
            "self_attn.o_proj": [hidden, queries],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
        }
        expected |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    assert {name: tensor["shape"] for name, tensor in header.items()} == expected
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}


def test_tokenizer_fits_the_config_and_begins_as_llama_2(tokenizer: Any) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert tokenizer.get_piece_size() == config["vocab_size"]
    assert (
        (tokenizer.bos_id(), tokenizer.eos_id()) == (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    )
    assert tokenizer.is_unknown(0)
    assert all(tokenizer.is_byte(3 + value) for value in range(256))


def test_tokenizer_gives_back_stories_and_foreign_text(tokenizer: Any, stories: list[str]) -> None:
    foreign = ["", "Zürich: 東京 & 🦊!", "two  spaces\nand\ttabs", "".join(map(chr, range(33, 127)))]
    for text in [*stories[:50], *foreign]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    n_ids = sum(len(tokenizer.encode(story)) for story in stories)
    assert n_ids < 1.6 * sum(len(story.split()) for story in stories)
