"""Values in messages: whole where they are short, cut where they are not."""

from tpilite.checks import short


def test_a_value_takes_a_part_of_a_line() -> None:
    assert [short(value) for value in (5, "a", float("inf"))] == ["5", '"a"', "Infinity"]
    assert short("x" * 100) == '"' + "x" * 56 + "..."
    assert short(10**60) == "1" + "0" * 56 + "..."
    # Python itself refuses to write the second.
    assert short(-(1 << 200)) == short(10**5000) == "a number of too many digits"
