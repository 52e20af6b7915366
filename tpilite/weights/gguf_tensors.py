"""The tensors of a GGUF, whole or in parts, by Hugging Face's names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tpilite.config.gguf import config_from_gguf
from tpilite.config.llama import LlamaConfig
from tpilite.errors import CheckpointError
from tpilite.formats.gguf import GgufFile
from tpilite.formats.model_files import ModelFiles
from tpilite.formats.stored import StoredTensor
from tpilite.weights.partition import EMBEDDING, FINAL_NORM, LM_HEAD, tensor_shapes

# Ours to GGUF's; the ending, weight or bias, is the same.
_NAMES = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", LM_HEAD: "output.weight"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
DIVISORS = "rope_freqs.weight"
_OF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def config_of(parts: Sequence[GgufFile], stored: Mapping[str, StoredTensor]) -> LlamaConfig:
    """The model's configuration, by the metadata of the first part and all tensors.

    How Llama 3 stretches its rotary frequencies is no metadata: a tensor has what each is divided by.
    """
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    config = config_from_gguf(parts[0].path, parts[0].metadata, shapes)
    divisors = stored.get(DIVISORS)
    if divisors is None:
        return config
    if divisors.dtype != "F32" or divisors.shape != (config.head_dim // 2,):
        raise CheckpointError(
            f"{divisors.file.path}: {DIVISORS} is {divisors.dtype} of shape {list(divisors.shape)}; "
            f"expected F32, one for each of {config.head_dim // 2} rotary frequencies"
        )
    return replace(config, rope_divisors=tuple(divisors.array().tolist()))


def stored_in(parts: Sequence[GgufFile]) -> dict[str, StoredTensor]:
    """All tensors by GGUF's names. Raises `CheckpointError` where two parts hold the same."""
    stored: dict[str, StoredTensor] = {}
    for part in parts:
        for name in stored.keys() & part.tensors.keys():
            raise CheckpointError(
                f"{part.path} and {stored[name].file.path} both hold {name!r:.80}; download the parts again"
            )
        stored |= part.tensors
    return stored


def tensors_of(
    files: ModelFiles, config: LlamaConfig, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The architecture's tensors by Hugging Face's names, but for lm_head where there is none."""
    found = {}
    for name, shape in tensor_shapes(config).items():
        stored_name = gguf_name(name)
        if stored_name in stored:
            found[name] = stored[stored_name]
        elif name != LM_HEAD:
            raise CheckpointError(
                f"{files.path} has no tensor {stored_name}, which its metadata implies (expected shape "
                f"{list(shape)}); download it again"
            )
    return found


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of ours."""
    match = _OF_LAYER.fullmatch(name)
    if match is None:
        return _NAMES[name]
    layer, inner, ending = match.groups()
    return f"blk.{layer}.{_LAYER_NAMES[inner]}.{ending}"
