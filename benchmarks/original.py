"""Two ranks on one machine against TPI-LLM's own figures on the same shape, which are in `GOALS`.

    python benchmarks/original.py [--tokenizer tokenizer.model] [--rounds 3]

207 million weights in f32, a memory window of two blocks, one thread for each rank: what `tpilite-node
--local 2 --memory_window 2 --threads 1` runs, in processes of their own. Peak memory is the kernel's VmHWM.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from engines import ONE_THREAD
from models import add_model_options, model_of
from start import ROOT, environment, with_tokenizer

from tpilite import SamplingParams
from tpilite.cli.main import hosted
from tpilite.cli.options import parse
from tpilite.engine.session import Session
from tpilite.formats.model_files import ModelFiles
from tpilite.machine import limit_blas_threads

# What TPI-LLM took: 480 to 640 ms per token, 640 MiB in rank 0 and 370 MiB in rank 1. An eighth and a third.
GOALS = {"token_ms": (480 / 8, 640 / 8), "rank0_mib": (640 / 3,), "rank1_mib": (370 / 3,)}


def peak_mib(process: int | str) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(folder: Path, options: list[str], n_prompt: int, n_new: int) -> dict[str, Any]:
    """One text by rank 0 in this process and rank 1 in another."""
    args = parse(["--local", "2", "--model_path", str(folder), *options])
    with ExitStack() as stack:
        files = ModelFiles.find(folder)
        host = stack.enter_context(hosted(args, files, 2, stack))
        session = Session(files, host.config, host.rank)
        session.open()
        (worker,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        prompt = np.random.default_rng(0).integers(3, 1000, n_prompt).tolist()
        request = session.start(prompt, SamplingParams(temperature=0, length=n_new + 1, ignore_eos=True))
        times = []
        for _ in session.engine.run(request):
            times.append(time.perf_counter())
        stats, n = session.completion(request).stats, n_new + 1
        return {
            "token_ms": [1e3 * gap for gap in np.diff(times).tolist()],
            "rank0_mib": [peak_mib("self")],
            "rank1_mib": [peak_mib(worker)],
            "compute_ms": 1e3 * stats.compute_s / n,
            "load_wait_ms": 1e3 * stats.load_wait_s / n,
            "network_wait_ms": 1e3 * stats.network_wait_s / n,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.set_defaults(model="tpi-207m", dtype="F32")
    parser.add_argument("--tokenizer", type=Path, help="one that fits the model, for its memory")
    parser.add_argument("--prompt", type=int, default=8, help="tokens (%(default)s)")
    parser.add_argument("--new", type=int, default=32, help="tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=int, default=2, help="blocks of weights in memory; 0: all")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.child or model_of(args)
    options = ["--threads", "1", "--save_dir", str(model_of(args) / "split")]
    options += ["--memory_window", str(args.window)] if args.window else []
    if args.child:
        limit_blas_threads()
        sys.argv[0] = str(ROOT / "bin" / "tpilite-node")  # what rank 1 is started as
        print(json.dumps(measure(folder, options, args.prompt, args.new)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        if args.tokenizer:
            folder = with_tokenizer(folder, args.tokenizer, Path(temporary))
        command = [sys.executable, *sys.argv, "--child", str(folder)]
        variables = environment(**ONE_THREAD)
        for _ in range(args.rounds):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables)
            rows.append(json.loads(done.stdout))
    for figure, goals in GOALS.items():
        values = [value for row in rows for value in row[figure]]
        median = statistics.median(values)
        print(
            f"{figure:>16} {median:8.1f} ({min(values):.1f} to {max(values):.1f})   "
            f"goal {' to '.join(f'{goal:.0f}' for goal in goals)}  {'ok' if median <= goals[-1] else 'OVER'}"
        )
    for name in ("compute_ms", "load_wait_ms", "network_wait_ms"):
        print(f"{name:>16} {statistics.median(row[name] for row in rows):8.1f} of rank 0, per pass")


if __name__ == "__main__":
    main()
