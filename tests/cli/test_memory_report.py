"""The memory report: a time line that grows while it is looked at, and a disk that has no room for it."""

import csv

import pytest

from tpilite.cli.memory_report import MemoryReport
from tpilite.errors import ConfigError

_MIB = 1 << 20


def test_the_time_line(tmp_path):
    values = iter(range(1000))
    path = tmp_path / "memory.csv"
    with MemoryReport(path, lambda: {"window_bytes": next(values), "loads": 7}, interval_s=0.001) as report:
        while len(path.read_text().splitlines()) < 4:
            pass
    assert report is not None
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["window_bytes"]) for row in rows] == list(range(1, len(rows) + 1))
    assert {row["loads"] for row in rows} == {"7"}
    assert all(int(row["rss_bytes"]) > _MIB for row in rows)
    times = [float(row["time_s"]) for row in rows]
    assert times == sorted(times)


def test_a_report_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        MemoryReport(tmp_path / "no" / "memory.csv", dict)


def test_a_disk_that_is_full_ends_the_report_and_nothing_else(tmp_path, monkeypatch, caplog):
    def fail(row):
        raise OSError(28, "No space left on device")

    with MemoryReport(tmp_path / "memory.csv", dict, interval_s=0.001) as report:
        monkeypatch.setattr(report, "_writer", type("Full", (), {"writerow": staticmethod(fail)}))
    assert "the memory report ends here: No space left on device" in caplog.text
