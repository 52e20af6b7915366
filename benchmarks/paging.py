"""The memory window against its bounds: speed by what the disk allows, bytes read, peak memory.

    python benchmarks/paging.py [--figures 1 2 3 4 5] [--new 8] [--rounds 3]

Every measurement is a process of its own; as root it runs in a memory control group, so that the limit is
the kernel's. The disk's rate is measured in the same run, past the page cache, before and after each.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from engines import ONE_THREAD
from models import PRESETS, add_model_options, model_of, write_model

from tpilite.collective import Solo
from tpilite.config.llama import LlamaConfig
from tpilite.engine.compiled import new_products
from tpilite.engine.usage import disk_read_bytes
from tpilite.formats.stored import StoredTensor
from tpilite.formats.uncached import UncachedFile, allocate, buffer_bytes
from tpilite.linear.linear import Linear
from tpilite.machine import limit_blas_threads, peak_rss_bytes, rss_bytes
from tpilite.model.llama import Llama, Segment
from tpilite.weights.assemble import Embedding, assemble, mapped
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.pager import PART_BYTES, Pager
from tpilite.weights.partition import EMBEDDING

_SETTLED_AFTER = 24  # tokens
MARGIN_BYTES = 60_000_000  # what the budget may be exceeded by

# What one of eight ranks holds of Llama 2 70B; the 80 layers are these few again and again.
RANK_OF_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=3584,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=128,
    vocab_size=4000,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """One text made by this process: times, bytes and peak memory."""
    limit_blas_threads()
    with (
        Checkpoint(Path(spec["folder"])) as checkpoint,
        Linear(spec["threads"], new_products(spec["threads"])) as linear,
    ):
        config, tensors = _repeated(checkpoint, spec["layers"] or checkpoint.config.num_hidden_layers)
        start = time.perf_counter()
        with Pager(
            tensors,
            config,
            budget_bytes=spec["budget"],
            window=spec["window"],
            max_rows=spec["prompt"],
            part_bytes=spec["part_bytes"],
            read_method=spec["read_method"],
        ) as pager:
            weights = pager.weights
            if spec["budget"] is spec["window"] is None:  # nothing of the pager
                weights = assemble(tensors, config.num_hidden_layers, mapped)
            embed, model = Embedding(tensors[EMBEDDING]), Llama(config, weights, Solo(), linear)
            cache = model.new_cache()
            ids = np.random.default_rng(0).integers(3, 1000, spec["prompt"]).tolist()
            times, reads, usages = [], [], []
            for _ in range(1 + spec["settle"] + spec["new"]):
                pager.begin_pass(len(ids), cache.nbytes)
                hidden = model.forward(embed(ids), [Segment(cache, len(ids))])
                ids = [int(model.logits(hidden[-1:]).argmax())]
                times.append(time.perf_counter())
                reads.append(disk_read_bytes())
                usages.append(pager.usage())
            # The first pass reads everything, and some memory is taken only then; in the next ones the pager
            # finds out how much of what is resident it should keep packed.
            first, n = spec["settle"], spec["new"]
            before, after = usages[first], usages[-1]
            return {
                "first_s": times[0] - start,
                "token_s": np.diff(times[first:]).tolist(),
                "pass_read_bytes": (after.read_bytes - before.read_bytes) / n,
                "disk_read_bytes": (reads[-1] - reads[first]) / n,
                "pass_load_s": (after.load_s - before.load_s) / n,
                "pass_wait_s": (after.load_wait_s - before.load_wait_s) / n,
                "streaming_bytes": after.streaming_bytes,
                "resident_bytes": after.resident_bytes,
                "window_bytes": after.window_bytes,
                "peak_rss_bytes": peak_rss_bytes(),
                "ids": ids,
            }


def measure_alternating(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens with a budget in which everything fits and without the pager, in turns; the ratio of both."""
    limit_blas_threads()
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(Path(spec["folder"])))
        linear = stack.enter_context(Linear(spec["threads"], new_products(spec["threads"])))
        config, tensors = checkpoint.config, checkpoint.tensors
        pager = stack.enter_context(Pager(tensors, config, budget_bytes=spec["budget"]))
        off = assemble(tensors, config.num_hidden_layers, mapped)
        models = [Llama(config, weights, Solo(), linear) for weights in (pager.weights, off)]
        caches, times = [model.new_cache() for model in models], ([], [])
        for i in range(spec["new"] + 2):
            for which in (0, 1) if i % 2 else (1, 0):
                start = time.perf_counter()
                if which == 0:
                    pager.begin_pass(1, caches[0].nbytes)
                hidden = np.ones((1, config.hidden_size), np.float32)
                models[which].logits(models[which].forward(hidden, [Segment(caches[which], 1)]))
                times[which].append(time.perf_counter() - start)
        on, without = (seconds[2:] for seconds in times)
        return {"token_s": on, "ratio": statistics.median(a / b for a, b in zip(on, without, strict=True))}


