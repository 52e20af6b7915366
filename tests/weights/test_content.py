"""The identity of a model: every byte of its weights counts, and a known one is trusted while it can be."""

import os
from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint

from tpilite.weights import content
from tpilite.weights.checkpoint import Checkpoint


def fingerprint(folder: Path, notes: Path | None = None) -> str:
    with Checkpoint(folder, notes) as checkpoint:
        return checkpoint.fingerprint


def flip(path: Path, at: int) -> None:
    found = path.stat()
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_any_bit_of_the_weights_makes_another_model(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=1000)
    folder, notes = write_checkpoint(tmp_path / "model", config), tmp_path / "notes"
    before = fingerprint(folder, notes)
    with Checkpoint(folder) as checkpoint:
        sampled, embedding = checkpoint.sampled_fingerprint, checkpoint.tensors["model.embed_tokens.weight"]
    # In a row that no sample sees, and with its mtime put back.
    flip(folder / "model.safetensors", embedding.offset + embedding.nbytes // 4)
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.sampled_fingerprint == sampled
    assert fingerprint(folder, notes) != before
    assert fingerprint(folder, notes) == fingerprint(folder)


def test_what_is_known_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, notes = write_checkpoint(tmp_path / "model", tiny_config()), tmp_path / "notes"
    found = fingerprint(folder, notes)
    monkeypatch.setattr(content, "_hash_tensor", lambda tensor: pytest.fail(f"{tensor.name} is read"))
    assert fingerprint(folder, notes) == found


def test_a_model_alone_is_not_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    monkeypatch.setattr(content, "_hash_tensor", lambda tensor: pytest.fail(f"{tensor.name} is read"))
    with Checkpoint(folder, tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"x": 1}'])
def test_a_damaged_note_is_no_note(note: bytes, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    (tmp_path / content.CONTENT_NAME).write_bytes(note)
    assert fingerprint(folder, tmp_path) == fingerprint(folder)
