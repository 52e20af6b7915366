"""A GGUF file wherever a folder runs: several ranks, their slices, a worker with its own file, paging."""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import gguf_config, write_gguf_model
from nodes import Cluster, Nodes, Story
from sentencepiece import SentencePieceProcessor

from tpilite import LLM, SamplingParams
from tpilite.shipped import SHIPPED
from tpilite.weights.slices import SliceFolder

CONFIG = gguf_config(
    vocab_size=1280,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=3,
    intermediate_size=160,
    max_position_embeddings=512,
)


def vocabulary() -> dict[str, Any]:
    """A sentencepiece model as a GGUF has it."""
    model = SentencePieceProcessor(str(SHIPPED["fable"] / "tokenizer.model"))
    ids = range(model.vocab_size())
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    path = tmp_path_factory.mktemp("story") / "Tiny.Q4_1.gguf"
    write_gguf_model(path, CONFIG, {"embed": "Q8_0", "proj": "Q4_1"}, metadata=vocabulary())
    with LLM(path) as llm:
        told = (llm.generate("It was", SamplingParams(seed=seed, length=70)) for seed in range(100))
        seed, completion = next((i, one) for i, one in enumerate(told) if one.finish_reason == "length")
    ask = ("--prompt", "It was", "--seed", str(seed), "--length", "70")
    return Story(path, ask, completion.text + "\n")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with Nodes(tmp_path) as nodes:
        yield nodes


@pytest.mark.parametrize("ranks", [["2", "--ratio", "1,4"], ["3"], ["8"]], ids=" ".join)
def test_any_number_of_ranks_makes_the_text_of_one(ranks: list[str], nodes: Nodes, story: Story) -> None:
    path = shutil.copy(story.folder, nodes.folder)
    node = nodes.start("--model_path", path, "--allreduce", "star", *story.ask, "--local", *ranks)
    assert node.finish() == 0, node.err
    assert node.out == story.text
    # Its slices are beside it, named as it is.
    folder = nodes.folder / "Tiny.Q4_1.split"
    with SliceFolder(folder / "node_1") as part:
        assert {tensor.dtype for tensor in part.tensors.values()} <= {"F32", "Q4_1", "Q8_0"}


def test_a_window_and_a_killed_rank_change_nothing(nodes: Nodes, story: Story) -> None:
    path = shutil.copy(story.folder, nodes.folder)
    node = nodes.start(
        "--model_path", path, "--allreduce", "star", "--local", 3, "--memory_window", 2, *story.ask
    )
    line = node.wait_for_line("rank 1 is process")
    node.wait_for_text(random.randrange(1, len(story.text) // 3))
    os.kill(int(line.split()[-1]), signal.SIGKILL)
    node.wait_for_line("rank 2 ended (exit code -9) and is started again")
    assert node.finish() == 0, node.err
    assert node.out == story.text


def test_workers_fetch_slices_of_blocks_and_one_may_have_the_file(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 3)
    own = shutil.copy(story.folder, nodes.folder / "own.gguf")
    workers = [cluster.start_worker("a", "--once"), cluster.start_worker("b", "--once", "--model_path", own)]
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text
    for worker in workers:
        assert worker.finish() == 0, worker.err
    assert (nodes.folder / "own.split").is_dir()


def test_a_worker_with_another_file_is_told_so(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 2)
    write_gguf_model(nodes.folder / "other.gguf", CONFIG, "Q8_0", metadata=vocabulary())
    worker = cluster.start_worker("a", "--model_path", nodes.folder / "other.gguf")
    assert worker.finish() == 2
    assert "it is another model, or has another --quantize: take away --model_path" in worker.err
    cluster.host.kill()


def test_slices_of_a_gguf_are_cleaned(nodes: Nodes, story: Story) -> None:
    path = shutil.copy(story.folder, nodes.folder)
    for n in (2, 3):
        assert nodes.start("--model_path", path, "--world_size", n, "--split_only").finish() == 0
    folder = nodes.folder / "Tiny.Q4_1.split"
    os.utime(folder / ".used", (1000, 1000))
    node = nodes.start("--model_path", path, "--clean", "--yes")
    assert node.finish() == 0, node.err
    assert f"{folder}: made for 2 ranks" in node.out
    assert not list(folder.glob("node_*"))
    assert len(list(folder.glob("*/node_*"))) == 3


def test_a_damaged_file_is_one_line(nodes: Nodes, story: Story) -> None:
    raw = Path(story.folder).read_bytes()
    (nodes.folder / "cut.gguf").write_bytes(raw[: len(raw) // 2])
    node = nodes.start("--model_path", nodes.folder / "cut.gguf", "--prompt", "x")
    assert node.finish() == 2
    assert len(node.err.splitlines()) == 1
    assert "behind the file's end at" in node.err