def measure_accelerate(spec: dict[str, Any]) -> dict[str, Any]:
    """The same by transformers, with what is above `spec["budget"]` offloaded to the disk by accelerate."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    with tempfile.TemporaryDirectory(dir=Path(spec["folder"]).parent) as offload:
        model = AutoModelForCausalLM.from_pretrained(
            spec["folder"],
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": spec["budget"] - rss_bytes()},
            offload_folder=offload,
        )
        ids, cache = torch.tensor([np.random.default_rng(0).integers(3, 1000, spec["prompt"]).tolist()]), None
        times = []
        with torch.inference_mode():
            for _ in range(spec["new"] + 2):
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                times.append(time.perf_counter())
    return {"token_s": np.diff(times[1:]).tolist(), "peak_rss_bytes": peak_rss_bytes()}


def measure_llama_cpp(spec: dict[str, Any]) -> dict[str, Any]:
    """The same by llama.cpp, which maps its file and leaves it to the kernel."""
    from engines import llama_cpp

    prompt = np.random.default_rng(0).integers(3, 1000, spec["prompt"]).tolist()
    tokens = llama_cpp(Path(spec["folder"]), spec["threads"])
    times = [time.perf_counter() for _ in tokens(prompt, spec["new"] + 2)]
    return {"token_s": np.diff(times[1:]).tolist(), "peak_rss_bytes": peak_rss_bytes()}


MEASURES = {
    "": measure,
    "alternating": measure_alternating,
    "accelerate": measure_accelerate,
    "llama.cpp": measure_llama_cpp,
}


def _repeated(checkpoint: Checkpoint, n_layers: int) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """The model with `n_layers` layers: those that it has, again and again, from the same files."""
    tensors = dict(checkpoint.tensors)
    n_written = checkpoint.config.num_hidden_layers
    for name, tensor in checkpoint.tensors.items():
        _, _, rest = name.partition("model.layers.")
        if rest:
            number, _, inner = rest.partition(".")
            for layer in range(int(number), n_layers, n_written):
                tensors[f"model.layers.{layer}.{inner}"] = tensor
    return replace(checkpoint.config, num_hidden_layers=n_layers), tensors


def run(
    args: argparse.Namespace, folder: Path, limit: int | None = None, kind: str = "", **changes: Any
) -> dict[str, Any]:
    """`measure` in a process of its own, below the limit of a control group where this may make one."""
    spec: dict[str, Any] = {"folder": str(folder), "threads": args.threads, "prompt": args.prompt}
    spec |= {"new": args.new, "settle": 1, "layers": None, "budget": None, "window": None}
    spec |= {"part_bytes": PART_BYTES, "read_method": args.read_method} | changes
    command = [sys.executable, __file__, "--measure", json.dumps(spec), "--kind", kind]
    environment = dict(os.environ) | ONE_THREAD
    if limit is not None:
        # Pages that another run left in the cache would be free of charge to this group.
        for path in (*folder.iterdir(), *folder.parent.glob(f"{folder.name}.gguf")):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with control_group(limit) as group:
        if group is not None:
            command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *command]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        result["group_peak_bytes"] = None if group is None else _group_peak(group)
    result["median_s"] = statistics.median(result["token_s"])
    return result


@contextmanager
def control_group(limit: int | None) -> Iterator[Path | None]:
    """A memory control group of version 1 or 2 below `limit`, removed at the end; None where not allowed."""
    group = None
    if limit is not None and os.geteuid() == 0:
        name = f"tpilite-paging-{os.getpid()}"
        for mount, file in (
            ("memory", "memory.limit_in_bytes"),
            ("", "memory.max"),
            ("unified", "memory.max"),
        ):
            path = Path("/sys/fs/cgroup", mount, name)
            try:
                path.mkdir()
                (path / file).write_text(str(limit))
            except OSError:
                if path.is_dir():
                    path.rmdir()
                continue
            group = path
            break
    if limit is not None and group is None:
        print("no control group may be made here: the limit is not the kernel's")
    try:
        yield group
    finally:
        if group is not None:
            group.rmdir()


def _group_peak(group: Path) -> int | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (group / name).exists():
            return int((group / name).read_text())
    return None


def disk_rate(folder: Path, seconds: float = 1.0) -> float:
    """Bytes a second of one thread that reads the model's file in order, past the page cache."""
    with Checkpoint(folder) as checkpoint:
        stored = checkpoint.tensors[EMBEDDING].file
        file = UncachedFile(stored)
        buffer = memoryview(allocate(buffer_bytes(PART_BYTES)))
        done, start = 0, time.perf_counter()
        for offset in range(0, stored.nbytes - PART_BYTES, PART_BYTES):
            file.read(buffer, offset, PART_BYTES)
            done += PART_BYTES
            if time.perf_counter() - start > seconds:
                break
        rate = done / (time.perf_counter() - start)
        file.close()
    return rate


