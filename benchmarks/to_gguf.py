"""A benchmark's checkpoint as GGUF without a vocabulary, for llama.cpp (needs the package gguf).

    python benchmarks/to_gguf.py MODEL_DIR OUT.gguf

Rows of q and k are not reordered as llama.cpp's rotary embedding would want them: the time is the same.
"""

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import LM_HEAD

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest]}.weight"
    return f"{_NAMES[stem]}.weight"


def write_gguf(folder: Path, out: Path) -> Path:
    """`out`, written from the checkpoint in `folder` unless it is there already."""
    if out.exists():
        return out
    partial = out.with_suffix(".partial")
    with Checkpoint(folder) as checkpoint:
        config = checkpoint.config
        writer = GGUFWriter(partial, "llama")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("no_vocab")
        for name, tensor in checkpoint.tensors.items():
            if name == LM_HEAD and config.tie_word_embeddings:
                continue
            stored = tensor.array()
            if stored.ndim == 1:
                wide = stored.astype(np.uint32) << 16 if tensor.dtype == "BF16" else stored
                values = wide.view(np.float32) if tensor.dtype == "BF16" else stored.astype(np.float32)
                writer.add_tensor(gguf_name(name), values)
            elif tensor.dtype == "BF16":
                raw = stored.view(np.uint8).reshape(stored.shape[0], -1)
                writer.add_tensor(gguf_name(name), raw, raw_dtype=GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(gguf_name(name), stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return partial.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print(write_gguf(args.folder, args.out))
