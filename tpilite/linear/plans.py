"""How NumPy makes products on this machine: measured once for each stored dtype."""

from dataclasses import dataclass

# Blocks are measured as float32. This fits most second-level caches.
BLOCK_BYTES = 1 << 20

# Larger ones are faster where the caches behind are large: each NumPy call on fresh memory takes some
# microseconds before it streams, and hands the interpreter over twice.
FEW_ROWS_BLOCK_BYTES = (1 << 18, 1 << 20, 1 << 21, 1 << 22)

KERNELS = ("bits", "cast")


@dataclass(frozen=True)
class Plan:
    """How blocks of one stored dtype become float32, and how large they are beside few rows of x.

    `cast` is NumPy's own conversion. `bits` moves bits: for bfloat16 in one pass instead of two, for
    float16 by three integer operations, where NumPy's cast is slow (without hardware for it).
    """

    kernel: str
    block_bytes: int = BLOCK_BYTES
