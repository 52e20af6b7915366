"""A small Llama for tests of the model: random weights, the fewest words for a product, float64 beside it."""

import json
import shutil
from pathlib import Path

import numpy as np
import reference
from checkpoints import write_tensor_file
from random_weights import random_tensors, widened

from tpilite.collective import Solo
from tpilite.config.hugging_face import config_from_hf
from tpilite.linear.matrix import Matrix, as_float32
from tpilite.model.llama import LayerWeights, Llama, LlamaWeights, Segment

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
_SISTERS = ("mistral", "qwen", "smollm", "granite", "yarn")
FAMILIES = sorted(path.name for path in GOLDEN.iterdir() if path.name.startswith(_SISTERS))
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SMALL = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 42,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 53,
    "max_position_embeddings": 400,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
}


def write_golden(folder, case):
    """`folder` with the model of a golden case, and what transformers computes with it."""
    shutil.copy(GOLDEN / case / "config.json", folder)
    found = np.load(GOLDEN / case / "golden.npz")
    config, stored = json.loads((folder / "config.json").read_text()), str(found["stored"])
    tensors = random_tensors(config, int(found["seed"]), stored).items()
    write_tensor_file(
        folder / "model.safetensors", [(name, _DTYPES[stored], t.shape, [t]) for name, t in tensors]
    )
    return folder, found


def plain_linear(x, *matrices):
    """What `Linear` computes, in the fewest words."""
    results = []
    for matrix in matrices:
        rows = []
        for part in matrix.parts:
            with part.open() as stored:
                rows.append(as_float32(stored))
        y = x @ np.concatenate(rows).T
        results.append(y if matrix.bias is None else y + matrix.bias)
    return results


plain_linear.share = lambda n, work: work(0, n)


def weights_of(tensors, n_layers):
    def matrix(name):
        bias = tensors.get(f"{name}.bias")
        return Matrix.of(tensors[f"{name}.weight"], None if bias is None else as_float32(bias))

    def layer(prefix):
        attention = {f"{x}_proj": matrix(f"{prefix}.self_attn.{x}_proj") for x in "qkvo"}
        mlp = {f"{x}_proj": matrix(f"{prefix}.mlp.{x}_proj") for x in ("gate", "up", "down")}
        names = ("input_layernorm", "post_attention_layernorm")
        norms = {name: as_float32(tensors[f"{prefix}.{name}.weight"]) for name in names}
        for name in ("q_norm", "k_norm"):
            if f"{prefix}.self_attn.{name}.weight" in tensors:
                norms[name] = as_float32(tensors[f"{prefix}.self_attn.{name}.weight"])
        return LayerWeights(**norms, **attention, **mlp)

    layers = [layer(f"model.layers.{i}") for i in range(n_layers)]
    return LlamaWeights(layers, as_float32(tensors["model.norm.weight"]), matrix("lm_head"))


class Tiny:
    """A small checkpoint, random unless given, and what runs it."""

    def __init__(self, config, seed=1, stored="float32", tensors=None):
        self.config = config_from_hf(config)
        self.stored = tensors or random_tensors(config, seed, stored)
        self.reference = lambda ids: reference.logits(config, widened(self.stored), ids)
        self.stored.setdefault("lm_head.weight", self.stored["model.embed_tokens.weight"])
        self.table = as_float32(self.stored["model.embed_tokens.weight"])

    def llama(self, linear=plain_linear, collective=None):
        weights = weights_of(self.stored, self.config.num_hidden_layers)
        return Llama(self.config, weights, collective or Solo(), linear)

    def shard(self, partition, collective):
        """The model of one rank: its ranges of every tensor, cut out of the whole."""
        mine = {
            name: np.ascontiguousarray(self.stored[name][tuple(slice(r.start, r.stop) for r in ranges)])
            for name, ranges in partition.shards(self.config, collective.rank).items()
        }
        return Llama(self.config, weights_of(mine, self.config.num_hidden_layers), collective, plain_linear)

    def logits(self, llama, ids, cache=None, chunk=None):
        """The logits of all rows, `chunk` rows a pass."""
        cache, chunk = cache or llama.new_cache(), chunk or len(ids)
        passes = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
        hidden = [llama.forward(self.table[rows], [Segment(cache, len(rows))]) for rows in passes]
        return llama.logits(np.concatenate(hidden))


def ids_of(n_ids, vocab_size=53, seed=0):
    return np.random.RandomState(seed).randint(0, vocab_size, n_ids)


def assert_close(logits, expected, tolerance=1e-5):
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()
