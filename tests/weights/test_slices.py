import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import hf_config, tiny_config, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.config.llama import LlamaConfig, RopeScaling
from tpilite.errors import SliceError
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import Partition
from tpilite.weights.slicer import ensure_slices
from tpilite.weights.slices import Manifest, SliceFolder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    with Checkpoint(write_checkpoint(tmp_path / "model", tiny_config())) as opened:
        yield opened


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_verify_finds_one_wrong_bit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (manifest,) = ensure_slices(checkpoint, Partition.of(checkpoint.config, 1), tmp_path)
    flip(tmp_path / "node_0" / "head.safetensors", -1)
    wrong = r"head.safetensors is damaged: its sha256 .* --split_bin or"
    with SliceFolder(tmp_path / "node_0") as part, pytest.raises(SliceError, match=wrong):
        part.verify()
    flip(tmp_path / "node_0" / "head.safetensors", -1)
    reports: list[tuple[int, int]] = []
    with SliceFolder(tmp_path / "node_0") as part:
        part.verify(lambda *report: reports.append(report))
    assert reports[-1] == (manifest.nbytes, manifest.nbytes)


def other_shape(folder: Path) -> None:
    path = folder / "layers.1.attn.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[16,32]', b'"shape":[32,16]'))


DAMAGED: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / "manifest.json").unlink(), r"is not a complete slice: it has no manifest.json; make or"),
    (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: the manifest is not of the format"),
    (lambda f: (f / "manifest.json").write_bytes(bytes(2 << 20)), "expected at most 1048576"),
    (lambda f: (f / "head.safetensors").unlink(), "head.safetensors does not exist"),
    (lambda f: (f / "head.safetensors").write_bytes(b"12345678" * 2), "head.safetensors: the header claims"),
    (
        lambda f: os.truncate(f / "head.safetensors", 1 << 16),
        r"head.safetensors has \d+ bytes; the manifest expects \d+: make it again",
    ),
    (other_shape, r"holds BF16 \[32, 16\] as model.layers.1.self_attn.\w+.weight; its manifest implies"),
]


