"""What was served so far, in figures, and how Prometheus reads them."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from tpilite.engine.usage import Usage
from tpilite.machine import rss_bytes

# Tokens per second are those of so many tokens: a second on a fast machine, minutes on one that pages.
_RATE_TOKENS = 32
# ... and 0 when none came for so many times their distance.
_RATE_PATIENCE = 5

# The figures that only grow; the others go up and down.
_COUNTERS = (
    "requests_finished",
    "requests_cancelled",
    "requests_failed",
    "requests_refused",
    "prompt_tokens",
    "new_tokens",
    "compute_seconds",
    "load_wait_seconds",
    "network_wait_seconds",
    "rest_seconds",
    "read_bytes",
)


@dataclass
class Figures:
    """What was served so far. For one thread at a time."""

    started_s: float = field(default_factory=time.monotonic)
    n_finished: int = 0
    n_cancelled: int = 0
    n_failed: int = 0
    n_refused: int = 0
    n_prompt: int = 0
    n_new: int = 0
    compute_s: float = 0.0
    load_wait_s: float = 0.0
    network_wait_s: float = 0.0
    rest_s: float = 0.0
    job_s: float = 1.0  # how long a job takes, a moving average
    token_times_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RATE_TOKENS))

    def count(self, n_new: int, pass_s: float, rest_s: float, before: Usage, after: Usage) -> None:
        """Adds a pass of so many new tokens, and the time spent on it outside of the engine."""
        spent = after.since(before)
        self.n_new += n_new
        self.load_wait_s += spent.load_wait_s
        self.network_wait_s += spent.network_wait_s
        self.compute_s += max(0.0, pass_s - spent.load_wait_s - spent.network_wait_s)
        self.rest_s += rest_s
        self.token_times_s.extend([time.monotonic()] * n_new)

    def finish(self, job_s: float) -> None:
        """Adds a job that was finished, and took so long."""
        self.n_finished += 1
        self.job_s += 0.2 * (job_s - self.job_s)

    def rate(self) -> float:
        """Tokens per second now."""
        times, now_s = self.token_times_s, time.monotonic()
        if len(times) < 2 or times[-1] == times[0]:
            return 0.0
        distance_s = (times[-1] - times[0]) / (len(times) - 1)
        return 0.0 if now_s - times[-1] > 1 + _RATE_PATIENCE * distance_s else 1 / distance_s

    def to_dict(self, n_open: int, read_bytes: int) -> dict[str, float]:
        """All figures by their names; `n_open` requests are being served or wait for it."""
        return {
            "requests_running": min(n_open, 1),
            "requests_waiting": max(n_open - 1, 0),
            "requests_finished": self.n_finished,
            "requests_cancelled": self.n_cancelled,
            "requests_failed": self.n_failed,
            "requests_refused": self.n_refused,
            "prompt_tokens": self.n_prompt,
            "new_tokens": self.n_new,
            "tokens_per_second": self.rate(),
            "compute_seconds": self.compute_s,
            "load_wait_seconds": self.load_wait_s,
            "network_wait_seconds": self.network_wait_s,
            "rest_seconds": self.rest_s,
            "read_bytes": read_bytes,
            "resident_memory_bytes": rss_bytes(),
            "uptime_seconds": time.monotonic() - self.started_s,
        }


def metrics(figures: Mapping[str, float]) -> bytes:
    """The figures as Prometheus reads them."""
    lines = []
    for name, value in figures.items():
        is_counter = name in _COUNTERS
        full = f"tpilite_{name}{'_total' if is_counter else ''}"
        lines.append(f"# TYPE {full} {'counter' if is_counter else 'gauge'}\n{full} {value}\n")
    return "".join(lines).encode()
