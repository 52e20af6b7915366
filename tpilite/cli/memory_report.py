"""A time line of the memory that a rank takes, for `--memory_report` and the plot that is drawn of it."""

import csv
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tpilite.closing import Closing
from tpilite.engine.usage import Usage
from tpilite.errors import ConfigError
from tpilite.machine import rss_bytes

logger = logging.getLogger(__name__)


def paging_columns(usage: Usage) -> dict[str, float]:
    """What paging has in memory now and has read so far, by the names of the columns."""
    paging = usage.paging
    assert paging is not None, "a rank's own usage tells of its paging"
    return {
        "window_bytes": paging.filled_bytes,
        "resident_bytes": paging.loaded_bytes,
        "cache_bytes": paging.cache_bytes,
        "loads": paging.loads,
        "read_bytes": paging.read_bytes,
    }


class MemoryReport(Closing):
    """A CSV file that gets a line each `interval_s` until `close`: the time, this process's memory, and
    the figures that `sample` gives.
    """

    def __init__(self, path: Path, sample: Callable[[], Mapping[str, float]], interval_s: float = 0.05):
        self._sample = sample
        self._interval_s = interval_s
        self._start_s = time.perf_counter()
        try:
            # By lines, so that a process that is killed leaves all but the last one.
            self._file = path.open("w", buffering=1, newline="", encoding="utf-8")
            self._writer = csv.writer(self._file)
            self._writer.writerow(["time_s", "rss_bytes", *sample()])
        except OSError as error:
            raise ConfigError(f"the memory report {path} cannot be written: {error.strerror}") from error
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-report", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes the last line and closes the file."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        closing = False
        try:
            with self._file:
                while not closing:
                    closing = self._closing.wait(self._interval_s)
                    elapsed_s = round(time.perf_counter() - self._start_s, 3)
                    self._writer.writerow([elapsed_s, rss_bytes(), *self._sample().values()])
        except OSError as error:  # a full disk must not end the text that is being made
            logger.warning("the memory report ends here: %s", error.strerror)
