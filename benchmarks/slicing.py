"""How fast a model is sliced, against how fast the same disk copies it in the same run.

    python benchmarks/slicing.py [--model tinyllama-1.1b --layers 8] [--world_size 3] [--folder DIR]
    python benchmarks/slicing.py --quantize q4_k [--world_size 1]

Copy and slicing take turns. Both begin with the source out of the page cache and end when what they wrote
is on the disk of --folder; rates are of the checkpoint's bytes. "A core" is by the processor's time, all
threads together. The last line is the most memory that slicing took, beyond what the process had before.
"""

import argparse
import multiprocessing
import multiprocessing.connection
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from models import add_model_options, model_of

from tpilite.quantize.recipe import KINDS, Recipe
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import Partition
from tpilite.weights.slicer import ensure_slices

_BUFFER_BYTES = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_options(parser)
    parser.set_defaults(model="tinyllama-1.1b")
    parser.add_argument("--world_size", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where copy and slices go; default: beside the model")
    parser.add_argument(
        "--quantize", choices=tuple(KINDS), help="into blocks of fewer bits (as it is stored)"
    )
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    model = model_of(args)
    source = model / "model.safetensors"
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    print(f"{model.name}: {source.stat().st_size / 1e6:.0f} MB for {args.world_size} ranks")
    recipe = None if args.quantize is None else Recipe(args.quantize)
    rates: dict[str, list[float]] = {"copy": [], "slice": [], "slice, a core": []}
    with tempfile.TemporaryDirectory(dir=args.folder or model.parent) as temporary:
        target = Path(temporary)
        for _ in range(args.runs):
            rates["copy"].append(rate_of(lambda: copy(source, target / "copy"), source, target))
            before_s = time.process_time()
            rates["slice"].append(
                rate_of(lambda: cut(model, args.world_size, target, recipe), source, target)
            )
            rates["slice, a core"].append(source.stat().st_size / 1e6 / (time.process_time() - before_s))
        peak_bytes = in_a_process_of_its_own(model, args.world_size, target, recipe)
    for name, runs in rates.items():
        print(f"{name}: {statistics.median(runs):.0f} MB/s (from {min(runs):.0f} to {max(runs):.0f})")
    ratio = statistics.median(a / b for a, b in zip(rates["slice"], rates["copy"], strict=True))
    print(f"slicing runs at {ratio:.2f} of the copy's rate and takes {peak_bytes / 1e6:.0f} MB of memory")


def rate_of(work: Callable[[], None], source: Path, target: Path) -> float:
    """Megabytes of the source per second, from a cold cache to the disk; what was written is removed."""
    os.sync()
    with source.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    for path in target.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return source.stat().st_size / 1e6 / seconds


def copy(source: Path, target: Path) -> None:
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while n := reader.readinto(buffer):
            writer.write(buffer[:n])
        os.fsync(writer.fileno())


def cut(model: Path, world_size: int, target: Path, recipe: Recipe | None) -> None:
    with Checkpoint(model, recipe=recipe) as checkpoint:
        ensure_slices(checkpoint, Partition.of(checkpoint.config, world_size), target / "split")


def in_a_process_of_its_own(model: Path, world_size: int, target: Path, recipe: Recipe | None) -> int:
    """The memory that slicing adds to a process that does nothing else."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=report_peak, args=(theirs, model, world_size, target, recipe))
    process.start()
    peak_bytes = int(ours.recv())
    process.join()
    return peak_bytes


def report_peak(
    pipe: multiprocessing.connection.Connection,
    model: Path,
    world_size: int,
    target: Path,
    recipe: Recipe | None,
) -> None:
    before = peak_rss_bytes()
    cut(model, world_size, target, recipe)
    pipe.send(peak_rss_bytes() - before)


def peak_rss_bytes() -> int:
    """The most memory that this program has had; Linux's ru_maxrss has that of its parent in it."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
