"""The figures of one generated text."""

import itertools
import platform
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tpilite.engine.sequence import Sequence
from tpilite.engine.usage import Usage
from tpilite.machine import format_size, peak_rss_bytes
from tpilite.version import __version__


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


def measure(sequence: Sequence, spent: Usage) -> Stats:
    """The figures of a text, from its own times and what rank 0 has spent on it."""
    times = sequence.token_times_s
    total_s = times[-1] - sequence.started_s if times else 0.0
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    paging = spent.paging
    return Stats(
        prompt_tokens=len(sequence.prompt_ids),
        new_tokens=len(sequence.new_ids),
        ttft_s=times[0] - sequence.started_s if times else None,
        token_s=statistics.median(gaps) if gaps else None,
        tokens_per_s=len(gaps) / sum(gaps) if gaps else None,
        total_s=total_s,
        compute_s=spent.compute_s,
        load_wait_s=spent.load_wait_s,
        network_wait_s=spent.network_wait_s,
        rest_s=max(0.0, total_s - spent.compute_s - spent.load_wait_s - spent.network_wait_s),
        read_bytes=spent.read_bytes,
        budget_bytes=paging.budget_bytes if paging else None,
        resident_bytes=paging.resident_bytes if paging else 0,
        streaming_bytes=paging.streaming_bytes if paging else 0,
        read_bytes_per_pass=paging.read_bytes / paging.passes if paging and paging.passes else 0.0,
        overlap=paging.overlap if paging else 0.0,
        peak_rss_bytes=peak_rss_bytes(),
        finish_reason=sequence.finish_reason,
        seed=sequence.seed,
    )
