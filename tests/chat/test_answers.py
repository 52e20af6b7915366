"""Answers to their parts: thoughts, texts and calls, however their pieces are cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.chat.answers import CALLS, AnswerReader, AnswerSyntax, Part, calls_of

TAGS, TO_THE_END, WHOLE = CALLS
TOOLS = frozenset({"add", "look_up"})
ADD = '{"name": "add", "arguments": {"a": 1, "b": "größer"}}'
CALLED = Part(tool="add", arguments='{"a": 1, "b": "größer"}')


def read(syntax: AnswerSyntax, pieces: list[str]) -> tuple[str, str, list[Part]]:
    """The whole thought, the whole text, and the calls."""
    reader = AnswerReader(syntax)
    parts = [part for piece in pieces for part in reader.add(piece)] + reader.finish()
    assert all(bool(part.thought) + bool(part.text) + bool(part.tool) == 1 for part in parts)
    calls = [part for part in parts if part.tool]
    assert reader.n_calls == len(calls)
    return "".join(part.thought for part in parts), "".join(part.text for part in parts), calls


CASES = [
    (AnswerSyntax(), " <think>a</think> b\n", ("", " <think>a</think> b\n", [])),
    (AnswerSyntax(False), " <think>\na <b>\n</think>\n\n c\n", ("a <b>", "c\n", [])),
    (AnswerSyntax(False), "\n no <think>a</think>", ("", "\n no <think>a</think>", [])),
    (AnswerSyntax(False), "<thin", ("", "<thin", [])),
    (AnswerSyntax(False), "<think>", ("", "", [])),
    (AnswerSyntax(False), "<think></think>a</think>", ("", "a</think>", [])),
    (AnswerSyntax(True), "\na</b>  c </think>\n", ("a</b>  c", "", [])),
    (AnswerSyntax(True), "a </thin", ("a </thin", "", [])),
    (AnswerSyntax(None, TAGS, TOOLS), "a b \n", ("", "a b \n", [])),
    (AnswerSyntax(None, TAGS, TOOLS), f"a\n<tool_call>\n{ADD}\n</tool_call>\n", ("", "a", [CALLED])),
    (
        AnswerSyntax(None, TAGS, TOOLS),
        f"<tool_call>{ADD}</tool_call> <tool_call>{ADD}",
        ("", "", [CALLED] * 2),
    ),
    (AnswerSyntax(None, TAGS, TOOLS), "<tool_call>{</tool_call> b", ("", "<tool_call>{</tool_call> b", [])),
    (AnswerSyntax(None, TAGS, frozenset({"f"})), f"<tool_call>{ADD}", ("", f"<tool_call>{ADD}", [])),
    (
        AnswerSyntax(True, TAGS, TOOLS),
        f"a<tool_call></think>b <tool_call>{ADD}",
        ("a<tool_call>", "b", [CALLED]),
    ),
    (AnswerSyntax(None, TO_THE_END, TOOLS), f"[TOOL_CALLS] [{ADD}, {ADD}]", ("", "", [CALLED] * 2)),
    (AnswerSyntax(None, TO_THE_END, TOOLS), f"[TOOL_CALLS] [{ADD}, 7]", ("", f"[TOOL_CALLS] [{ADD}, 7]", [])),
    (AnswerSyntax(None, WHOLE, TOOLS), ADD.replace("arguments", "parameters"), ("", "", [CALLED])),
    (AnswerSyntax(None, WHOLE, TOOLS), f"\n<|python_tag|>{ADD}", ("", "", [CALLED])),
    (AnswerSyntax(None, WHOLE, TOOLS), f"so: {ADD} ", ("", f"so: {ADD} ", [])),
    (AnswerSyntax(None, WHOLE, TOOLS), '{"a": 1} ', ("", '{"a": 1} ', [])),
    (
        AnswerSyntax(None, WHOLE, TOOLS),
        '{"name": "add", "parameters": "x"}',
        ("", '{"name": "add", "parameters": "x"}', []),
    ),
]


@pytest.mark.parametrize("number", range(len(CASES)))
@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_an_answer_s_parts_do_not_depend_on_its_pieces(number: int, data: st.DataObject) -> None:
    syntax, text, expected = CASES[number]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for cut in (pieces, [text], list(text)):
        assert read(syntax, cut) == expected


def test_what_is_certain_is_told_at_once() -> None:
    reader = AnswerReader(AnswerSyntax(True, TAGS, TOOLS))
    assert reader.add("so") == [Part(thought="so")]
    assert reader.add(" it </thin") == [Part(thought=" it")]
    assert reader.add("k>") == []
    assert reader.add(" is <") == [Part(text="is")]
    assert reader.add("b") == [Part(text=" <b")]
    assert reader.n_thought == 3


def test_marks_are_known_by_the_template() -> None:
    assert calls_of("<tool_call>") is TAGS
    assert calls_of("[TOOL_CALLS]") is TO_THE_END
    assert calls_of("{{- '\"parameters\": ' }}") is WHOLE
    assert calls_of("nothing") is None
    assert AnswerSyntax().marks == frozenset()
    assert AnswerSyntax(True, TAGS).marks == {"<think>", "</think>", "<tool_call>", "</tool_call>"}


def test_arguments_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, calls = read(AnswerSyntax(None, WHOLE, TOOLS), ['{"name": "look_up"}'])
    assert [json.loads(call.arguments) for call in calls] == [{}]
