import argparse
import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint

from tpilite.cli import slicing
from tpilite.cli.options import parse
from tpilite.cli.slicing import checkpoint_of, recipe_of, whole_slice
from tpilite.config.llama import LlamaConfig
from tpilite.errors import ConfigError
from tpilite.formats.model_files import ModelFiles
from tpilite.formats.stored import StoredTensor
from tpilite.shipped import find_model
from tpilite.weights.partition import EMBEDDING, LM_HEAD


def sliced(
    args: argparse.Namespace, folder: Path, stack: ExitStack
) -> tuple[LlamaConfig, Mapping[str, StoredTensor]]:
    """The configuration and the tensors of the only rank."""
    with checkpoint_of(args, ModelFiles.find(folder), 1) as checkpoint:
        return checkpoint.config, whole_slice(args, checkpoint, stack)


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_only_rank_holds_a_tied_table_once(is_tied: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config(tie_word_embeddings=is_tied))
    args = parse(["--model_path", str(folder), "--quantize", "q8_0"])
    for _ in range(2):  # made, then found
        with ExitStack() as stack:
            config, tensors = sliced(args, folder, stack)
            assert config.tie_word_embeddings is is_tied
            assert (tensors[EMBEDDING] is tensors[LM_HEAD]) is is_tied
            assert tensors[EMBEDDING].dtype == "Q8_0"
        assert (folder / "split" / "node_0" / "embed.safetensors").exists() is not is_tied


def test_a_calibration_changes_the_blocks_and_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl called Lily. She liked to play.\n" * 20)
    shutil.copytree(find_model("fable"), tmp_path / "fable")
    options = ["--model_path", str(tmp_path / "fable"), "--quantize", "q4_k"]
    made = []
    for more in ([], ["--calibrate", str(text)], ["--calibrate", str(text)]):
        with ExitStack() as stack:
            _, tensors = sliced(parse([*options, *more]), tmp_path / "fable", stack)
            made.append(tensors["model.layers.0.mlp.gate_proj.weight"].array().copy())
        if len(made) == 2:
            monkeypatch.setattr(slicing, "importance_in", lambda *args: pytest.fail("read again"))
    assert not np.array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[1], made[2])
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("fable/split/**/manifest.json")]
    assert sorted(len(manifest["quantized"]["calibration"]) for manifest in manifests) == [0, 64]


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (b"text", [], "--calibrate needs --quantize, and the model that is to read the text"),
        (b"", ["--quantize", "q4_k"], "is empty; expected some pages of text"),
        (b"\xff\xfe", ["--quantize", "q4_k"], "cannot be read as UTF-8 text"),
        (None, ["--quantize", "q4_k"], "cannot be read as UTF-8 text"),
    ],
)
def test_a_calibration_that_cannot_be(
    content: bytes | None, more: list[str], message: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    args = parse(["--model_path", str(folder), "--calibrate", str(tmp_path / "text.txt"), *more])
    with pytest.raises(ConfigError, match=message):
        recipe_of(args, ModelFiles.find(folder))


def test_a_calibration_needs_a_tokenizer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    (tmp_path / "text.txt").write_text("text")
    options = ["--model_path", str(folder), "--calibrate", str(tmp_path / "text.txt"), "--quantize", "q8_0"]
    with ExitStack() as stack, pytest.raises(ConfigError, match="has no tokenizer, which --calibrate needs"):
        sliced(parse(options), folder, stack)
