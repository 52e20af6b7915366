import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import hf_config, random_tensors, tiny_config, write_checkpoint, write_tensor_file

from tpilite.config.llama import RopeScaling
from tpilite.errors import CheckpointError
from tpilite.weights.checkpoint import Checkpoint

CONFIGS = [
    tiny_config(),
    tiny_config(tie_word_embeddings=True),
    tiny_config(attention_bias=True, mlp_bias=True),
    tiny_config(head_dim=6, num_key_value_heads=8, rope_scaling=RopeScaling("linear", 2.0)),
]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", CONFIGS)
def test_gives_every_tensor_as_stored(config, shards: int, dtype: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config, dtype, seed=3, shards=shards)
    expected = random_tensors(config, dtype, seed=3)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == config
        for name, values in expected.items():
            stored = checkpoint.tensors[name]
            assert stored.dtype == dtype
            np.testing.assert_array_equal(stored.array(), values)
        assert set(checkpoint.tensors) == set(expected) | {"lm_head.weight"}
        assert checkpoint.nbytes == sum(values.nbytes for values in expected.values())


def test_a_real_checkpoint_opens(shared_models: Path) -> None:
    with Checkpoint(shared_models / "stories260K") as checkpoint:
        assert checkpoint.config.tie_word_embeddings
        assert checkpoint.tensors["lm_head.weight"] is checkpoint.tensors["model.embed_tokens.weight"]
        norm = checkpoint.tensors["model.norm.weight"].array()
        assert norm.shape == (64,)
        assert np.isfinite(norm).all()


def test_without_lm_head_the_embeddings_are_tied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(tie_word_embeddings=True))
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny_config(tie_word_embeddings=False))))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.tie_word_embeddings
        assert checkpoint.tensors["lm_head.weight"].shape == (50, 32)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("same", [True, False])
def test_a_head_of_its_own_counts_whatever_the_flag_says(shards: int, same: bool, tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    if same:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_checkpoint(tmp_path, tiny_config(tie_word_embeddings=True), shards=shards, tensors=tensors)
    with Checkpoint(tmp_path) as checkpoint:
        assert not checkpoint.config.tie_word_embeddings
        for name, values in tensors.items():
            np.testing.assert_array_equal(checkpoint.tensors[name].array(), values)
        assert checkpoint.nbytes == sum(values.nbytes for values in tensors.values())


PREFIXES = [
    ("", "lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
    ("language_model.", "lm_head.weight"),
    ("base_model.model.model.", "base_model.model.lm_head.weight"),
    ("_orig_mod.model.", "_orig_mod.lm_head.weight"),
    ("model.model.", "model.lm_head.weight"),
    ("transformer.", "transformer.lm_head.weight"),
]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("prefix", "head"), PREFIXES)
def test_tensors_are_known_behind_any_prefix(
    prefix: str, head: str, tied: bool, shards: int, tmp_path: Path
) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    tensors = random_tensors(config)
    renamed = {prefixed(name, prefix, head): values for name, values in tensors.items()}
    renamed["vision_tower.layers.0.self_attn.q_proj.weight"] = tensors["model.norm.weight"]
    renamed["speech.embed_tokens.weight"] = tensors["model.norm.weight"]
    write_checkpoint(tmp_path / "renamed", config, shards=shards, tensors=renamed)
    with Checkpoint(tmp_path / "renamed") as checkpoint:
        for name, values in tensors.items():
            np.testing.assert_array_equal(checkpoint.tensors[name].array(), values)
        assert checkpoint.config == config
        with Checkpoint(write_checkpoint(tmp_path / "usual", config)) as usual:
            assert usual.nbytes == checkpoint.nbytes
            assert usual.fingerprint == checkpoint.fingerprint


def prefixed(name: str, prefix: str, head: str) -> str:
    return head if name == "lm_head.weight" else prefix + name.removeprefix("model.")


def test_what_is_missing_behind_a_prefix_is_told_by_its_name_there(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    del tensors["model.layers.1.mlp.up_proj.weight"]
    renamed = {prefixed(name, "language_model.model.", name): values for name, values in tensors.items()}
    write_checkpoint(tmp_path, tiny_config(), tensors=renamed)
    with pytest.raises(CheckpointError, match=r"no tensor language_model\.model\.layers\.1\.mlp\.up_proj"):
        Checkpoint(tmp_path)


HEADS = ["score.weight", "qa_outputs.weight", "classifier.weight", "v_head.summary.weight"]


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_another_head_is_refused_by_its_name(prefix: str, tied: bool, head: str, tmp_path: Path) -> None:
    tensors = {prefixed(n, prefix, head): v for n, v in random_tensors(tiny_config()).items()}
    write_checkpoint(tmp_path, tiny_config(tie_word_embeddings=tied), tensors=tensors)
    with pytest.raises(CheckpointError, match=f"another head than a language model's: it has {head}"):
        Checkpoint(tmp_path)


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config(tie_word_embeddings=True))
    bare = {prefixed(name, "", ""): values for name, values in tensors.items()}
    write_checkpoint(tmp_path, tiny_config(), tensors=bare)
    value = hf_config(tiny_config()) | {"architectures": ["LlamaModel"]}
    (tmp_path / "config.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="a LlamaModel without a head"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(value | {"tie_word_embeddings": True}))
    Checkpoint(tmp_path).close()


def test_the_fingerprint_is_of_the_model_and_not_of_its_files(tmp_path: Path) -> None:
    def fingerprint(name: str, **how: int) -> str:
        with Checkpoint(write_checkpoint(tmp_path / name, tiny_config(), **how)) as checkpoint:
            return checkpoint.fingerprint

    assert fingerprint("a") == fingerprint("b", shards=2)
    assert fingerprint("a2", seed=1) != fingerprint("a3", seed=2)


@pytest.mark.parametrize("change", [{"rope_theta": 5e5}, {"eos_token_ids": (2, 3)}, {"rms_norm_eps": 1e-5}])
def test_the_fingerprint_covers_the_configuration(change: dict, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config())
    with Checkpoint(tmp_path) as checkpoint:
        before = checkpoint.fingerprint
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny_config(**change))))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.fingerprint != before


