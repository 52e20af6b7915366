"""How NumPy makes products on this machine: measured once for each stored dtype, and noted."""

import json
import logging
import os
import platform
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# Chunks are measured as float32. This fits most second-level caches.
CHUNK_BYTES = 1 << 20

# Larger ones are faster where the caches behind are large: each NumPy call on fresh memory takes some
# microseconds before it streams, and hands the interpreter over twice.
FEW_ROWS_CHUNK_BYTES = (1 << 18, 1 << 20, 1 << 21, 1 << 22)

KERNELS = ("bits", "cast")


@dataclass(frozen=True)
class Plan:
    """How chunks of one stored dtype become float32, and how large they are beside few rows of x.

    `cast` is NumPy's own conversion. `bits` moves bits: for bfloat16 in one pass instead of two, for
    float16 by three integer operations, where NumPy's cast is slow (without hardware for it).
    """

    kernel: str
    chunk_bytes: int = CHUNK_BYTES


class Notes:
    """The plans measured before on this machine, in a file that may as well be missing."""

    def __init__(self, path: Path | None, n_threads: int) -> None:
        self._path = path
        self._key = f"{platform.machine()} {_cpu()} numpy {np.__version__} threads {n_threads}"

    def read(self, dtype: str) -> Plan | None:
        match self._all().get(self._key, {}).get(dtype):
            case [str(kernel), int(n_bytes)] if kernel in KERNELS and n_bytes in FEW_ROWS_CHUNK_BYTES:
                return Plan(kernel, n_bytes)
        return None

    def write(self, dtype: str, plan: Plan) -> None:
        notes = self._all()
        notes.setdefault(self._key, {})[dtype] = list(astuple(plan))
        try:
            path = self._file()
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"{path.name}.{os.getpid()}")
            new.write_text(json.dumps(notes, indent=1))
            new.replace(path)
        except (OSError, RuntimeError) as error:
            logger.debug("the measured plan is not kept: %s", error)

    def _all(self) -> dict[str, dict[str, Any]]:
        try:
            notes = json.loads(self._file().read_text())
        except (OSError, RuntimeError, ValueError):
            return {}
        if isinstance(notes, dict) and all(isinstance(value, dict) for value in notes.values()):
            return notes
        return {}

    def _file(self) -> Path:
        return self._path or Path.home() / ".cache" / "tpilite" / "linear.json"


def _cpu() -> str:
    """The processor's name, or what there is instead: ARM's Linux has numbers only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for name in ("model name", "CPU part"):
        for line in lines:
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return platform.processor()
