"""What fewer bits do to a model's text: ours beside llama.cpp's own quantizer, on text of the model's own.

    python benchmarks/quality.py MODEL [MODEL ...] [--kinds q8_0 q4_k] [--texts 8] [--length 256]

MODEL is a folder or a GGUF; one in blocks is taken by its weights' values, which are the truth then. Texts
are sampled from it at temperature 1, from fixed seeds and a few first words. "calibrated" is as --calibrate
does with as many other texts of the model; "llama.cpp" its quantizer with the types that it chooses itself
("_S" where there are several), "the same types" with ours for the tables and most other matrices. All files
are computed with float32 activations by tpilite, so that nothing but the weights differs. Needs
llama-cpp-python.
"""

import argparse
import ctypes
import functools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import llama_cpp
import numpy as np
from divergence import divergence, log_softmax
from numpy.typing import NDArray

from tpilite import LLM, SamplingParams
from tpilite.cli.calibration import importance_of
from tpilite.dtypes import DTYPES
from tpilite.engine.config import EngineConfig
from tpilite.export.gguf_file import export_gguf
from tpilite.formats.gguf import TENSOR_TYPES, GgufFile
from tpilite.formats.gguf_writer import GgufWriter
from tpilite.formats.model_files import ModelFiles
from tpilite.formats.writing import TensorSpec
from tpilite.linear.matrix import as_float32
from tpilite.quantize.recipe import KINDS, Recipe
from tpilite.shipped import find_model
from tpilite.weights.assemble import as_weights
from tpilite.weights.checkpoint import Checkpoint

# llama.cpp's numbers for files of each kind.
_FILE_TYPES = {"q8_0": 7, "q6_k": 18, "q5_k": 16, "q4_k": 14, "q4_0": 2}
_TYPE_NUMBERS = {name: number for number, name in TENSOR_TYPES.items()}
_ROWS = 1024
_PROMPTS = ("Once upon a time", "The", "One day", "She said", "There was", "In the morning", "We", "It is")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", type=str)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of each text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for model in args.models:
            compare(find_model(model), args.kinds, args.texts, args.length, Path(temporary))


def compare(model: Path, kinds: Sequence[str], n_texts: int, length: int, folder: Path) -> None:
    """Prints a line for each kind and quantizer."""
    source = folder / "truth.gguf"
    in_numbers(model, source)
    with LLM(source, memory_budget="unlimited") as llm:
        texts, others = (
            [sampled(llm, seed, length) for seed in range(first, first + n_texts)] for first in (0, 1000)
        )
        truth = [log_softmax(llm.logits(text)) for text in texts]
    n_tokens = sum(map(len, texts))
    print(f"{model.name}: {n_tokens} tokens, perplexity {perplexity(texts, truth):.3f}")
    for kind in kinds:
        for who, path in quantized(source, kind, folder, others):
            with LLM(path, memory_budget="unlimited") as llm:
                found = [log_softmax(llm.logits(text)) for text in texts]
            kl = np.concatenate([divergence(a, b) for a, b in zip(truth, found, strict=True)])
            print(
                f"  {kind:5} {who:15} {bits(path):5.2f} bits, KL {kl.mean():.6f} "
                f"+- {kl.std() / np.sqrt(len(kl)):.6f}, perplexity "
                f"{perplexity(texts, found):.3f}",
                flush=True,
            )
            path.unlink()
    source.unlink()


def sampled(llm: LLM, seed: int, length: int) -> list[int]:
    """The ids of a text that the model makes."""
    prompt = llm.encode(_PROMPTS[seed % len(_PROMPTS)]).ids
    params = SamplingParams(temperature=1, length=length, k=0, p=1, seed=seed)
    return [*prompt, *llm.generate(prompt, params).ids]


def in_numbers(model: Path, out: Path) -> None:
    """Writes the model as a GGUF in numbers: as it is stored, or the values of its blocks as F32."""
    files = ModelFiles.find(model)
    if not files.gguf_paths:
        with Checkpoint(files) as checkpoint:
            export_gguf(checkpoint, out)
        return
    with GgufFile(files.path) as file:
        specs = [TensorSpec(t.name, dtype_of(t.dtype), t.shape) for t in file.tensors.values()]
        writer = GgufWriter(out, specs, dict(file.metadata) | {"general.file_type": 0})
        for tensor in file.tensors.values():
            for start in range(0, tensor.shape[0], _ROWS):
                part = tensor.rows(start, min(start + _ROWS, tensor.shape[0]))
                stored = part.array()
                writer.write(stored if part.dtype in DTYPES else as_float32(as_weights(part, stored)))
        writer.close()


def dtype_of(dtype: str) -> str:
    return dtype if dtype in DTYPES else "F32"


def quantized(source: Path, kind: str, folder: Path, texts: list[list[int]]) -> Iterator[tuple[str, Path]]:
    """The model in fewer bits, by each quantizer in turn."""
    with Checkpoint(source, recipe=Recipe(kind)) as checkpoint:
        export_gguf(checkpoint, folder / "ours.gguf")
    with GgufFile(folder / "ours.gguf") as file:
        most, table = file.metadata["general.file_type"], file.tensors["token_embd.weight"].dtype
    yield "tpilite", folder / "ours.gguf"

    @functools.cache
    def weigh() -> dict[str, NDArray[np.float32]]:
        with Checkpoint(source) as checkpoint:
            return importance_of(checkpoint, list(chain(*texts)), EngineConfig(memory_budget="unlimited"))

    with Checkpoint(source, recipe=Recipe(kind, "text", weigh)) as checkpoint:
        export_gguf(checkpoint, folder / "ours.gguf")
    yield "calibrated", folder / "ours.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[kind]
    yield "llama.cpp", by_llama_cpp(source, folder / "theirs.gguf", params)
    params.ftype, params.pure = most, True
    params.token_embedding_type = params.output_tensor_type = _TYPE_NUMBERS[table]
    yield "the same types", by_llama_cpp(source, folder / "theirs.gguf", params)


def by_llama_cpp(source: Path, out: Path, params: llama_cpp.llama_model_quantize_params) -> Path:
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not quantize {source}")
    return out


def bits(path: Path) -> float:
    """Bits of each weight of the matrices."""
    with GgufFile(path) as file:
        matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) == 2]
        return 8 * sum(t.nbytes for t in matrices) / sum(t.shape[0] * t.shape[1] for t in matrices)


def perplexity(texts: Sequence[list[int]], scores: Sequence[NDArray[np.float64]]) -> float:
    losses = [-own[np.arange(len(ids) - 1), ids[1:]] for ids, own in zip(texts, scores, strict=True)]
    return float(np.exp(np.concatenate(losses).mean(dtype=np.float64)))


if __name__ == "__main__":
    main()
