"""The promise of a memory budget: the peak of a process that makes long texts one after the other."""

import json
import subprocess
import sys

import pytest
from checkpoints import write_checkpoint

from tpilite.config.llama import LlamaConfig
from tpilite.engine import rank
from tpilite.engine.config import EngineConfig

_MODEL = """
import json, sys
from tpilite import LLM, SamplingParams
from tpilite.machine import peak_rss_bytes

folder, budget, threads, kv_dtype, shares = json.loads(sys.argv[1])
with LLM(folder, memory_budget=budget, threads=threads, kv_dtype=kv_dtype) as llm:
    for of_context in shares:
        lengths = [int(share * (llm.engine.context - 4)) for share in of_context]
        ids = [[(7 * k + i) % 500 for i in range(n)] for k, n in enumerate(lengths)]
        requests = [llm.start(prompt, SamplingParams(length=4, ignore_eos=True)) for prompt in ids]
        for request in requests:
            for _ in llm.run(request):
                pass
    print(json.dumps([peak_rss_bytes(), llm.usage.paging.streaming_bytes]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=2000,
        max_position_embeddings=2048,
    )
    return write_checkpoint(tmp_path_factory.mktemp("model"), config)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is not told by the process alone")
@pytest.mark.parametrize(
    ("budget", "threads", "kv_dtype", "shares"),  # of the context that the budget allows, text by text
    [
        (195_000_000, 2, "f32", [[0.95], [0.85], [0.01]]),
        (170_000_000, 3, "f16", [[0.6, 0.5, 0.3], [0.9]]),
        (170_000_000, 2, "q8_0", [[0.95], [0.6, 0.5]]),
        (203_000_000, 1, "f32", [[1.0], [0.95]]),  # whose caches would like to grow beyond the room
    ],
)
def test_the_peak_stays_within_the_budget(model, budget, threads, kv_dtype, shares):
    spec = json.dumps([str(model), budget, threads, kv_dtype, shares])
    done = subprocess.run([sys.executable, "-c", _MODEL, spec], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, streaming = json.loads(done.stdout)
    assert streaming > 0
    assert peak <= budget


@pytest.mark.parametrize(("limit", "told"), [(300_000_000, True), (320_000_000, False), (None, False)])
def test_a_budget_above_the_control_groups_limit_is_told(limit, told, monkeypatch, caplog):
    monkeypatch.setattr(rank, "cgroup_limit_bytes", lambda: limit)
    assert rank.budget_bytes_of(EngineConfig(memory_budget=320_000_000)) == 320_000_000
    assert ("the memory budget of 320 MB is above" in caplog.text) == told
    assert ("allows, 300 MB" in caplog.text) == told
