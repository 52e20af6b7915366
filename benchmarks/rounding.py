"""What rounding costs: sums between ranks by `--payload`, keys and values by `--kv_dtype`, against float32.

    python benchmarks/rounding.py MODEL [--text FILE] [--tokens 1024] [--ranks 2,4] [--allreduce scatter]

MODEL is a folder or a GGUF; the text is read by it, `--chunk` tokens a pass. Of the scores of each place:
the mean and the greatest Kullback-Leibler divergence from those in float32, the perplexity, and how often
the likeliest token is another one. The ranks are threads of this process over TCP, each on its slice.
Bytes a token are what the kernel says that all ranks received in a pass of one row, with what rank 0 asks
and is told; of the sums alone, they are computed. Memory is the cache's for the text, and for a position.
"""

import argparse
import itertools
import socket
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from allreduce import close_all, sent_bytes, tcp_pair
from divergence import divergence, log_softmax

from tpilite.arrays import Array
from tpilite.cluster.sums import new_sums
from tpilite.collective import Solo
from tpilite.engine.config import EngineConfig
from tpilite.engine.engine import Engine
from tpilite.engine.rank import Rank
from tpilite.engine.sampling import SamplingParams
from tpilite.engine.sequence import Sequence
from tpilite.formats.model_files import ModelFiles
from tpilite.model.kept import KV_DTYPES
from tpilite.net.channel import Channel
from tpilite.net.codecs import CODECS
from tpilite.net.group import MemberGroup, RootGroup
from tpilite.text.load import load_tokenizer
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.slicer import ensure_slices
from tpilite.weights.slices import SliceFolder, node_folder

