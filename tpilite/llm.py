"""The Python interface: a model folder or a GGUF file in, text out.

    from tpilite import LLM, SamplingParams

    with LLM("path/to/Llama-3.2-1B-Instruct") as llm:
        for text in llm.stream("Once upon a time", SamplingParams(length=100, seed=1)):
            print(text, end="", flush=True)

Closing the loop early ends the request.
"""

from contextlib import ExitStack
from os import PathLike

from tpilite.collective import Solo
from tpilite.engine.config import EngineConfig, parse_budget
from tpilite.engine.rank import Rank
from tpilite.engine.session import Session
from tpilite.formats.model_files import ModelFiles
from tpilite.shipped import find_model
from tpilite.weights.checkpoint import Checkpoint


class LLM(Session):
    """A Llama model that answers on this machine; a context manager.

    `memory_budget` bounds the memory of this process: bytes, a text like "2GiB", "auto" for what is free
    now, or "unlimited". What does not fit is read from the disk in every pass. `memory_window` instead
    keeps at most so many blocks of weights in memory.

    Several threads may use it, and several streams be open, at once: requests are served in turn. What
    fails ends its own request and leaves the rest as it is.

    The BLAS of this process is held to one thread, beside which ours work. Accelerate, NumPy's on a Mac, must
    be told before NumPy is imported: set VECLIB_MAXIMUM_THREADS=1, as `tpilite-node` does.

    Raises `CheckpointError` and `ConfigError` for a model that cannot be used.
    """

    def __init__(
        self,
        model_path: str | PathLike[str] | ModelFiles,
        *,
        threads: int | None = None,
        kv_dtype: str = "f32",
        memory_budget: int | str = "auto",
        memory_window: int | None = None,
    ) -> None:
        engine = EngineConfig(
            threads=threads,
            kv_dtype=kv_dtype,
            memory_budget=parse_budget(memory_budget),
            memory_window=memory_window,
        )
        files = model_path if isinstance(model_path, ModelFiles) else ModelFiles.find(find_model(model_path))
        with ExitStack() as stack:
            checkpoint = stack.enter_context(Checkpoint(files))
            rank = stack.enter_context(Rank(checkpoint.config, checkpoint.tensors, 0, Solo(), engine))
            super().__init__(files, checkpoint.config, rank)
            self.open()
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Ends what is being served with an error, the threads, and the files' use."""
        super().close()
        self._stack.close()
