"""Conversations at the terminal: what goes to stdout, what to stderr, and what is told to the model next."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import says, write_model

from tpilite import LLM, SamplingParams
from tpilite.cli.terminal import converse
from tpilite.engine.session import Completion

PARAMS = SamplingParams(temperature=0, length=24)
THINKS = "{{ messages[-1].content }}{% if false %}</think>{% endif %}"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = write_model(tmp_path_factory.mktemp("model"), chat=False, context=1024)
    (folder / "chat_template.jinja").write_text(THINKS)
    with LLM(folder, threads=1) as llm:
        yield llm


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_the_model_thinks_goes_to_stderr_and_comes_back(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    says(llm, "<think>\nOne, two.\n</think>\n\nThree.", monkeypatch)
    lines = iter(["How many?", "Sure?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    asked: list[list[dict[str, str]]] = []
    start = llm.start_chat
    monkeypatch.setattr(
        llm, "start_chat", lambda messages, params: (asked.append(messages), start(messages, params))[1]
    )
    shown: list[Completion] = []
    converse(llm, PARAMS, None, shown.append)
    out, err = capsys.readouterr()
    assert out == "Three.\nThree.\n"
    thought = "".join(err.replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines(keepends=True)[1:])
    assert thought == "One, two.\n\n" * 2
    assert ("\x1b[2m" in err) == is_terminal
    assert [(completion.text, completion.thought) for completion in shown] == [("Three.", "One, two.")] * 2
    assert asked[1][1] == {"role": "assistant", "content": "Three.", "reasoning_content": "One, two."}
