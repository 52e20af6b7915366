"""What a run cost: the figures of one generated text and of the process that made it."""

import itertools
import platform
import resource
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpilite.engine.sequence import Sequence
from tpilite.machine import format_size, peak_rss_bytes
from tpilite.version import __version__
from tpilite.weights.pager import PagerUsage


@dataclass(frozen=True)
class Usage:
    """Seconds spent and bytes read so far, by this rank since its start, and what paging holds."""

    compute_s: float = 0.0  # in the model, without its waits
    load_wait_s: float = 0.0
    network_wait_s: float = 0.0
    read_bytes: int = 0
    paging: PagerUsage | None = None


@dataclass(frozen=True)
class Stats:
    """The figures of one text. Times are in seconds; rates are those of decoding, after the first token."""

    prompt_tokens: int
    new_tokens: int
    ttft_s: float | None  # from asking to the first token; None without one
    token_s: float | None  # the median time between tokens; None below two tokens
    tokens_per_s: float | None
    total_s: float  # from asking to the last token, and of these seconds:
    compute_s: float
    load_wait_s: float
    network_wait_s: float
    rest_s: float  # choosing, decoding, what waited before it, and what nobody counted
    read_bytes: int
    budget_bytes: int | None  # of rank 0's memory; None is unlimited
    resident_bytes: int  # of its weights; where nothing streams, this is all of them
    streaming_bytes: int
    read_bytes_per_pass: float
    overlap: float  # the share of the reading that went on behind the computing
    peak_rss_bytes: int
    finish_reason: str | None
    seed: int

    def to_dict(self) -> dict[str, Any]:
        versions = {"tpilite": __version__, "python": platform.python_version(), "numpy": np.__version__}
        return {**asdict(self), "versions": versions, "machine": platform.machine()}

    def __str__(self) -> str:
        parts = [f"{self.prompt_tokens} prompt tokens, {self.new_tokens} new"]
        if self.ttft_s is not None:
            parts.append(f"first after {self.ttft_s:.2f} s")
        if self.tokens_per_s is not None:
            parts.append(f"then {self.tokens_per_s:.1f} tokens/s")
        if self.streaming_bytes:
            budget = (
                "no budget" if self.budget_bytes is None else f"a budget of {format_size(self.budget_bytes)}"
            )
            parts.append(
                f"{format_size(self.resident_bytes)} of the weights resident and "
                f"{format_size(self.streaming_bytes)} streaming within {budget}, "
                f"{format_size(self.read_bytes_per_pass)} read per pass, "
                f"waited {self.load_wait_s:.2f} s for the disk (overlap {self.overlap:.0%})"
            )
        parts.append(f"peak memory {format_size(self.peak_rss_bytes)}")
        return ", ".join(parts)


def measure(sequence: Sequence, before: Usage, after: Usage) -> Stats:
    """The figures of a text, from its own times and what the process counted before and after it."""
    times = sequence.token_times_s
    total_s = times[-1] - sequence.started_s if times else 0.0
    compute_s = after.compute_s - before.compute_s
    load_wait_s = after.load_wait_s - before.load_wait_s
    network_wait_s = after.network_wait_s - before.network_wait_s
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Stats(
        prompt_tokens=len(sequence.prompt_ids),
        new_tokens=len(sequence.new_ids),
        ttft_s=times[0] - sequence.started_s if times else None,
        token_s=statistics.median(gaps) if gaps else None,
        tokens_per_s=len(gaps) / sum(gaps) if gaps else None,
        total_s=total_s,
        compute_s=compute_s,
        load_wait_s=load_wait_s,
        network_wait_s=network_wait_s,
        rest_s=max(0.0, total_s - compute_s - load_wait_s - network_wait_s),
        read_bytes=after.read_bytes - before.read_bytes,
        **_paging(before.paging, after.paging),
        peak_rss_bytes=peak_rss_bytes(),
        finish_reason=sequence.finish_reason,
        seed=sequence.seed,
    )


def _paging(before: PagerUsage | None, after: PagerUsage | None) -> dict[str, Any]:
    if after is None:
        return {
            "budget_bytes": None,
            "resident_bytes": 0,
            "streaming_bytes": 0,
            "read_bytes_per_pass": 0.0,
            "overlap": 0.0,
        }
    n_passes = after.passes - (before.passes if before else 0)
    read_bytes = after.read_bytes - (before.read_bytes if before else 0)
    load_s = after.load_s - (before.load_s if before else 0.0)
    wait_s = after.load_wait_s - (before.load_wait_s if before else 0.0)
    return {
        "budget_bytes": after.budget_bytes,
        "resident_bytes": after.resident_bytes,
        "streaming_bytes": after.streaming_bytes,
        "read_bytes_per_pass": read_bytes / n_passes if n_passes else 0.0,
        "overlap": max(0.0, 1 - wait_s / load_s) if load_s else 0.0,
    }


def disk_read_bytes() -> int:
    """The bytes that this process has made the disk read; counted in blocks where there is no /proc."""
    try:
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512