def weights_bytes(folder: Path) -> int:
    with Checkpoint(folder) as checkpoint:
        return checkpoint.nbytes


def line(what: str, value: float, bound: float, unit: str) -> None:
    print(
        f"  {what:<52} {value:8.3f} {unit:<3} bound {bound:8.3f} {unit}  {'ok' if value <= bound else 'OVER'}"
    )


def spread(rows: list[dict[str, Any]]) -> str:
    values = [s for row in rows for s in row["token_s"]]
    return f"{len(values)} tokens, {min(values):.3f} to {max(values):.3f} s"


def figures_1_and_3(args: argparse.Namespace, folder: Path) -> None:
    weights = weights_bytes(folder)
    limit = int(args.share * weights)
    budget = limit - MARGIN_BYTES
    rates, paged, in_memory = [], [], []
    for _ in range(args.rounds):
        rates.append(disk_rate(folder))
        paged.append(run(args, folder, limit, budget=budget, settle=_SETTLED_AFTER))
        rates.append(disk_rate(folder))
        in_memory.append(run(args, folder))
    rate = statistics.median(rates)
    compute = statistics.median(row["median_s"] for row in in_memory)
    best = statistics.median(row["median_s"] for row in paged)
    row = paged[-1]
    disk_s = row["streaming_bytes"] / rate
    print(f"1. limit {limit / 1e6:.0f} MB of {weights / 1e6:.0f} MB of weights, budget {budget / 1e6:.0f} MB")
    print(
        f"  disk {rate / 1e9:.2f} GB/s ({min(rates) / 1e9:.2f} to {max(rates) / 1e9:.2f}), resident "
        f"{row['resident_bytes'] / 1e6:.0f} MB, streaming {row['streaming_bytes'] / 1e6:.0f} MB, first pass "
        f"{row['first_s']:.2f} s; {spread(paged)}"
    )
    line("time per token", best, 1.25 * max(disk_s, compute), "s")
    print(
        f"    which is {best / max(disk_s, compute):.2f} of max(disk {disk_s:.3f} s, compute {compute:.3f} s)"
    )
    print(f"    the disk was read for {row['pass_load_s']:.3f} s, of which waited {row['pass_wait_s']:.3f} s")
    line("bytes read per pass", row["pass_read_bytes"] / 1e6, 1.05 * row["streaming_bytes"] / 1e6, "MB")
    line("  by the kernel's count", row["disk_read_bytes"] / 1e6, 1.05 * row["streaming_bytes"] / 1e6, "MB")
    peak = max(row["peak_rss_bytes"] for row in paged)
    for peer in args.peers:
        if peer == "llama.cpp":
            from to_gguf import write_gguf

            write_gguf(folder, Path(f"{folder}.gguf"))
        theirs = run(args, folder, limit, peer, budget=budget, new=3)["median_s"]
        print(f"    {peer}: {theirs:.3f} s per token, {theirs / best:.1f} times ours")
    print("3. peak memory")
    line("of the process", peak / 1e6, (budget + MARGIN_BYTES) / 1e6, "MB")
    if row["group_peak_bytes"]:
        line("of the control group", max(r["group_peak_bytes"] for r in paged) / 1e6, limit / 1e6, "MB")