def test_a_fine_tune_of_one_matrix_changes_the_fingerprint(tmp_path: Path) -> None:
    config = tiny_config(intermediate_size=4096)
    write_checkpoint(tmp_path, config)
    with Checkpoint(tmp_path) as checkpoint:
        before = checkpoint.fingerprint
        tensor = checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
        middle = tensor.offset + tensor.nbytes // 2
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(middle)
        file.write(b"\x01\x02\x03\x04")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.fingerprint != before


def rewrite(folder: Path, name: str, *, dtype: str = "BF16", shape: tuple[int, ...] | None = None) -> None:
    """Replaces one tensor of the tiny model, or with no shape at all takes it out."""
    tensors = random_tensors(tiny_config())
    del tensors[name]
    entries = [(key, "BF16", values.shape, [values]) for key, values in tensors.items()]
    if shape is not None:
        entries.append((name, dtype, shape, [bytes(2 * int(np.prod(shape)))]))
    (folder / "model.safetensors").unlink()
    write_tensor_file(folder / "model.safetensors", entries, {})


def quantise(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    at = raw.index(b'"BF16"', raw.index(b"layers.1.self_attn.v_proj"))
    path.write_bytes(raw[:at] + b'"I8"  ' + raw[at + 6 :])


def write_index(folder: Path, shard: object) -> None:
    shutil.move(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(random_tensors(tiny_config()), shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


Breakage = Callable[[Path], object]
BROKEN: list[tuple[Breakage, str]] = [
    (shutil.rmtree, "does not exist; expected a model folder"),
    (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"as a pickle \(pytorch_model.bin\), which is never read .* download the safetensors version",
    ),
    (
        lambda f: rewrite(f, "model.norm.weight"),
        r"has no tensor model.norm.weight, .*expected shape \[32\]",
    ),
    (
        lambda f: rewrite(f, "model.layers.0.self_attn.k_proj.weight", shape=(32, 32)),
        r"model.layers.0.self_attn.k_proj.weight has shape \[32, 32\], but config.json implies \[16, 32\]",
    ),
    (
        quantise,
        r"'model.layers.1.self_attn.v_proj.weight' is stored as I8, .* expected F32, .* or IQ4_XS",
    ),
    (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100),
        "the header claims 18446744073709551615",
    ),
    (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        "behind the file's end .* download or copy it again",
    ),
    (lambda f: write_index(f, "model-00002-of-00002.safetensors"), "00002.safetensors does not exist"),
    (
        lambda f: write_index(f, "../model.safetensors"),
        "names the shard '../model.safetensors'; expected a plain",
    ),
    (lambda f: write_index(f, "/etc/model.safetensors"), "expected a plain file name"),
    (lambda f: write_index(f, "a\0.safetensors"), "expected a plain file name"),
    (lambda f: write_index(f, "passwd"), "expected a plain file name"),
    (lambda f: write_index(f, 7), "names the shard 7"),
]


@pytest.mark.parametrize(("breakage", "text"), BROKEN)
def test_a_broken_folder_is_one_line_that_says_what_to_do(
    breakage: Breakage, text: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config())
    breakage(folder)
    with pytest.raises(CheckpointError, match=text) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_required_biases_are_missed_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config())
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny_config(attention_bias=True))))
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers.0.self_attn.q_proj.bias"):
        Checkpoint(tmp_path)


def test_tensors_that_nobody_needs_may_be_of_any_dtype(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config())
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    n_header = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n_header])
    end = len(raw) - 8 - n_header
    header["model.layers.0.rotary_emb.inv_freq"] = {
        "dtype": "I64",
        "shape": [2],
        "data_offsets": [end, end + 16],
    }
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + n_header :] + bytes(16))
    with Checkpoint(tmp_path) as checkpoint:
        assert "model.layers.0.rotary_emb.inv_freq" not in checkpoint.tensors
        np.testing.assert_array_equal(
            checkpoint.tensors["model.norm.weight"].array(),
            random_tensors(tiny_config())["model.norm.weight"],
        )
