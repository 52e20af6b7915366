"""Text that is shown as it is made, and stop texts that end it wherever their pieces fall."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tpilite.engine.sampling import SamplingParams
from tpilite.engine.sequence import Sequence


def feed(pieces: list[str], stop: tuple[str, ...]) -> tuple[list[str], Sequence]:
    sequence = Sequence([1], SamplingParams(stop=stop))
    shown = []
    for piece in pieces:
        shown.append(sequence.add_text(piece))
        if sequence.stopped:
            return shown, sequence
    shown.append(sequence.add_text("", last=True))
    return shown, sequence


def test_a_stop_text_ends_the_text_before_it() -> None:
    shown, sequence = feed(["one E", "ND", " two"], ("END",))
    assert shown == ["one ", ""]
    assert sequence.stopped
    assert sequence.text == "one "


def test_what_only_begins_like_a_stop_text_is_shown_later() -> None:
    shown, sequence = feed(["a E", "N", "x", "E"], ("END",))
    assert shown == ["a ", "", "ENx", "", "E"]
    assert not sequence.stopped


@given(
    text=st.text("ab", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_pieces_do_not_matter(text: str, cuts: list[int], stop: tuple[str, ...]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    shown, sequence = feed(pieces, stop)
    # The first stop text to be complete counts; of those complete at once, the one that begins first.
    ends = [end for end in range(len(text) + 1) if any(s in text[:end] for s in stop)]
    assert "".join(shown) == sequence.text
    assert sequence.stopped == bool(ends)
    if not ends:
        assert sequence.text == text
    else:
        assert text.startswith(sequence.text)
        assert not any(s in sequence.text for s in stop)
        assert any(text.startswith(s, len(sequence.text)) for s in stop)


def test_ids_are_those_of_prompt_and_text_together() -> None:
    sequence = Sequence([1, 2, 3], SamplingParams(), new_ids=[4, 5])
    assert [sequence.ids(a, b) for a, b in [(0, 2), (2, 4), (3, 5), (4, 5)]] == [[1, 2], [3, 4], [4, 5], [5]]
