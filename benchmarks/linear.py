"""Weights per second through `linear`, beside what the machine reads and multiplies in the same run.

    python benchmarks/linear.py --dtypes bf16,f16,f32 --rows 1,4,16,128,512 --threads 1,2

Beside these three, of which one must come first, there are `packed` (bfloat16 in twelve bits) and the block
types, by their names.
One sample is one call: the matrices of a layer of the model's shape that share an x (q, k, v; o; gate, up;
down), of random weights. Several layers take turns, so that no cache holds them, and so do the cases. A rate
is that of a layer whose calls take the median of their samples each, or the quartiles.
`read` is the reading alone of the first dtype's weights, as fast as NumPy can; `sgemm` the product of the
same shapes in float32, each thread by one BLAS call per matrix on its share of the matrix's rows.

On Linux a sample counts only if no thread of this process waited for a CPU for more than 3 % of it: on a busy
machine the others say nothing of this program. How many counted is printed; where it is none, the least
disturbed one stands for them.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from models import PRESETS

from tpilite.config.llama import LlamaConfig
from tpilite.engine.compiled import new_products
from tpilite.linear.block_types import BLOCK_TYPES, BlockType
from tpilite.linear.linear import Linear
from tpilite.linear.matrix import Blocks, Matrix, Weights
from tpilite.linear.packing import pack, packed_bytes
from tpilite.linear.plans import KERNELS
from tpilite.machine import limit_blas_threads

N_LAYERS = 4
MAX_WAIT = 0.03
SGEMM_ROWS = 16
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "packed": 1.5} | {
    name: kind.n_bytes / kind.n_weights for name, kind in BLOCK_TYPES.items()
}

Layer = list[list[Weights]]  # matrices that share one x


@dataclass
class Case:
    """What is done to the matrices of a layer, by layer and group, and how long it took each time."""

    what: str
    rows: int
    threads: int
    run: Callable[[int, int], object]
    kernel: str = ""
    linear: Linear | None = None
    samples: dict[int, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def rates(self, sizes: list[int]) -> list[float]:
        """Weights per second: the lower quartile, the median, the upper quartile."""
        quartiles = [statistics.quantiles(2 * self.counting(group), n=4) for group in range(len(sizes))]
        return [sum(sizes) / sum(seconds) for seconds in reversed(list(zip(*quartiles, strict=True)))]

    def counting(self, group: int) -> list[float]:
        """The seconds of the samples that count."""
        samples = self.samples[group]
        calm = [seconds for seconds, waited in samples if waited <= MAX_WAIT * seconds]
        return calm or [min(samples, key=lambda sample: sample[1] / sample[0])[0]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama3.2-1b", choices=PRESETS, help="the shape (%(default)s)")
    parser.add_argument("--dtypes", default="bf16,f16,f32", help="(%(default)s)")
    parser.add_argument("--rows", default="1,4,16,128,512", help="of x (%(default)s)")
    parser.add_argument("--threads", default="1,2", help="(%(default)s)")
    parser.add_argument("--kernels", default="default", help="of default,numpy,bits,cast (%(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="in all (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    args = parser.parse_args()
    limit_blas_threads()
    conditions = {
        "model": args.model,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load": round(os.getloadavg()[0], 2),
    }
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    layers = {dtype: random_layers(PRESETS[args.model], dtype) for dtype in args.dtypes.split(",")}
    sizes = [sum(math.prod(w.shape) for w in group) for group in next(iter(layers.values()))[0]]
    with TemporaryDirectory() as folder:
        cases = make_cases(args, layers, Path(folder) / "linear.json")
        sample(cases, len(sizes), args.seconds)
    found = [row(case, cases, sizes, next(iter(layers))) for case in cases]
    for case in cases:
        if case.linear:
            case.linear.close()
    if args.json:
        args.json.write_text(json.dumps(conditions | {"cases": found}, indent=1))


def random_layers(config: LlamaConfig, dtype: str) -> list[Layer]:
    rng = np.random.default_rng(0)
    d, f = config.hidden_size, config.intermediate_size
    n_q, n_kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes = [[(n_q, d), (n_kv, d), (n_kv, d)], [(d, n_q)], [(f, d), (f, d)], [(d, f)]]

    def weights(shape: tuple[int, int]) -> Weights:
        if dtype in BLOCK_TYPES:
            return random_blocks(rng, BLOCK_TYPES[dtype], shape)
        w = np.resize(rng.standard_normal(100_003, np.float32) * np.float32(0.02), shape)
        if dtype in ("bf16", "packed"):
            rows = w.view(np.uint16)[:, 1::2].copy()
            packed = pack(rows, bytearray(packed_bytes(*shape))) if dtype == "packed" else rows
            assert packed is not None
            return packed
        return w.astype({"f16": np.float16, "f32": np.float32}[dtype])

    return [[[weights(shape) for shape in group] for group in shapes] for _ in range(N_LAYERS)]


def random_blocks(rng: np.random.Generator, kind: BlockType, shape: tuple[int, int]) -> Blocks:
    """Blocks of any codes, whose scales are not so random that sums become infinite."""
    n_rows, n_cols = shape
    few = rng.integers(0, 256, (1009, kind.n_bytes), np.uint8)
    weights = kind.dequantize(few)
    few = few[(np.abs(weights) < 1).all(axis=1)]
    blocks = np.resize(few, (n_rows, n_cols // kind.n_weights * kind.n_bytes))
    return Blocks(kind, blocks, n_cols)


def make_cases(args: argparse.Namespace, layers: dict[str, list[Layer]], cache: Path) -> list[Case]:
    some = next(iter(layers.values()))
    cases = []
    for n in map(int, args.threads.split(",")):
        threads = Linear(n)
        cases.append(Case("read", 0, n, reading(threads, some), linear=threads))
        for t in map(int, args.rows.split(",")):
            if t >= SGEMM_ROWS:
                cases.append(Case("sgemm", t, n, multiplying(threads, some[0], t)))
            for dtype, its_layers in layers.items():
                for kernel in args.kernels.split(","):
                    products = new_products(n) if kernel == "default" else None
                    linear = Linear(n, products, kernel=kernel if kernel in KERNELS else None, cache=cache)
                    cases.append(Case(dtype, t, n, passing(linear, its_layers, t), kernel, linear))
    return cases


def reading(threads: Linear, layers: list[Layer]) -> Callable[[int, int], object]:
    def run(layer: int, group: int) -> None:
        for w in layers[layer][group]:
            assert isinstance(w, np.ndarray)
            words = w.reshape(-1).view(np.uint64)
            threads.share(
                len(words), lambda start, stop, words=words: np.bitwise_or.reduce(words[start:stop])
            )

    return run


def multiplying(threads: Linear, layer: Layer, n_rows: int) -> Callable[[int, int], object]:
    wide = [[np.resize(np.float32(0.5), w.shape) for w in group] for group in layer]
    x = {w.shape[1]: np.ones((n_rows, w.shape[1]), np.float32) for group in wide for w in group}
    out = {w.shape[0]: np.empty((n_rows, w.shape[0]), np.float32) for group in wide for w in group}

    def run(_: int, group: int) -> None:
        for w in wide[group]:
            a, y = x[w.shape[1]], out[w.shape[0]]
            threads.share(w.shape[0], lambda i, j, a=a, w=w, y=y: np.matmul(a, w[i:j].T, out=y[:, i:j]))

    return run


def passing(linear: Linear, layers: list[Layer], n_rows: int) -> Callable[[int, int], object]:
    rng = np.random.default_rng(1)
    matrices = [[tuple(Matrix.of(w) for w in group) for group in layer] for layer in layers]
    n_cols = {w.shape[1] for group in layers[0] for w in group}
    x = {n: rng.standard_normal((n_rows, n), np.float32) for n in n_cols}
    return lambda layer, group: linear(x[matrices[0][group][0].n_cols], *matrices[layer][group])


def sample(cases: list[Case], n_groups: int, seconds: float) -> None:
    for case in cases:
        case.run(0, 0)
    end = time.perf_counter() + seconds
    i = 0
    while i < n_groups or time.perf_counter() < end:
        layer, group = i // n_groups % N_LAYERS, i % n_groups
        for case in cases:
            waited, start = waited_s(), time.perf_counter()
            case.run(layer, group)
            elapsed = time.perf_counter() - start
            case.samples[group].append((elapsed, waited_s() - waited))
        i += 1


def waited_s() -> float:
    """For how long threads of this process were ready and had no CPU; 0 where the system does not tell."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except OSError:  # the thread has just ended
            continue
    return total / 1e9


