"""A pass as a header of plain values, and back."""

import numpy as np
import pytest

from tpilite.engine.sampling import Candidates, Edits
from tpilite.engine.step import Rows, Step, Wanted, pack_candidates, unpack_candidates
from tpilite.errors import ProtocolError


def test_a_step_survives_its_header() -> None:
    edits = Edits(np.array([1, 5], np.int32), np.array([2, 1], np.float32), np.array([0, 3], np.float32))
    step = Step((Rows(3, 10, 2), Rows(4, 0, 1)), (Wanted(1, 5, 0.5, edits), Wanted(2, 1, 0.0)), (7,), True)
    again = Step.from_header(step.to_header())
    assert (again.rows, again.free, again.full) == (step.rows, step.free, step.full)
    assert again.wanted[1] == step.wanted[1]
    found = again.wanted[0].edits
    assert found is not None
    assert [a.tolist() for a in (found.ids, found.scale, found.shift)] == [[1, 5], [2, 1], [0, 3]]


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"rows": 3, "wanted": [], "free": [], "full": False},
        {"rows": [[1, 2]], "wanted": [], "free": [], "full": 0},
    ],
)
def test_a_header_that_is_no_step_is_the_peers_fault(header: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="a step that is not one"):
        Step.from_header(header)


def test_candidates_survive_their_packing() -> None:
    found = Candidates(np.array([3, 1], np.int32), np.array([2.5, -1], np.float32), 2.75, False)
    again = unpack_candidates(pack_candidates(found))
    assert again.ids.tolist() == [3, 1]
    assert again.logits.tolist() == [2.5, -1]
    assert (again.log_sum_exp, again.complete) == (2.75, False)


@pytest.mark.parametrize("report", [[], [b"abc", b"", 0.0, True], [b"", b"", "much", True], 7])
def test_what_are_no_candidates_is_the_peers_fault(report: object) -> None:
    with pytest.raises(ProtocolError, match="candidates that are not such"):
        unpack_candidates(report)  # type: ignore[arg-type]
