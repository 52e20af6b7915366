"""A model written as a GGUF file: read back it is the same model, in whatever bits it was asked for."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint
from gguf_files import WIDE, gguf_config, write_gguf_model
from slice_logits import logits_of_slices
from tiny_model import GOLDEN, assert_close, write_golden

from tpilite import LLM, SamplingParams
from tpilite.cli.main import main
from tpilite.dtypes import BLOCK_SIZES
from tpilite.errors import ConfigError
from tpilite.export.gguf_file import export_gguf
from tpilite.formats.gguf import GgufFile
from tpilite.quantize.recipe import KINDS, Recipe
from tpilite.shipped import find_model
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.slicer import ensure_slices

IDS = list(np.random.default_rng(7).integers(0, 50, 12))
_UNSAID = {
    "qwen3_yarn": "rope_scaling.truncate = false",
    "smollm3_odd": r"layers_without_rope = \[0, 2\]",
}


def logits(path: Path, ids: list[int] = IDS) -> np.ndarray:
    with LLM(path, threads=1, memory_budget="unlimited") as llm:
        return llm.logits(ids)


def exported(folder: Path, path: Path, kind: str | None = None) -> Path:
    with Checkpoint(folder, recipe=None if kind is None else Recipe(kind)) as checkpoint:
        export_gguf(checkpoint, path)
    return path


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_every_family_is_the_same_when_it_is_read_back(case: str, tmp_path: Path) -> None:
    folder, found = write_golden(tmp_path, case)
    if case in _UNSAID:
        with pytest.raises(ConfigError, match=f"cannot say that it has {_UNSAID[case]}"):
            exported(folder, tmp_path / "x.gguf")
        assert not list(tmp_path.glob("x.gguf*"))
        return
    path = exported(folder, tmp_path / "x.gguf")
    assert_close(logits(path, list(found["ids"]))[found["rows"]], found["logits"], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_tied", [False, True])
def test_what_is_written_is_what_slices_hold(kind: str, is_tied: bool, tmp_path: Path) -> None:
    config = tiny_config(
        hidden_size=256,
        intermediate_size=320,
        num_attention_heads=8,
        head_dim=32,
        tie_word_embeddings=is_tied,
        attention_bias=True,
    )
    folder = write_checkpoint(tmp_path / "model", config)
    path = exported(folder, tmp_path / "x.gguf", kind)
    with Checkpoint(folder, recipe=Recipe(kind)) as checkpoint, GgufFile(path) as file:
        ensure_slices(checkpoint, checkpoint.partition(1), tmp_path / "split")
        dtypes = {tensor.dtype for tensor in file.tensors.values()}
        assert dtypes - {"F32"} == {t.dtype for t in checkpoint.tensors.values() if len(t.shape) == 2}
        assert dtypes & BLOCK_SIZES.keys()
        assert ("output.weight" in file.tensors) is not is_tied
        assert file.metadata["general.quantization_version"] == 2
    assert_close(logits(path), logits_of_slices(tmp_path / "split", 1, IDS), 1e-5)


def test_the_tokenizer_and_the_text_are_the_models(tmp_path: Path) -> None:
    path = exported(find_model("fable"), tmp_path / "x.gguf")
    texts = []
    for model in (find_model("fable"), path):
        with LLM(model) as llm:
            texts.append(llm.generate("Once upon a time", SamplingParams(length=30, temperature=0)).text)
    assert texts[0] == texts[1]


def test_a_gguf_in_numbers_keeps_what_it_says(tmp_path: Path) -> None:
    config = gguf_config(**WIDE, rope_divisors=(4.0,) * 16)
    own = {"general.name": "mine", "a.list": ["x", "y"], "an.array": np.arange(3, dtype=np.int32)}
    write_gguf_model(tmp_path / "x.gguf", config, "F16", metadata=own)
    path = exported(tmp_path / "x.gguf", tmp_path / "y.gguf", "q8_0")
    with GgufFile(tmp_path / "x.gguf") as before, GgufFile(path) as after:
        assert after.metadata["general.file_type"] == 7
        for key in before.metadata:
            np.testing.assert_array_equal(after.metadata[key], before.metadata[key])
        assert after.tensors.keys() == before.tensors.keys()
        assert after.tensors["blk.0.attn_q.weight"].dtype == "Q8_0"
    assert_close(logits(path), logits(tmp_path / "x.gguf"), 0.1)


def test_heads_are_put_in_order_in_pieces_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    whole = exported(folder, tmp_path / "whole.gguf").read_bytes()
    monkeypatch.setattr("tpilite.export.gguf_file.CHUNK_BYTES", 300)
    assert exported(folder, tmp_path / "pieces.gguf").read_bytes() == whole


def test_the_command_writes_the_file_and_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    command = ["--model_path", str(folder), "--quantize", "q8_0", "--export", str(tmp_path / "x.gguf")]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x.gguf'}\n"
    assert main(command) == 2
    assert "x.gguf exists: remove it, or give --export another name" in capsys.readouterr().err
    assert main(["--model_path", str(tmp_path / "x.gguf"), "--export", str(tmp_path / "y.gguf")]) == 2
    assert "x.gguf is a GGUF already: give --quantize" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    with pytest.raises(ConfigError, match=r"cannot write .*x\.gguf: No such file or directory; give"):
        exported(folder, tmp_path / "nowhere" / "x.gguf")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    write, left = os.write, [3]

    def fills(fd: int, data: memoryview) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", fills)
    with pytest.raises(ConfigError, match=r"cannot write .*: No space left on device; give --export another"):
        exported(folder, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))
    monkeypatch.setattr("tpilite.export.gguf_file.free_bytes", lambda folder: 10)
    with pytest.raises(ConfigError, match=r"is full: the file takes 0\.\d\d MB; make room or"):
        exported(folder, tmp_path / "x.gguf")


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    (tmp_path / "x.gguf.part").write_bytes(b"half")
    exported(folder, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.glob("x.gguf*")] == ["x.gguf"]
