"""Which type each matrix of a model gets, and the matrices in it: made while their rows are read."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.dtypes import BLOCK_SIZES, DTYPES, n_bytes_of
from tpilite.errors import ConfigError
from tpilite.formats.stored import StoredTensor
from tpilite.linear.block_types import BLOCK_TYPES
from tpilite.linear.matrix import as_float32
from tpilite.machine import usable_cores
from tpilite.quantize.quantizers import quantize_rows

# For each --quantize: the type of most matrices, and that of the embedding and lm_head, one step finer.
# Errors there meet every token directly, and there is one of each.
KINDS = {
    "q8_0": ("Q8_0", "Q8_0"),
    "q6_k": ("Q6_K", "Q8_0"),
    "q5_k": ("Q5_K", "Q6_K"),
    "q4_k": ("Q4_K", "Q5_K"),
    "q4_0": ("Q4_0", "Q5_K"),
}

# Where rows are no multiple of 256: blocks of 32 with as many bits, and with an offset as well, so that the
# error stays what was asked for. Of six bits there are none.
_NARROW = {"Q4_K": "Q4_1", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# Goes into the identity of what is made: to be raised where a quantizer gives other blocks than before.
_VERSION = 1

# Weights that a thread takes at a time: 1 MiB as float32.
_PIECE = 1 << 18


_HASH = re.compile(r"[0-9a-f]{64}")
_ROLE, _DTYPES = re.compile(r"[a-z0-9_]{1,32}"), {*DTYPES, *BLOCK_SIZES}
_MAX_ROLES = 32


@dataclass(frozen=True)
class Quantized:
    """What a quantized model was made from, and what its matrices are in, by the last part of their names."""

    of: str  # `Checkpoint.origin`
    kind: str
    calibration: str  # a hash of the text that columns were weighed by, empty where there was none
    types: Mapping[str, str]

    @property
    def how(self) -> str:
        return f"with --quantize {self.kind}" + (" and --calibrate" if self.calibration else "")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> "Quantized":
        """What `to_dict` gave, in a file or from a peer. Raises `ConfigError` for anything else."""
        if not isinstance(value, dict) or set(value) != {field.name for field in fields(cls)}:
            raise ConfigError(f"expected the keys {', '.join(field.name for field in fields(cls))}")
        hashes, types = (value["of"], value["calibration"] or value["of"]), value["types"]
        if not all(isinstance(one, str) and _HASH.fullmatch(one) for one in hashes):
            raise ConfigError("expected hashes of 64 digits as of and calibration")
        if not isinstance(value["kind"], str) or value["kind"] not in KINDS:
            raise ConfigError(f"found the kind {value['kind']!r:.40}; expected one of {', '.join(KINDS)}")
        if not isinstance(types, dict) or len(types) > _MAX_ROLES:
            raise ConfigError(f"expected an object of at most {_MAX_ROLES} types")
        for role, dtype in types.items():
            if not _ROLE.fullmatch(role) or not isinstance(dtype, str) or dtype not in _DTYPES:
                raise ConfigError(f"found {dtype!r:.40} as the type of {role!r:.40}")
        return cls(value["of"], value["kind"], value["calibration"], types)


@dataclass(frozen=True, eq=False)
class Recipe:
    """How the matrices of a model become blocks. Raises `ConfigError` for a kind that is not known.

    `weigh` gives for matrices by name how much each column counts (see `quantize_rows`); it is called once
    the first blocks are made. `calibration` is a hash of what that comes from.
    """

    kind: str
    calibration: str = ""
    weigh: Callable[[], Mapping[str, Array]] = dict

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"cannot quantize to {self.kind!r}: expected one of {', '.join(KINDS)}")

    def applied(
        self, tensors: Mapping[str, StoredTensor], tables: Collection[str]
    ) -> dict[str, StoredTensor]:
        """The tensors with their matrices in blocks; `tables` are the embedding and lm_head.

        What has two names is made once. Raises `ConfigError` where a matrix is in blocks already.
        """
        made: dict[StoredTensor, StoredTensor] = {}
        for name, tensor in tensors.items():
            if tensor not in made:
                made[tensor] = self._applied_to(name, tensor, name in tables)
        return {name: made[tensor] for name, tensor in tensors.items()}

    def identity(self, of: str) -> str:
        """A hash that tells a model that is made so from the one `of` which it is made, and from others."""
        said = json.dumps([of, "quantized", _VERSION, self.kind, self.calibration])
        return hashlib.sha256(said.encode()).hexdigest()

    @functools.cached_property
    def importance(self) -> Mapping[str, Array]:
        return self.weigh()

    def described(self, of: str, tensors: Mapping[str, StoredTensor]) -> Quantized:
        """What the model `of` becomes by it: the types of all `tensors` that are matrices."""
        types = {
            name.split(".")[-2]: tensor.dtype for name, tensor in tensors.items() if len(tensor.shape) == 2
        }
        return Quantized(of, self.kind, self.calibration, types)

    def _applied_to(self, name: str, tensor: StoredTensor, is_table: bool) -> StoredTensor:
        if len(tensor.shape) != 2:
            return tensor
        if tensor.dtype not in DTYPES:
            raise ConfigError(
                f"{tensor.file.path}: {tensor.name} is stored as {tensor.dtype}; --quantize needs a model in "
                f"{', '.join(DTYPES)}: leave it out, or get the original model"
            )
        dtype = type_for(self.kind, tensor.shape[1], is_table)
        if dtype is None:
            return tensor
        n_bytes = n_bytes_of(dtype, tensor.shape)
        return QuantizedTensor(name, dtype, tensor.shape, tensor.file, 0, n_bytes, source=tensor, recipe=self)


def type_for(kind: str, n_columns: int, is_table: bool) -> str | None:
    """The type for rows of so many weights; None where no type can hold them, and they stay as they are."""
    wanted = KINDS[kind][is_table]
    fitting = (dtype for dtype in (wanted, _NARROW.get(wanted)) if dtype is not None)
    return next((dtype for dtype in fitting if n_columns % BLOCK_SIZES[dtype].n_weights == 0), None)


@dataclass(frozen=True, eq=False)
class QuantizedTensor(StoredTensor):
    """A matrix as blocks that are nowhere yet: `read_into` makes them of the `source`.

    `offset` counts from the first of these blocks. It cannot be mapped.
    """

    source: StoredTensor | None = None
    recipe: Recipe | None = None

    def read_into(self, buffer: Any) -> None:
        """Fills `buffer`, of exactly `nbytes` contiguous bytes, with all cores. Raises as `quantize_rows`."""
        if not self.nbytes:
            return
        view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
        blocks = np.frombuffer(view.cast("B"), np.uint8).reshape(self.stored_shape)
        assert self.recipe is not None
        n_rows, importance = max(1, _PIECE // self.shape[1]), self.recipe.importance.get(self.name)
        with ThreadPoolExecutor(usable_cores(), "quantize") as pool:
            starts = range(0, self.shape[0], n_rows)
            try:
                for _ in pool.map(lambda start: self._make(blocks, start, n_rows, importance), starts):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def array(self) -> NoReturn:
        raise AssertionError(f"{self.name} has no blocks that could be mapped")

    def _make(self, blocks: NDArray[np.uint8], start: int, n_rows: int, importance: Array | None) -> None:
        assert self.source is not None
        stop = min(start + n_rows, self.shape[0])
        first = self.offset // self.row_bytes
        rows = self.source.rows(first + start, first + stop)
        stored = np.empty(rows.stored_shape, rows.stored_dtype)
        rows.read_into(stored)
        kind = BLOCK_TYPES[self.dtype]
        blocks[start:stop] = quantize_rows(self.name, as_float32(stored), kind, importance)
