"""One model used by several threads and streams at once, and after whatever has failed in the middle."""

import gc
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tpilite import LLM, SamplingParams
from tpilite.errors import ConfigError
from tpilite.model import llama as model_module
from tpilite.shipped import find_model

PARAMS = SamplingParams(temperature=0, length=25, ignore_eos=True)
PROMPTS = ["Once upon a time", "One day", "The fox", "Two hares"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(find_model("fable"), threads=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def texts(llm: LLM) -> list[str]:
    return [llm.generate(prompt, PARAMS).text for prompt in PROMPTS]


def test_threads_share_a_model(llm: LLM, texts: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: llm.generate(prompt, PARAMS).text, PROMPTS * 6))
    assert found == texts * 6


def test_streams_that_are_open_at_once_each_give_their_whole_text(llm: LLM, texts: list[str]) -> None:
    streams = [llm.stream(prompt, PARAMS) for prompt in PROMPTS]
    pieces = itertools.zip_longest(*streams, fillvalue="")
    assert ["".join(column) for column in zip(*pieces, strict=True)] == texts


def test_a_text_made_while_a_stream_is_open_cuts_nothing(llm: LLM, texts: list[str]) -> None:
    stream = llm.stream(PROMPTS[0], PARAMS)
    first = next(stream)
    assert llm.generate(PROMPTS[1], PARAMS).text == texts[1]
    assert llm.logits([1, 2, 3]).shape == (3, llm.config.vocab_size)
    assert first + "".join(stream) == texts[0]


def test_a_stream_that_nobody_begins_keeps_no_place(llm: LLM, texts: list[str]) -> None:
    for _ in range(3):
        llm.stream(PROMPTS[2], SamplingParams(temperature=0, ignore_eos=True))
    assert llm.generate(PROMPTS[1], PARAMS).text == texts[1]


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_a_stream_may_end_in_another_thread_during_a_pass(
    llm: LLM, texts: list[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    streams = [llm.stream(PROMPTS[0], PARAMS)]
    next(streams[0])
    run, ended = llm.engine.runner._run, []

    def ending(step, x=None):  # type: ignore[no-untyped-def]
        if not ended:
            ended.append(True)
            thread = threading.Thread(target=streams[0].close if how == "closed" else streams.clear)
            thread.start()
            thread.join(10)
            assert not thread.is_alive()
            gc.collect()
        return run(step, x)

    monkeypatch.setattr(llm.engine.runner, "_run", ending)
    assert llm.generate(PROMPTS[1], PARAMS).text == texts[1]
    assert ended


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
@pytest.mark.parametrize("place", ["rms_norm", "rotate", "swiglu"])
def test_a_failure_in_the_middle_of_a_pass_leaves_the_model_working(
    llm: LLM, texts: list[str], monkeypatch: pytest.MonkeyPatch, failure: type[BaseException], place: str
) -> None:
    """The open stream goes on; the request in whose pass it failed has the failure."""
    stream = llm.stream(PROMPTS[0], PARAMS)
    first = [next(stream), next(stream)]
    with monkeypatch.context() as patch:
        calls, function = itertools.count(), getattr(model_module, place)

        def failing(*args):  # type: ignore[no-untyped-def]
            if next(calls) == 3:
                raise failure
            return function(*args)

        patch.setattr(model_module, place, failing)
        with pytest.raises(failure):
            next(stream) if failure is not KeyboardInterrupt else llm.generate(PROMPTS[3], PARAMS)
    if failure is KeyboardInterrupt:
        assert "".join([*first, *stream]) == texts[0]
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert llm.generate(prompt, PARAMS).text == text


def test_a_failure_is_told_to_its_own_request_only(
    llm: LLM, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = llm.stream(PROMPTS[0], PARAMS)
    next(first)
    run, runs = llm.engine.runner._run, itertools.count()

    def failing(step, x=None):  # type: ignore[no-untyped-def]
        if next(runs) == 2:
            raise MemoryError("of the first")
        return run(step, x)

    monkeypatch.setattr(llm.engine.runner, "_run", failing)
    assert llm.generate(PROMPTS[1], PARAMS).text == texts[1]
    with pytest.raises(MemoryError, match="of the first"):
        list(first)


def test_after_its_end_a_model_says_so() -> None:
    llm = LLM(find_model("fable"), threads=1)
    stream, done = llm.stream(PROMPTS[0], PARAMS), llm.start(PROMPTS[1], PARAMS)
    text = next(stream) + "".join(llm.run(done))
    assert text
    llm.close()
    llm.close()
    for use in (
        lambda: next(stream),
        lambda: llm.generate("x"),
        lambda: list(llm.stream("x")),
        lambda: llm.start("x"),
        lambda: llm.logits([1]),
    ):
        with pytest.raises(ConfigError, match="was closed"):
            use()
    assert llm.completion(done).text
    assert llm.usage.compute_s > 0