_TEXT = Path(__file__).resolve().parents[1] / "docs" / "design.md"
_N_NEW = 64
# struct tcp_info of Linux: the bytes that were received, with those of earlier pieces sent again left out.
_RECEIVED_AT, _TCP_INFO_BYTES = 128, 232


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, default=_TEXT, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text, at most (%(default)s)")
    parser.add_argument("--chunk", type=int, default=256, help="rows a pass (%(default)s)")
    parser.add_argument("--ranks", default="2,4", help="separated by commas (%(default)s)")
    parser.add_argument("--allreduce", default="scatter", help="(%(default)s)")
    args = parser.parse_args()
    files = ModelFiles.find(args.model)
    with Checkpoint(files) as checkpoint:
        tokenizer = load_tokenizer(files, checkpoint.config.vocab_size)
        assert tokenizer is not None, "the model has no tokenizer"
        ids = tokenizer.encode(args.text.read_text())[: args.tokens]
        print(f"# {files.path.name}, {args.text.name}, {len(ids)} tokens, {args.chunk} rows a pass")
        exact: Array | None = None
        for kv_dtype in KV_DTYPES:
            scores, memory = alone(checkpoint, ids, args.chunk, kv_dtype)
            exact = scores if exact is None else exact
            print(f"--kv_dtype {kv_dtype:5} {compared(exact, scores, ids)}  {memory}", flush=True)
        for n_ranks in map(int, args.ranks.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                ensure_slices(checkpoint, checkpoint.partition(n_ranks), Path(folder))
                of_ranks: Array | None = None
                for payload in CODECS:
                    scores, n_bytes = together(checkpoint, Path(folder), n_ranks, payload, ids, args)
                    of_ranks = scores if of_ranks is None else of_ranks
                    what = f"{n_ranks} ranks --payload {payload:4}"
                    print(f"{what} {compared(of_ranks, scores, ids)}  {n_bytes}", flush=True)


def alone(checkpoint: Checkpoint, ids: list[int], chunk: int, kv_dtype: str) -> tuple[Array, str]:
    """The scores of one rank with such a cache, and what that takes."""
    config = checkpoint.config
    with Rank(config, checkpoint.tensors, 0, Solo(), EngineConfig(kv_dtype=kv_dtype)) as rank:
        engine = Engine(config, rank, max_rows=chunk)
        engine.open()
        scores = engine.logits(ids)
        cache = rank.runner.model.new_cache()
        memory = f"{cache.position_bytes} bytes a position, {cache.bytes_for(len(ids)) / 1e6:.2f} MB"
        return scores, memory


def together(
    checkpoint: Checkpoint,
    folder: Path,
    n_ranks: int,
    payload: str,
    ids: list[int],
    args: argparse.Namespace,
) -> tuple[Array, str]:
    """The scores of ranks that sum so, and how many bytes they receive for a token."""
    config = checkpoint.config
    with channels(n_ranks) as ends, ThreadPoolExecutor(n_ranks) as pool:

        def work(rank: int) -> tuple[Array, str] | None:
            with ExitStack() as stack:
                slices = stack.enter_context(SliceFolder(node_folder(folder, rank)))
                own = [
                    None if sock is None else Channel(sock, f"rank {r}") for r, sock in enumerate(ends[rank])
                ]
                kind = MemberGroup if rank else RootGroup
                group = stack.enter_context(kind(rank, own, payload=payload, new_sum=new_sums()))
                group.settle(args.allreduce)
                first_id = slices.partition.vocab_range(rank).start
                engine_config = EngineConfig(threads=1, memory_budget="unlimited")
                mine = stack.enter_context(Rank(config, slices.tensors, first_id, group, engine_config))
                if rank:
                    mine.runner.serve()
                    return None
                engine = Engine(config, mine, max_rows=args.chunk)
                engine.open()
                scores = engine.logits(ids)
                decode(engine, ids[:16])  # now its keys and values are kept
                before = received_bytes(ends)
                decode(engine, ids[:16])
                n_bytes = (received_bytes(ends) - before) // _N_NEW
                mine.runner.stop()
                of_sums = (
                    2
                    * config.num_hidden_layers
                    * sum_bytes(args.allreduce, payload, config.hidden_size, n_ranks)
                )
                return scores, f"{n_bytes} bytes a token, {of_sums} of them in sums"

        found = list(pool.map(work, range(n_ranks)))[0]  # noqa: RUF015 - an error of any rank is raised
        assert found is not None
        return found


def sum_bytes(allreduce: str, payload: str, n: int, n_ranks: int) -> int:
    """What all ranks receive for a sum of `n` numbers, without the frames' heads."""
    if allreduce == "scatter":
        return 2 * n_ranks * (n_ranks - 1) * sent_bytes(payload, -(-n // n_ranks))
    return {"direct": n_ranks, "star": 2}[allreduce] * (n_ranks - 1) * sent_bytes(payload, n)


def decode(engine: Engine, prompt: list[int]) -> None:
    """Makes `_N_NEW` tokens in as many passes, but for those of a prompt that is new."""
    sequence = Sequence(prompt, SamplingParams(temperature=0, length=_N_NEW), frozenset())
    engine.submit(sequence)
    for _ in engine.run(sequence):
        pass


@contextmanager
def channels(n_ranks: int) -> Iterator[list[list[socket.socket | None]]]:
    """The sockets of every rank to every other."""
    ends: list[list[socket.socket | None]] = [[None] * n_ranks for _ in range(n_ranks)]
    for low, high in itertools.combinations(range(n_ranks), 2):
        ends[low][high], ends[high][low] = tcp_pair()
    try:
        yield ends
    finally:
        for row in ends:
            close_all(row)


def received_bytes(ends: list[list[socket.socket | None]]) -> int:
    """What all sockets have received so far."""
    infos = (
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        for sock in itertools.chain.from_iterable(ends)
        if sock is not None
    )
    return sum(struct.unpack_from("=Q", info, _RECEIVED_AT)[0] for info in infos)


def compared(exact: Array, scores: Array, ids: list[int]) -> str:
    """How far scores [T, V] are from the exact ones."""
    divergences, others, surprises = [], [], []
    for i in range(len(ids)):
        p, q = log_softmax(exact[i]), log_softmax(scores[i])
        divergences.append(float(divergence(p, q)))
        others.append(bool(p.argmax() != q.argmax()))
        if i + 1 < len(ids):
            surprises.append(-float(q[ids[i + 1]]))
    return (
        f"KL mean {np.mean(divergences):.2e}, greatest {np.max(divergences):.2e}, "
        f"perplexity {np.exp(np.mean(surprises)):.4f}, another likeliest token {np.mean(others):.2%}"
    )


if __name__ == "__main__":
    main()
