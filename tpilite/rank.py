"""One rank made ready: its weights in memory as they should be, its threads, its model and its runner."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from tpilite.blas import limit_blas_threads
from tpilite.collective import Collective, Timed
from tpilite.config import EngineConfig, LlamaConfig
from tpilite.linear import Linear
from tpilite.model import Llama
from tpilite.partition import EMBEDDING
from tpilite.runner import Runner
from tpilite.stats import Usage, disk_read_bytes
from tpilite.tensor_file import StoredTensor
from tpilite.weights import Embedding, assemble, mapped


class Rank:
    """A rank's `runner`, on the stored tensors of the whole model or of its slice; closed by `with`."""

    def __init__(
        self,
        config: LlamaConfig,
        tensors: Mapping[str, StoredTensor],
        first_vocab_id: int,
        collective: Collective,
        engine: EngineConfig,
    ) -> None:
        self._stack = ExitStack()
        limit_blas_threads()
        linear = self._stack.enter_context(Linear(engine.threads or physical_cores()))
        weights = assemble(tensors, config.num_hidden_layers, mapped)
        self._network = Timed(collective)
        kv_dtype = np.float16 if engine.kv_dtype == "f16" else np.float32
        model = Llama(config, weights, self._network, linear, kv_dtype)
        self.runner = Runner(model, first_vocab_id, self._network)
        self.embed = Embedding(tensors[EMBEDDING]) if EMBEDDING in tensors else None

    def regroup(self, collective: Collective) -> None:
        """Goes on in a new group, with empty caches."""
        self._network.inner = collective
        self.runner.reset()

    @property
    def usage(self) -> Usage:
        load_wait_s = 0.0
        compute_s = self.runner.forward_s - self._network.reduced_s - load_wait_s
        return Usage(compute_s, load_wait_s, self._network.waited_s, disk_read_bytes())

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> "Rank":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def physical_cores() -> int:
    """The cores that this process may run on, hyper-threads of one core counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, os.cpu_count() or 1)
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
