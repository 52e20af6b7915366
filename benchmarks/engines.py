"""One engine on one model in a process of its own: time to read a prompt, time per new token, peak memory.

    python benchmarks/engines.py ENGINE MODEL_DIR --prompt 128 --new 16 --threads 2

prints one JSON object. The other benchmarks run this in turns and compare; peers must be installed.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# In the environment of a process with threads of its own: its BLAS has no more.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "VECLIB_MAXIMUM_THREADS": "1"}

Tokens = Callable[[list[int], int], Iterator[int]]  # prompt, number of new ones -> each as it is made


def tpilite(folder: Path, threads: int) -> Tokens:
    from tpilite import LLM, SamplingParams

    llm = LLM(folder, threads=threads)

    def tokens(prompt: list[int], n_new: int) -> Iterator[int]:
        params = SamplingParams(temperature=0, length=n_new, ignore_eos=True)
        for output in llm.engine.run(llm.start(prompt, params)):
            yield output.token_id

    return tokens


def tpilite_numpy(folder: Path, threads: int) -> Tokens:
    """As if there had been no compiler when it was installed."""
    os.environ["TPILITE_NATIVE"] = "0"
    return tpilite(folder, threads)


def transformers(folder: Path, threads: int, dtype: str = "bfloat16") -> Tokens:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    def tokens(prompt: list[int], n_new: int) -> Iterator[int]:
        ids, cache = torch.tensor([prompt]), None
        with torch.inference_mode():
            for _ in range(n_new):
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                yield int(ids)

    return tokens


def transformers_f32(folder: Path, threads: int) -> Tokens:
    return transformers(folder, threads, "float32")


def llama_cpp(folder: Path, threads: int) -> Tokens:
    """llama.cpp on a GGUF, or on the one that to_gguf.py writes beside a folder, memory-mapped."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    path = folder if folder.suffix == ".gguf" else Path(f"{folder}.gguf")
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 1024
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def tokens(prompt: list[int], n_new: int) -> Iterator[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        ids = prompt
        for _ in range(n_new):
            array = (llama_cpp.llama_token * len(ids))(*ids)
            assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))) == 0
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (n_vocab,))
            ids = [int(logits.argmax())]
            yield ids[0]

    return tokens


ENGINES = {
    "tpilite": tpilite,
    "tpilite-numpy": tpilite_numpy,
    "transformers-bf16": transformers,
    "transformers-f32": transformers_f32,
    "llama.cpp": llama_cpp,
}


def measure(engine: str, folder: Path, threads: int, n_prompt: int, n_new: int) -> dict[str, Any]:
    """Times of this process, by the clock, and its peak memory."""
    start = time.perf_counter()
    tokens = ENGINES[engine](folder, threads)
    loaded = time.perf_counter()
    prompt = np.random.default_rng(0).integers(3, 1000, n_prompt).tolist()
    for _ in tokens(prompt[:2], 2):  # pages in, buffers made
        pass
    asked = time.perf_counter()
    times = [time.perf_counter() for _ in tokens(prompt, n_new)]
    gaps = np.diff(times).tolist()
    return {
        "engine": engine,
        "load_s": loaded - start,
        "prompt_s": times[0] - asked,
        "prompt_tokens_per_s": n_prompt / (times[0] - asked),
        "token_s": statistics.median(gaps) if gaps else None,
        "tokens_per_s": 1 / statistics.median(gaps) if gaps else None,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (1 << 20 if sys.platform == "darwin" else 1 << 10),
    }


def in_turns(
    engines: list[str], folder: Path, threads: int, n_prompt: int, n_new: int, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """The measurements of each engine, each in a fresh process, in turns, `rounds` times."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for _ in range(rounds):
        for engine in engines:
            command = [sys.executable, __file__, engine, str(folder)]
            command += ["--threads", str(threads), "--prompt", str(n_prompt), "--new", str(n_new)]
            environment = dict(os.environ) | (ONE_THREAD if engine.startswith("tpilite") else {})
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found[engine].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def report(
    found: dict[str, list[dict[str, Any]]],
    figures: list[str],
    conditions: dict[str, Any],
    json_file: Path | None,
) -> None:
    """Prints each figure's median with its least and greatest value, and the ratio of the first engine."""
    if json_file is not None:
        json_file.write_text(json.dumps({"conditions": conditions, "runs": found}, indent=2) + "\n")
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    first = next(iter(found))
    for figure in figures:
        for engine, rows in found.items():
            values = [row[figure] for row in rows]
            ratios = [a[figure] / b[figure] for a, b in zip(found[first], rows, strict=True)]
            print(
                f"{figure:>20}  {engine:<18} {statistics.median(values):10.2f} "
                f"({min(values):.2f} to {max(values):.2f})"
                + (f"   {first} / {engine}: {statistics.median(ratios):.2f}" if engine != first else "")
            )


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader must know of where the figures come from."""
    return {
        "model": args.model,
        "dtype": args.dtype,
        "threads": args.threads,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "rounds": args.rounds,
    }


def add_run_options(parser: argparse.ArgumentParser, engines: list[str]) -> None:
    """The options that the comparing benchmarks share."""
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=engines, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write every measurement here")


def compare(args: argparse.Namespace, folder: Path, n_prompt: int, n_new: int, figures: list[str]) -> None:
    """Runs the engines in turns as the options say, and reports."""
    found = in_turns(args.engines, folder, args.threads, n_prompt, n_new, args.rounds)
    where = conditions(args) | {"prompt tokens": n_prompt, "new tokens": n_new}
    report(found, figures, where, args.json)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--new", type=int, default=16)
    args = parser.parse_args()
    print(json.dumps(measure(args.engine, args.folder, args.threads, args.prompt, args.new)))
