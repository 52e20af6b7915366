"""Requests as a session prepares them: their ends, their decoders, and what each of them cost."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import write_model

from tpilite import LLM, SamplingParams
from tpilite.chat.answers import AnswerSyntax
from tpilite.chat.format import ChatPrompt
from tpilite.engine.engine import TooLong
from tpilite.errors import ConfigError

GREEDY = SamplingParams(temperature=0, length=12, ignore_eos=True)
HELLO = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = write_model(tmp_path_factory.mktemp("model"), eos_token_ids=(7, 9))
    with LLM(folder, threads=1) as llm:
        yield llm


class ChatWithItsOwnEnd:
    stop_ids = frozenset({11})

    def encode(self, _messages: object, **_: object) -> ChatPrompt:
        return ChatPrompt([1, 2], AnswerSyntax())


def test_an_end_is_every_token_that_the_model_the_tokenizer_or_the_chat_ends_with(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "chat_format", ChatWithItsOwnEnd())
    prompt, chat = llm.encode("Once"), llm.encode_chat(HELLO)
    assert prompt.eos_ids == {7, 9} | llm.tokenizer.eos_ids
    assert chat.eos_ids == prompt.eos_ids | {11}
    assert llm.prepare(chat, GREEDY).eos_ids == chat.eos_ids


def test_a_prepared_request_waits_until_it_is_submitted(llm: LLM) -> None:
    request = llm.prepare(llm.encode("Once upon a time"), GREEDY)
    assert llm.engine.step() == []
    llm.engine.submit(request)
    assert "".join(llm.run(request)) == llm.generate("Once upon a time", GREEDY).text


def test_requests_started_together_each_have_their_own_figures(llm: LLM) -> None:
    before = llm.usage
    requests = [llm.start(text, GREEDY) for text in ("Once upon a time", "One day", "The fox")]
    for request in requests:
        assert list(llm.run(request))
    passes, compute_s = 0.0, 0.0
    for request in requests:
        assert request.usage is not None
        assert request.usage.paging is not None
        passes += request.usage.paging.passes
        compute_s += llm.completion(request).stats.compute_s
    spent = llm.usage.since(before)
    assert spent.paging is not None
    assert passes == spent.paging.passes == 3 * 12
    assert 0 < compute_s <= spent.compute_s


def test_a_request_that_was_never_served_has_cost_nothing(llm: LLM) -> None:
    first, second = llm.start("One day", GREEDY), llm.start("The fox", GREEDY)
    llm.engine.cancel(second)
    assert list(llm.run(first))
    stats = llm.completion(second).stats
    assert (stats.compute_s, stats.read_bytes, stats.new_tokens) == (0, 0, 0)
    assert stats.resident_bytes == llm.completion(first).stats.resident_bytes


def test_what_does_not_fit_says_by_how_much(llm: LLM) -> None:
    with pytest.raises(TooLong, match="a prompt of 250 tokens and 7 new ones does not fit") as found:
        llm.start([3] * 250, SamplingParams(length=7))
    assert (found.value.n_prompt, found.value.n_new, found.value.context) == (250, 7, 256)


def test_what_the_model_cannot_do_is_refused_before_it_waits(llm: LLM) -> None:
    for prompt, params, text in [
        ([], GREEDY, "the prompt is empty"),
        ([400], GREEDY, "token id 400 is not in the model's vocabulary of 400"),
        ([3], SamplingParams(logit_bias={400: 1.0}), "token id 400"),
    ]:
        with pytest.raises(ConfigError, match=text):
            llm.prepare(llm.encode(prompt), params)


def test_a_folder_without_chat_answers_no_conversation(tmp_path: Path) -> None:
    with LLM(write_model(tmp_path, chat=False), threads=1) as llm:
        with pytest.raises(ConfigError, match="not a chat model"):
            llm.encode_chat(HELLO)


def test_what_the_user_leaves_out_is_as_the_models_publisher_says(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_k": 7, "repetition_penalty": 1.3}))
    with LLM(folder, threads=1) as llm:
        prompt = llm.encode("Once")
        found = llm.prepare(prompt).params
        assert (found.temperature, found.k, found.repetition_penalty) == (0.6, 7, 1.3)
        assert (found.p, found.min_p) == (0.9, 0.0)
        found = llm.prepare(prompt, SamplingParams(temperature=1.0, k=0, p=None)).params  # type: ignore[arg-type]
        assert (found.temperature, found.k, found.p, found.repetition_penalty) == (1.0, 0, 0.9, 1.3)