def row(case: Case, cases: list[Case], sizes: list[int], read_dtype: str) -> dict[str, Any]:
    """The figures of one case, which it prints."""
    low, rate, high = case.rates(sizes)
    n, n_all = (sum(map(len, lists)) for lists in (map(case.counting, case.samples), case.samples.values()))
    found = asdict(replace(case, run=None, linear=None, samples={}))  # type: ignore[arg-type]
    found |= {"weights_per_s": rate, "quartiles": [low, high], "samples": n, "disturbed": n_all - n}
    text = f"{case.threads} threads  {case.what:>5} {case.kernel:<9}"
    text += f" {case.rows:4d} rows" if case.rows else " " * 10
    text += f" {rate / 1e9:7.3f} ({low / 1e9:.3f} to {high / 1e9:.3f}) 10^9 weights/s"

    def beside(what: str, rows: int) -> float:
        (other,) = (c for c in cases if (c.what, c.rows, c.threads) == (what, rows, case.threads))
        return other.rates(sizes)[1]

    if case.rows <= 1:
        found["bytes_per_s"] = rate * BYTES[case.what if case.kernel else read_dtype]
        text += f", {found['bytes_per_s'] / 1e9:.1f} GB/s"
        if case.kernel:
            found["of_read"] = found["bytes_per_s"] / (beside("read", 0) * BYTES[read_dtype])
            text += f", {found['of_read']:.2f} of reading"
    else:
        found["flops"] = 2 * case.rows * rate
        text += f", {found['flops'] / 1e9:.0f} GFLOP/s"
        if case.kernel and case.rows >= SGEMM_ROWS:
            found["of_sgemm"] = rate / beside("sgemm", case.rows)
            text += f", {found['of_sgemm']:.2f} of sgemm"
    if case.kernel:
        found["plan"] = [str(plan) for plan in case.linear.plans.values()] if case.linear else []
    print(f"{text}  [{n} of {n_all}]")
    return found


if __name__ == "__main__":
    main()
