"""Answers of OpenAI's API, read by the types of OpenAI's own client."""

import pytest

from tpilite.chat.answers import Part
from tpilite.engine.sequence import TokenLogprob
from tpilite.serving import openai_responses as api

pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")

from openai.types import Completion, Model  # where the client is missing, these are too
from openai.types.chat import ChatCompletion, ChatCompletionChunk

CHAT_INFO = api.ResponseInfo("chatcmpl-1", 1234, "m", True)
ONCE = [Part(text="On"), Part(text="ce")]
TEXT_INFO = api.ResponseInfo("cmpl-1", 1234, "m", False)


def describe(token_id: int) -> api.Token:
    return {1: ("On", b"On"), 2: ("ce", b"ce"), 3: ("\ufffd", b"\xe2\x82"), 4: ("</s>", None)}[token_id]


TOKENS = [
    TokenLogprob(1, -0.5, ((1, -0.5), (4, -2.0))),
    TokenLogprob(3, -1.5, ((2, -0.25), (3, -1.5))),
]


def test_whole_answers_are_what_the_client_reads() -> None:
    choice = api.choice(CHAT_INFO, 1, ONCE, api.chat_logprobs(TOKENS, describe), "length")
    answer = ChatCompletion.model_validate(api.response(CHAT_INFO, [choice], api.usage(3, 4)), strict=True)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 7
    assert (answer.choices[0].index, answer.choices[0].finish_reason) == (1, "length")
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert [(e.token, e.bytes, e.logprob) for e in entries] == [
        ("On", [79, 110], -0.5),
        ("\ufffd", [0xE2, 0x82], -1.5),
    ]
    assert [(t.token, t.bytes) for t in entries[0].top_logprobs] == [("On", [79, 110]), ("</s>", None)]

    logprobs, following = api.text_logprobs(TOKENS, describe, 10)
    choice = api.choice(TEXT_INFO, 0, ONCE, logprobs, "stop")
    completion = Completion.model_validate(api.response(TEXT_INFO, [choice], api.usage(3, 4)), strict=True)
    found = completion.choices[0].logprobs
    assert found is not None
    assert found.tokens == ["On", "bytes:\\xe2\\x82"]
    assert found.text_offset == [10, 12]
    assert following == 13
    assert found.top_logprobs == [{"On": -0.5, "</s>": -2.0}, {"ce": -0.25, "bytes:\\xe2\\x82": -1.5}]


def test_chunks_are_what_the_client_reads() -> None:
    chunks = [
        *api.opening(CHAT_INFO, 2, include_usage=True),
        api.chunk(CHAT_INFO, 0, Part(text="Once"), include_usage=True),
        api.chunk(CHAT_INFO, 0, Part(), finish_reason="stop", include_usage=True),
        api.closing(CHAT_INFO, api.usage(3, 4)),
    ]
    assert all("usage" in chunk for chunk in chunks)
    read = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    assert [c.choices[0].delta.role for c in read[:2]] == ["assistant"] * 2
    assert [c.choices[0].index for c in read[:2]] == [0, 1]
    assert read[2].choices[0].delta.content == "Once"
    assert (read[3].choices[0].delta.content, read[3].choices[0].finish_reason) == (None, "stop")
    assert read[4].choices == []
    assert read[4].usage is not None
    assert {c.usage for c in read[:4]} == {None}
    assert "usage" not in api.chunk(CHAT_INFO, 0, Part(text="x"))
    assert api.opening(TEXT_INFO, 2, include_usage=False) == []
    piece = Completion.model_validate(api.chunk(TEXT_INFO, 1, Part(text="x"), finish_reason="length"))
    assert (piece.choices[0].index, piece.choices[0].text) == (1, "x")
    assert Model.model_validate(api.models("m", 5)["data"][0], strict=True).id == "m"


def test_thoughts_and_calls_are_what_the_client_reads() -> None:
    parts = [Part(thought="hm "), Part(thought="yes"), Part(tool="f", arguments='{"a": 1}'), Part(tool="g")]
    choice = api.choice(CHAT_INFO, 0, parts, None, "tool_calls")
    answer = ChatCompletion.model_validate(api.response(CHAT_INFO, [choice], api.usage(3, 4, 2)), strict=True)
    message = answer.choices[0].message
    assert message.content is None
    assert message.model_extra == {"reasoning_content": "hm yes"}
    calls = message.tool_calls or []
    assert [c.function.name for c in calls if c.type == "function"] == ["f", "g"]
    assert len({call.id for call in calls}) == 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2
    chunks = [api.chunk(CHAT_INFO, 0, part, n_calls=1) for part in parts]
    deltas = [ChatCompletionChunk.model_validate(chunk, strict=True).choices[0].delta for chunk in chunks]
    assert deltas[0].model_extra == {"reasoning_content": "hm "}
    assert deltas[0].content is deltas[2].content is None
    (call,) = deltas[2].tool_calls or []
    assert call.function is not None
    assert (call.index, call.function.name, call.function.arguments) == (1, "f", '{"a": 1}')