def figure_2(args: argparse.Namespace, folder: Path) -> None:
    rows, in_memory = [], []
    for _ in range(args.rounds):
        rows.append(run(args, folder, window=2))
        in_memory.append(run(args, folder))
    compute = statistics.median(row["median_s"] for row in in_memory)
    load = statistics.median(row["pass_load_s"] for row in rows)
    wait = statistics.median(row["pass_wait_s"] for row in rows)
    token = statistics.median(row["median_s"] for row in rows)
    print(f"2. window of 2: {token:.3f} s per token; {spread(rows)}")
    print(
        f"  loads {load:.3f} s, compute {compute:.3f} s, streaming {rows[0]['streaming_bytes'] / 1e6:.0f} MB"
    )
    line("waiting for loads", wait, load - 0.8 * compute, "s")
    print(f"  peak memory {max(row['peak_rss_bytes'] for row in rows) / 1e6:.0f} MB")


def figure_4(args: argparse.Namespace, folder: Path) -> None:
    rows = [
        run(args, folder, kind="alternating", budget=2 * weights_bytes(folder), new=max(16, args.new))
        for _ in range(args.rounds)
    ]
    print(f"4. everything fits: {spread(rows)}")
    line("time with a budget, of that without", statistics.median(row["ratio"] for row in rows), 1.03, "")


def figure_5(args: argparse.Namespace) -> None:
    folder = write_model(args.dir / "llama2-70b-rank-bf16", RANK_OF_70B)
    row = run(args, folder, window=2, layers=80, new=2)
    print(f"5. one of 8 ranks of Llama 2 70B, 80 layers, window of 2: {row['median_s']:.2f} s per token")
    line("peak memory", row["peak_rss_bytes"] / 1e6, 1000, "MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--figures", nargs="+", type=int, choices=range(1, 6), default=[1, 2, 4, 5])
    parser.add_argument("--share", type=float, default=0.6, help="memory, of the weights (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt", type=int, default=64, help="tokens (%(default)s)")
    parser.add_argument("--new", type=int, default=8, help="tokens per run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read_method", help="direct, nocache, advise or plain (the best there is)")
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[],
        choices=("accelerate", "llama.cpp"),
        help="compare figure 1 with them",
    )
    parser.add_argument("--kind", default="", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.kind](json.loads(args.measure))))
        return
    assert args.model in PRESETS
    folder = model_of(args)
    print(
        f"{folder.name}, {args.threads} threads of {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}, NumPy {np.__version__}, {args.prompt} prompt tokens, "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    if {1, 3} & set(args.figures):
        figures_1_and_3(args, folder)
    if 2 in args.figures:
        figure_2(args, folder)
    if 4 in args.figures:
        figure_4(args, folder)
    if 5 in args.figures:
        figure_5(args)


if __name__ == "__main__":
    main()
