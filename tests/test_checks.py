"""Values in messages: whole where they are short, cut where they are not."""

import pytest

from tpilite.checks import short


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        ("a", '"a"'),
        (float("inf"), "Infinity"),
        ("x" * 100, '"' + "x" * 56 + "..."),
        (10**60, "1" + "0" * 56 + "..."),
        (-(1 << 200), "a number of too many digits"),
        (10**5000, "a number of too many digits"),  # json.dumps refuses to write it
    ],
)
def test_a_value_takes_a_part_of_a_line(value: object, text: str) -> None:
    assert short(value) == text
