"""What one pass is told: the typed `Step` that rank 0 sends to all, and how ranks answer it.

Rank 0 alone knows tokens: a step says which rows belong to which sequence at which position, and which
rows' scores are wanted in what form. The embedded rows travel beside it, since no other rank has the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpilite.engine.sampling import Candidates, Edits
from tpilite.errors import ProtocolError


@dataclass(frozen=True)
class Rows:
    """A run of rows of one sequence, at the positions from `start` on."""

    sequence_id: int
    start: int
    n_rows: int


@dataclass(frozen=True)
class Wanted:
    """What is to be reported of one row's scores: the best `n` of them, edited."""

    row: int
    n: int
    temperature: float
    edits: Edits | None = None


@dataclass(frozen=True)
class Step:
    """One pass: its rows, the scores wanted from it, and the sequences to forget before it.

    `full` asks for the whole rows of scores instead, unedited: `wanted` then names only rows. A step with
    no rows of its own speaks of the scores of the step before.
    """

    rows: tuple[Rows, ...] = ()
    wanted: tuple[Wanted, ...] = ()
    free: tuple[int, ...] = ()
    full: bool = False

    def to_header(self) -> dict[str, Any]:
        return {
            "rows": [[r.sequence_id, r.start, r.n_rows] for r in self.rows],
            "wanted": [[w.row, w.n, w.temperature, _pack(w.edits)] for w in self.wanted],
            "free": list(self.free),
            "full": self.full,
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> "Step":
        """The step that a header holds. Raises `ProtocolError` where it is not one."""
        try:
            return cls(
                tuple(Rows(*(int(n) for n in row)) for row in header["rows"]),
                tuple(Wanted(int(w[0]), int(w[1]), float(w[2]), _unpack(w[3])) for w in header["wanted"]),
                tuple(int(i) for i in header["free"]),
                bool(header["full"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ProtocolError(f"rank 0 sent a step that is not one ({error!r})") from error


def pack_candidates(found: Candidates) -> list[Any]:
    """The candidates as plain values, for a message's header."""
    return [found.ids.tobytes(), found.logits.tobytes(), found.log_sum_exp, found.complete]


def unpack_candidates(report: Sequence[Any]) -> Candidates:
    """The candidates that another rank packed. Raises `ProtocolError` where they are not such."""
    try:
        ids, logits = np.frombuffer(report[0], np.int32), np.frombuffer(report[1], np.float32)
        return Candidates(ids, logits, float(report[2]), bool(report[3]))
    except (TypeError, ValueError, IndexError) as error:
        raise ProtocolError(f"a rank sent candidates that are not such ({error!r})") from error


def _pack(edits: Edits | None) -> list[bytes] | None:
    return None if edits is None else [a.tobytes() for a in (edits.ids, edits.scale, edits.shift)]


def _unpack(packed: Any) -> Edits | None:
    if packed is None:
        return None
    ids, scale, shift = packed
    return Edits(np.frombuffer(ids, "<i4"), np.frombuffer(scale, "<f4"), np.frombuffer(shift, "<f4"))
