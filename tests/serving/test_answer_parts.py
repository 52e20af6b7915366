"""Thoughts and calls of tools in answers over HTTP, as OpenAI's own client reads them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import CONFIG, HELLO, client_of, says, served, write_model

from tpilite import LLM

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ m.reasoning_content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    "{% for tool in tools or [] %}{{ tool | tojson }} as <tool_call>{% endfor %}"
    "{% if open %}<think>{% elif false %}</think>{% endif %}"
    "{% if loops %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if messages | length == 3 %}{{ raise_exception('after one answer, silence') }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
END = "§"


class Speaker:
    """A model that says what it is told to, and the client of its service."""

    def __init__(self, session: LLM, client: Any) -> None:
        self.session, self.client = session, client

    def says(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        says(self.session, text + END, monkeypatch)

    def ask(self, **fields: Any) -> Any:
        fields = {"model": "tiny", "messages": HELLO, "stop": END, "temperature": 0} | fields
        return self.client.chat.completions.create(**fields)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Speaker]:
    folder = write_model(tmp_path_factory.mktemp("model"), chat=False, context=1024)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with LLM(folder, threads=1) as session, served(session, CONFIG) as server, client_of(server) as client:
        yield Speaker(session, client)


def test_thoughts_are_reasoning_content(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker.says("<think>\nLet me see.\n</think>\n\nIn the sea.", monkeypatch)
    answer = speaker.ask()
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("In the sea.", "Let me see.")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens_details.reasoning_tokens == 8
    assert answer.usage.completion_tokens == 14
    chunks = list(speaker.ask(stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == "In the sea."
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Let me see."
    assert chunks[-1].usage == answer.usage


def test_a_thought_that_the_prompt_began(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker.says("Hm.</think>Yes.", monkeypatch)
    message = speaker.ask(extra_body={"chat_template_kwargs": {"open": True}}).choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "Hm.")
    cut = speaker.ask(extra_body={"chat_template_kwargs": {"open": True}}, max_tokens=1)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("", "length")
    assert cut.choices[0].message.reasoning_content == "Hm."
    raw = speaker.client.completions.create(model="tiny", prompt="Once", stop=END)
    assert raw.choices[0].text == "Hm.</think>Yes."
    assert raw.usage.completion_tokens_details is None


def test_log_probabilities_come_with_thoughts_too(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker.says("<think>Hm.</think>Yes.", monkeypatch)
    whole = speaker.ask(logprobs=True)
    chunks = list(speaker.ask(logprobs=True, stream=True))
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in whole.choices[0].logprobs.content]
    assert len(streamed) == 8


def test_calls_of_tools(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker.says(f"<think>x</think>So:\n{ADD}\n{ADD}", monkeypatch)
    answer = speaker.ask(tools=TOOLS)
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == ("So:", "tool_calls")
    assert [json.loads(c.function.arguments) for c in message.tool_calls] == [{"a": 1}] * 2
    assert answer.usage.prompt_tokens > speaker.ask().usage.prompt_tokens
    chunks = [chunk.choices[0] for chunk in speaker.ask(tools=TOOLS, stream=True)]
    calls = [call for choice in chunks for call in choice.delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in calls] == [(0, "add"), (1, "add")]
    assert "".join(choice.delta.content or "" for choice in chunks) == "So:"
    assert chunks[-1].finish_reason == "tool_calls"
    one = speaker.ask(tools=TOOLS, parallel_tool_calls=False).choices[0].message
    assert len(one.tool_calls) == 1
    unasked = speaker.ask().choices[0]
    assert (unasked.message.content, unasked.finish_reason) == (f"So:\n{ADD}\n{ADD}", "stop")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"}
    with pytest.raises(openai.BadRequestError, match="refuses this conversation: after one answer, silence"):
        speaker.ask(messages=[*HELLO, message.model_dump(), result], tools=TOOLS)


def test_what_the_template_says_is_a_400(speaker: Speaker) -> None:
    with pytest.raises(openai.BadRequestError, match="refuses this conversation: after one answer, silence"):
        speaker.ask(messages=HELLO * 3)
    with pytest.raises(openai.BadRequestError, match="takes too long on this conversation"):
        speaker.ask(extra_body={"chat_template_kwargs": {"loops": True}})
    with pytest.raises(openai.BadRequestError, match="documents") as caught:
        speaker.ask(extra_body={"documents": [{"text": "x"}]})
    assert caught.value.param == "documents"


def test_a_text_of_marks_that_are_special_tokens(tmp_path: Path) -> None:
    folder = write_model(tmp_path, chat=False)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    added = {"399": {"content": "<think>", "special": True}, "398": {"content": "</think>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with LLM(folder, threads=1) as llm:
        request = llm.prepare(llm.encode_chat(HELLO))
        assert request.decoder is not None
        assert [request.decoder.add(i) for i in (399, 398)] == ["<think>", "</think>"]
        plain = llm.prepare(llm.encode("Once"))
        assert plain.decoder is not None
        assert [plain.decoder.add(i) for i in (399, 398)] == ["", ""]
