"""One rank made ready: its weights in memory as they should be, its threads, its model and its runner."""

import logging
import platform
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tpilite.closing import Closing
from tpilite.collective import Collective, Timed
from tpilite.config.llama import LlamaConfig
from tpilite.dtypes import DTYPES
from tpilite.engine.compiled import new_products
from tpilite.engine.config import MAX_ROWS, EngineConfig
from tpilite.engine.runner import Runner
from tpilite.engine.usage import Usage, disk_read_bytes
from tpilite.formats.stored import StoredTensor
from tpilite.formats.uncached import empty
from tpilite.linear.linear import Linear
from tpilite.machine import (
    auto_budget_bytes,
    cgroup_limit_bytes,
    format_size,
    keep_freed_memory,
    limit_blas_threads,
    return_freed_memory,
    rss_bytes,
    usable_cores,
)
from tpilite.model.llama import Llama
from tpilite.weights.assemble import Embedding
from tpilite.weights.pager import Pager
from tpilite.weights.partition import EMBEDDING

logger = logging.getLogger(__name__)

_MEASURED_FROM_BYTES = 32 << 20


class Rank(Closing):
    """A rank's `runner`, on the stored tensors of the whole model or of its slice; closed by `with`.

    `vocab_start` is the id of its first row of the vocabulary. Making a rank takes the threads, maps and
    memory that `close` gives back; it neither waits for other ranks nor talks to them.
    """

    def __init__(
        self,
        config: LlamaConfig,
        tensors: Mapping[str, StoredTensor],
        vocab_start: int,
        collective: Collective,
        engine: EngineConfig,
    ) -> None:
        self._stack = ExitStack()
        limit_blas_threads()
        keep_freed_memory()
        n_threads = engine.threads or usable_cores()
        linear = self._stack.enter_context(Linear(n_threads, new_products(n_threads)))
        n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if n_bytes >= _MEASURED_FROM_BYTES:  # before the pager finds out what memory there is
            matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
            linear.prepare({DTYPES[tensor.dtype] for tensor in matrices if tensor.dtype in DTYPES})
        self._pager = self._stack.enter_context(
            Pager(
                tensors,
                config,
                budget_bytes=budget_bytes_of(engine),
                window=engine.memory_window,
                max_rows=MAX_ROWS,
            )
        )
        self._pager.start()
        self._n_rows = 0  # of the pass before
        self._network = Timed(collective)
        model = Llama(config, self._pager.weights, self._network, linear, engine.kv_dtype, empty)
        self._position_bytes = model.new_cache().position_bytes
        longest = self._max_positions()
        if longest is not None:  # so that no cache grows ahead beyond what there is room for
            model.max_length = min(model.max_length, longest)
        self.runner = Runner(model, vocab_start, self._network, self)
        self.embed = Embedding(tensors[EMBEDDING]) if EMBEDDING in tensors else None

    def begin_pass(self, n_rows: int, cache_bytes: int, scores: bool) -> None:
        """Makes room in memory for a pass."""
        if n_rows < self._n_rows:  # the prompt is read
            return_freed_memory()
        self._n_rows = n_rows
        self._pager.begin_pass(n_rows, cache_bytes, scores)

    def status(self) -> dict[str, Any]:
        """What rank 0 asks of every rank: how long a text can get here, its memory, where its time goes."""
        usage, paging = self.usage, self._pager.usage()
        return {
            "name": platform.node(),
            "max_positions": self._max_positions(),
            "rss_bytes": rss_bytes(),
            "budget_bytes": paging.budget_bytes,
            "resident_bytes": paging.resident_bytes,
            "streaming_bytes": paging.streaming_bytes,
            "compute_s": usage.compute_s,
            "load_wait_s": usage.load_wait_s,
            "network_wait_s": usage.network_wait_s,
            "read_bytes": usage.read_bytes,
        }

    def _max_positions(self) -> int | None:
        """The longest text whose keys and values fit into the budget; None where nothing bounds it."""
        room = self._pager.cache_room_bytes
        return None if room is None or not self._position_bytes else max(0, room // self._position_bytes)

    def regroup(self, collective: Collective) -> None:
        """Goes on in a new group, with empty caches."""
        self._network.inner = collective
        self.runner.reset()

    @property
    def usage(self) -> Usage:
        paging = self._pager.usage()
        compute_s = self.runner.forward_s - self._network.reduced_s - paging.load_wait_s
        return Usage(compute_s, paging.load_wait_s, self._network.waited_s, disk_read_bytes(), paging)

    def close(self) -> None:
        self._stack.close()


def budget_bytes_of(engine: EngineConfig) -> int | None:
    """The bytes that this process may use; None is unlimited."""
    budget = engine.memory_budget
    if isinstance(budget, str):
        return auto_budget_bytes() if budget == "auto" else None
    limit = cgroup_limit_bytes()
    if limit is not None and budget > limit:
        logger.warning(
            "the memory budget of %s is above what this process's control group allows, %s: the kernel may "
            "end it; give a smaller --memory_budget, or leave it out",
            format_size(budget),
            format_size(limit),
        )
    return budget
