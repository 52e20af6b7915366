"""The figures of a text: seconds that add up, and what the process reports of itself."""

import numpy as np
import pytest

from tpilite.engine.sampling import SamplingParams
from tpilite.engine.sequence import Sequence
from tpilite.engine.stats import measure, peak_rss_bytes
from tpilite.engine.usage import Usage, disk_read_bytes


def test_seconds_add_up() -> None:
    sequence = Sequence([1, 2, 3], SamplingParams(seed=7), new_ids=[4, 5, 6])
    sequence.started_s = 10.0
    sequence.token_times_s = [12.0, 12.5, 14.0]
    sequence.finish_reason = "length"
    stats = measure(sequence, Usage(3.0, 1.0, 0.75, 350).since(Usage(1.0, 0.5, 0.25, 100)))
    assert (stats.prompt_tokens, stats.new_tokens, stats.seed) == (3, 3, 7)
    assert (stats.ttft_s, stats.token_s, stats.total_s) == (2.0, 1.0, 4.0)
    assert stats.tokens_per_s == pytest.approx(1.0)
    assert (stats.compute_s, stats.load_wait_s, stats.network_wait_s, stats.rest_s) == (2.0, 0.5, 0.5, 1.0)
    assert stats.read_bytes == 250
    assert "3 prompt tokens, 3 new, first after 2.00 s, then 1.0 tokens/s" in str(stats)
    assert stats.to_dict()["versions"]["numpy"] == np.__version__


def test_a_text_without_tokens_has_no_times() -> None:
    stats = measure(Sequence([1], SamplingParams()), Usage())
    assert (stats.ttft_s, stats.token_s, stats.tokens_per_s, stats.total_s) == (None, None, None, 0.0)
    assert str(stats).startswith("1 prompt tokens, 0 new, peak memory")


def test_memory_is_counted_in_bytes() -> None:
    before = peak_rss_bytes()
    block = np.ones(64 << 20, np.uint8)
    assert before > 10 << 20
    assert peak_rss_bytes() - before > 32 << 20 or before > 128 << 20
    assert block.all()
    assert disk_read_bytes() >= 0