@pytest.mark.parametrize(("harm", "text"), DAMAGED)
def test_a_damaged_folder_is_one_line_that_says_what_to_do(
    checkpoint: Checkpoint, harm: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    ensure_slices(checkpoint, Partition.of(checkpoint.config, 2), tmp_path)
    harm(tmp_path / "node_0")
    with pytest.raises(SliceError, match=text) as caught:
        SliceFolder(tmp_path / "node_0")
    assert "\n" not in str(caught.value)


def manifest_value() -> dict[str, Any]:
    config = tiny_config(rope_scaling=RopeScaling("linear", 2.0))
    names = ["embed", "head", *(f"layers.{i}.{kind}" for i in range(2) for kind in ("attn", "mlp"))]
    return {
        "format": "tpilite slice",
        "version": 1,
        "rank": 0,
        "partition": Partition.of(config, 2).to_dict(),
        "fingerprint": "0" * 64,
        "config": {
            name: getattr(config, name) for name in LlamaConfig.__dataclass_fields__ if name != "rope_scaling"
        }
        | {"rope_scaling": vars(config.rope_scaling)},
        "files": {f"{name}.safetensors": {"size": 9, "sha256": "f" * 64} for name in names},
    }


def test_a_manifest_is_read_field_by_field() -> None:
    manifest = Manifest.from_json(json.dumps(manifest_value()).encode())
    assert manifest.config == tiny_config(rope_scaling=RopeScaling("linear", 2.0))
    assert manifest.partition == Partition.of(manifest.config, 2)
    assert manifest.nbytes == 6 * 9
    assert hf_config(manifest.config)["eos_token_id"] == [2]


def changed(path: str, new: Any) -> bytes:
    value = target = manifest_value()
    *parents, last = path.split("/")
    for key in parents:
        target = target[key]
    if new is ...:
        del target[last]
    else:
        target[last] = new
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("path", "new", "text"),
    [
        ("format", "zip", "not of the format 'tpilite slice'"),
        ("version", 3, "version 3; expected 1 or 2: use the same version of tpilite everywhere"),
        ("more", 1, "exactly the keys"),
        ("rank", ..., "exactly the keys"),
        ("rank", 2, "has rank 2; expected one of 2 ranks from 0"),
        ("rank", -1, "has rank -1"),
        ("rank", "0", "has rank '0'"),
        ("fingerprint", "xyz", "fingerprint 'xyz'; expected 64 digits"),
        ("partition", [], "the manifest's partition is wrong"),
        ("partition/kv_heads", [1, 1], "the partition shares out 2 KV heads; the model has 4"),
        ("config", 3, "config is wrong"),
        ("config/head_dim", ..., "config is wrong: its keys"),
        ("config/head_dim", 3, "config is wrong: head_dim must be even"),
        ("config/rms_norm_eps", "x", "config is wrong: rms_norm_eps"),
        ("config/rope_theta", 10**400, "config is wrong"),
        ("config/mlp_bias", 1, "config is wrong: mlp_bias must be true or false, found 1"),
        ("config/eos_token_ids", ["2"], "config is wrong: eos_token_id"),
        ("config/rope_scaling/factor", "x", "config is wrong"),
        ("config/rope_scaling/more", 1, "config is wrong"),
        ("files", [], "files must be an object"),
        ("files/..", {}, "names the file '..', which no slice of rank 0 has"),
        ("files/~..~x.safetensors", {}, "names the file"),
        ("files/layers.01.attn.safetensors", {}, "names the file 'layers.01.attn.safetensors'"),
        ("files/head.safetensors\n", {}, r"names the file 'head.safetensors\\n'"),
        ("files/head.safetensors", {"size": 9}, "exactly size and sha256"),
        ("files/head.safetensors/size", -1, "gives head.safetensors size -1"),
        ("files/head.safetensors/size", 1 << 60, "gives head.safetensors size"),
        ("files/head.safetensors/size", True, "gives head.safetensors size True"),
        ("files/head.safetensors/sha256", "F" * 64, "and sha256 'FFF"),
        ("files/head.safetensors", ..., "names 5 files; a slice of 2 layers has 5"),
        ("config/num_hidden_layers", 9999, "a slice of 9999 layers has"),
    ],
)
def test_what_no_manifest_says_is_refused(path: str, new: Any, text: str) -> None:
    with pytest.raises(SliceError, match=text) as caught:
        Manifest.from_json(changed(path, new).replace(b"~", b"/"))
    assert "\n" not in str(caught.value)


def test_other_layers_and_an_embedding_for_a_worker_are_refused() -> None:
    value = manifest_value()
    value["files"]["layers.7.mlp.safetensors"] = value["files"].pop("layers.1.mlp.safetensors")
    with pytest.raises(SliceError, match=r"does not name layers\.1\.mlp\.safetensors"):
        Manifest.from_json(json.dumps(value).encode())
    with pytest.raises(SliceError, match=r"'embed\.safetensors', which no slice of rank 1 has"):
        Manifest.from_json(changed("rank", 1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths(value: Any, prefix: str = "") -> Iterator[str]:
    for key, item in value.items():
        yield prefix + key
        if isinstance(item, dict):
            yield from paths(item, f"{prefix}{key}/")


@given(path=st.sampled_from(list(paths(manifest_value()))), new=json_values)
@settings(deadline=None, max_examples=300)
def test_a_manifest_with_anything_anywhere(path: str, new: Any) -> None:
    try:
        manifest = Manifest.from_json(changed(path, new))
    except SliceError:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@given(raw=st.binary(max_size=100))
@settings(deadline=None)
def test_a_manifest_of_random_bytes(raw: bytes) -> None:
    with pytest.raises(SliceError):
        Manifest.from_json(raw)
