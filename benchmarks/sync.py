"""How fast workers get their slices over loopback, and what that costs in CPU time.

    python benchmarks/sync.py [--folder DIR] [--megabytes 512] [--runs 5]

The server is this process, each worker one of its own. Rates are of all workers together, from their start
of the transfer to the last one's end with its files checked and on the disk of --folder.
"""

import argparse
import hashlib
import multiprocessing
import multiprocessing.connection
import platform
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from tpilite.cluster.fetch import fetch_slices
from tpilite.cluster.slice_server import SliceServer
from tpilite.config.llama import LlamaConfig
from tpilite.weights.partition import Partition
from tpilite.weights.slices import FileEntry, Manifest, node_folder

TOKEN = "of this benchmark"
N_LAYERS = 4
WORKERS = (1, 3)
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    vocab_size=256,
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--folder", type=Path, help="where slices are kept; default: the temporary folder")
    options.add_argument("--megabytes", type=int, default=512, help="of each worker's slices")
    options.add_argument("--runs", type=int, default=5)
    arguments = options.parse_args()
    print(f"{platform.machine()}, {multiprocessing.cpu_count()} CPUs, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        source, target = Path(temporary, "split"), Path(temporary, "workers")
        ranks = range(1, max(WORKERS) + 1)
        for rank in ranks:
            make_slices(source, rank, arguments.megabytes * 1_000_000)
        with SliceServer(ranks, TOKEN, 0, host="127.0.0.1") as server:
            for rank in ranks:
                server.publish(rank, node_folder(source, rank))
            for n_workers in WORKERS:
                runs = []
                for _ in range(arguments.runs):
                    runs.append(run(server.port, target, n_workers, arguments.megabytes))
                    shutil.rmtree(target)
                print_row(n_workers, runs)


def make_slices(root: Path, rank: int, n_bytes: int) -> None:
    folder = node_folder(root, rank)
    folder.mkdir(parents=True)
    names = [f"layers.{i}.{part}.safetensors" for i in range(N_LAYERS) for part in ("attn", "mlp")]
    names.append("head.safetensors")
    files = {}
    for name in names:
        content = random.Random(f"{rank} {name}").randbytes(n_bytes // len(names))
        (folder / name).write_bytes(content)
        files[name] = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    partition = Partition.of(CONFIG, max(WORKERS) + 1)
    (folder / "manifest.json").write_bytes(Manifest(rank, partition, "0" * 64, CONFIG, files).to_json())


def run(port: int, target: Path, n_workers: int, megabytes: int) -> tuple[float, float, float]:
    """Megabytes per second, and seconds of CPU per gigabyte of the server and of the workers."""
    context = multiprocessing.get_context("spawn")
    workers = []
    for rank in range(1, n_workers + 1):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, port, rank, target))
        process.start()
        assert ours.recv() == "ready"
        workers.append((process, ours))
    cpu_before, start = time.process_time(), time.perf_counter()
    for _, pipe in workers:
        pipe.send("go")
    cpu_workers = sum(pipe.recv() for _, pipe in workers)
    seconds = time.perf_counter() - start
    cpu_server = time.process_time() - cpu_before
    for process, _ in workers:
        process.join()
    gigabytes = n_workers * megabytes / 1000
    return 1000 * gigabytes / seconds, cpu_server / gigabytes, cpu_workers / gigabytes


def work(pipe: multiprocessing.connection.Connection, port: int, rank: int, target: Path) -> None:
    pipe.send("ready")
    pipe.recv()
    before = time.process_time()
    fetch_slices("127.0.0.1", port, rank, TOKEN, target)
    pipe.send(time.process_time() - before)


def print_row(n_workers: int, runs: list[tuple[float, float, float]]) -> None:
    rates, server, workers = zip(*runs, strict=True)
    print(
        f"{n_workers} worker(s): {statistics.median(rates):.0f} MB/s "
        f"(from {min(rates):.0f} to {max(rates):.0f}), "
        f"CPU s/GB: server {statistics.median(server):.2f}, workers {statistics.median(workers):.2f}"
    )


if __name__ == "__main__":
    main()
