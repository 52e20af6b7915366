"""How a rank works: what it may use of its machine."""

from dataclasses import dataclass

from tpilite.checks import check_whole
from tpilite.errors import ConfigError
from tpilite.machine import parse_size
from tpilite.model.kept import KV_DTYPES

MAX_ROWS = 256  # of a pass; more gain little speed and cost activations of [T, F] floats


@dataclass(frozen=True)
class EngineConfig:
    """How a rank works: what it may use of its machine."""

    threads: int | None = None  # None: one per physical core
    kv_dtype: str = "f32"  # of keys and values: one of KV_DTYPES
    memory_budget: int | str = "auto"  # bytes for the process; "auto": what is free now; "unlimited"
    memory_window: int | None = None  # at most so many blocks in memory, none of them for longer than its use

    def __post_init__(self) -> None:
        if self.threads is not None:
            check_whole("threads", self.threads, least=1)
        if self.kv_dtype not in KV_DTYPES:
            raise ConfigError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, found {self.kv_dtype!r}")
        if isinstance(self.memory_budget, str):
            if self.memory_budget not in ("auto", "unlimited"):
                raise ConfigError(
                    f"memory_budget must be a size, 'auto' or 'unlimited', found {self.memory_budget!r}"
                )
        elif type(self.memory_budget) is not int or self.memory_budget < 1:
            raise ConfigError(f"memory_budget must be a number of bytes, found {self.memory_budget!r}")


def parse_budget(budget: int | str) -> int | str:
    """A memory budget in bytes, where it is not one of the words. Raises `ConfigError`."""
    return parse_size(budget) if isinstance(budget, str) and budget[:1].isdigit() else budget
