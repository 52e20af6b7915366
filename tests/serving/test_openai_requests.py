"""Requests of OpenAI's API, against the types of OpenAI's own client."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.chat.answers import Part
from tpilite.engine.sampling import SamplingParams
from tpilite.serving import openai_requests as api
from tpilite.serving import openai_responses
from tpilite.serving.errors import ApiError

client = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")

from openai.types.chat import ChatCompletion  # noqa: E402  # where the client is missing, these are too
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatFields  # noqa: E402
from openai.types.completion_create_params import CompletionCreateParamsBase as TextFields  # noqa: E402

DEFAULTS = SamplingParams(p=0.8, k=7)
HELLO = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "m", "messages": HELLO}
TEXT = {"model": "m", "prompt": "Once"}
CHAT_INFO = openai_responses.ResponseInfo("chatcmpl-1", 1234, "m", True)


def chat(**fields: Any) -> api.Request:
    return api.parse_chat({**CHAT, **fields}, DEFAULTS)


def text(**fields: Any) -> api.Request:
    return api.parse_completion({**TEXT, **fields}, DEFAULTS)


def whole_answer(choice: Any) -> ChatCompletion:
    spent = openai_responses.usage(1, 1)
    return ChatCompletion.model_validate(openai_responses.response(CHAT_INFO, [choice], spent))


def refused(parse: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.body["error"].keys() == {"message", "type", "param", "code"}
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    return caught.value


def test_fields_become_sampling_params() -> None:
    request = chat(
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.3,
        top_k=4,
        min_p=0.1,
        seed=5,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"3": -100, "4": 1.5},
        stop=["a", "b"],
        logprobs=True,
        top_logprobs=3,
        n=2,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
    )
    assert request.params == SamplingParams(
        length=9,
        temperature=0.5,
        p=0.3,
        k=4,
        min_p=0.1,
        seed=5,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={3: -100, 4: 1.5},
        stop=("a", "b"),
        logprobs=3,
    )
    assert (request.n, request.stream, request.include_usage) == (2, True, True)
    assert request.messages == tuple(HELLO)


def test_what_is_absent_or_null_is_the_services_default() -> None:
    assert chat().params == DEFAULTS
    nothing = dict.fromkeys(["temperature", "top_p", "stop", "seed", "n", "logprobs", "tools", "metadata"])
    assert chat(**nothing) == chat()
    assert chat(**nothing).n == 1
    assert text().params.length == 16
    assert api.parse_completion(TEXT, SamplingParams(length=99)).params.length == 99
    assert api.parse_completion({"model": "m"}, DEFAULTS).prompts == ("",)


def test_values_with_a_meaning_of_their_own() -> None:
    assert chat(max_tokens=3).params.length == 3
    assert text(max_tokens=0).params.length == 0
    assert chat(stop="x").params.stop == ("x",)
    assert chat(seed=-1).params.seed == 2**64 - 1
    assert chat(top_k=-1).params.k == 0
    assert 0 < (chat(top_p=0).params.p or 1) < 1e-6
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=False).params.logprobs is None
    assert text(logprobs=2).params.logprobs == 2
    assert text(echo=True).echo


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ([1, 2],)), ([[1], [2, 3]], ([1], [2, 3]))],
)
def test_prompts_are_texts_or_ids_one_or_many(prompt: Any, prompts: Any) -> None:
    assert text(prompt=prompt).prompts == prompts


def test_messages_of_parts_and_of_answers_sent_back() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages == tuple(HELLO)
    assert chat(messages=[{"role": "developer", "content": "x"}]).messages == (
        {"role": "system", "content": "x"},
    )
    answer = openai_responses.choice(CHAT_INFO, 0, [Part(text="Hi")], None, "stop")
    whole = whole_answer(answer)
    returned = whole.choices[0].message.model_dump()
    messages = chat(messages=[*HELLO, returned, *HELLO]).messages
    assert messages is not None
    assert messages[1] == {"role": "assistant", "content": "Hi"}


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NO_CALL = {"function": {"name": "f", "arguments": "[]"}}
PART = {"type": "text", "text": "Hello", "id": "1", "index": 0, "cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "none"},
        {"tools": [], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": True},
        {"documents": [], "add_generation_prompt": True, "continue_final_message": False},
        {"functions": [TOOL], "function_call": "none"},
        {"store": True, "metadata": {"a": "b"}, "service_tier": "flex", "user": "ann"},
        {"safety_identifier": "x", "prompt_cache_key": "y", "prediction": None},
        {"prediction": {"type": "content", "content": "Hello"}},
        {"modalities": ["text"], "response_format": {"type": "text"}, "audio": None},
        {"reasoning_effort": "low", "verbosity": "medium", "logit_bias": {}, "n": 1, "stop": []},
        {"stream_options": {"include_usage": True, "include_obfuscation": True}},
        {"cache_control": {"type": "ephemeral"}, "skip_special_tokens": True, "ignore_eos": False},
        {"max_tokens": None, "max_completion_tokens": None},
        {"messages": [{**HELLO[0], "name": "Ann", "id": "1", "cache_control": {"type": "ephemeral"}}]},
        {"messages": [{**HELLO[0], "tool_calls": [], "function_call": None, "audio": None, "refusal": None}]},
        {"messages": [{"role": "user", "content": [PART]}]},
        {"logprobs": False, "top_logprobs": 0},
    ],
)
def test_what_clients_send_as_a_matter_of_course_changes_nothing(fields: dict[str, Any]) -> None:
    request = chat(**fields)
    assert request.messages == tuple(HELLO)
    assert request.params == DEFAULTS


def test_an_empty_answer_can_be_sent_back() -> None:
    empty = {"role": "assistant", "content": None, "reasoning_content": "Hm", "tool_calls": None}
    assert chat(messages=[*HELLO, empty, *HELLO]).messages == (
        *HELLO,
        {"role": "assistant", "content": "", "reasoning_content": "Hm"},
        *HELLO,
    )


def test_calls_and_their_results_reach_the_template() -> None:
    parts = [Part(thought="hm"), Part(tool="f", arguments='{"a": 1}')]
    answer = openai_responses.choice(CHAT_INFO, 0, parts, None, "tool_calls")
    whole = whole_answer(answer)
    returned = whole.choices[0].message.model_dump()
    call_id = returned["tool_calls"][0]["id"]
    result = {"role": "tool", "tool_call_id": call_id, "content": "2"}
    assert chat(messages=[*HELLO, returned, result]).messages == (
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": call_id, "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
            ],
        },
        result,
    )


def test_tools_and_documents_reach_the_template() -> None:
    function = {"name": "f", "description": "x", "parameters": {"type": "object"}}
    given = [{"type": "function", "function": {**function, "strict": True}}]
    request = chat(tools=given, documents=[{"text": "x"}], tool_choice="auto", parallel_tool_calls=False)
    assert request.tools == ({"type": "function", "function": function},)
    assert request.documents == ({"text": "x"},)
    assert request.one_call
    assert not chat(tools=given).one_call
    assert chat(tools=given, tool_choice="none").tools == ()
    assert chat(continue_final_message=True, add_generation_prompt=False).continues
    assert not chat(continue_final_message=False, add_generation_prompt=True).continues


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 5}, "model", "invalid_type"),
        ({"messages": "Hello"}, "messages", "invalid_type"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": ["x"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "unsupported_parameter"),
        ({"messages": [{**HELLO[0], "tool_calls": [CALL]}]}, "messages[0].tool_calls", "invalid_value"),
        ({"messages": [{**HELLO[0], "nam": "Ann"}]}, "messages[0].nam", "unknown_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
            "missing_required_parameter",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [CALL, {"function": {"name": "f", "arguments": "[]"}}],
                    }
                ]
            },
            "messages[0].tool_calls[1].function.arguments",
            "invalid_value",
        ),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"temperature": 2.5}, "temperature", "decimal_above_max_value"),
        ({"temperature": -1}, "temperature", "integer_below_min_value"),
        ({"top_p": 1.1}, "top_p", "decimal_above_max_value"),
        ({"top_k": 1.5}, "top_k", "invalid_type"),
        ({"min_p": 2}, "min_p", "integer_above_max_value"),
        ({"presence_penalty": 3}, "presence_penalty", "integer_above_max_value"),
        ({"frequency_penalty": -3}, "frequency_penalty", "integer_below_min_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "integer_below_min_value"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 129}, "n", "integer_above_max_value"),
        ({"n": 1.0}, "n", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 10**400}, "max_tokens", "integer_above_max_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": [5]}, "stop[0]", "invalid_type"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1", "invalid_type"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "integer_above_max_value"),
        ({"logprobs": 3}, "logprobs", "invalid_type"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"stream": 1}, "stream", "invalid_type"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"user": 5}, "user", "invalid_type"),
        ({"colour": "red"}, "colour", "unknown_parameter"),
        ({"echo": True}, "echo", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "unsupported_parameter"),
        (
            {"tools": [{"type": "function", "function": {"name": ""}}]},
            "tools[0].function.name",
            "invalid_value",
        ),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"documents": ["x"]}, "documents[0]", "invalid_type"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "unsupported_parameter"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
            "invalid_value",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"store": 0}, "store", "invalid_type"),
    ],
)
def test_each_wrong_field_of_a_chat_is_named(fields: dict[str, Any], param: str, code: str) -> None:
    error = refused(chat, **fields)
    assert (error.param, error.code) == (param, code)
    assert param in str(error)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": []}, "prompt", "empty_array"),
        ({"prompt": ["a", 5]}, "prompt[1]", "invalid_type"),
        ({"prompt": [[1, "a"]]}, "prompt[0]", "invalid_type"),
        ({"prompt": [[True]]}, "prompt[0]", "invalid_type"),
        ({"prompt": ["a"] * 20, "n": 10}, "n", "invalid_value"),
        ({"logprobs": 6}, "logprobs", "integer_above_max_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"logprobs": 1, "echo": True}, "logprobs", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
        ({"messages": HELLO}, "messages", "unknown_parameter"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "unknown_parameter"),
    ],
)
def test_each_wrong_field_of_a_completion_is_named(fields: dict[str, Any], param: str, code: str) -> None:
    error = refused(text, **fields)
    assert (error.param, error.code) == (param, code)
    assert param in str(error)


@pytest.mark.parametrize(("parse", "names"), [(chat, ChatFields), (text, TextFields)])
def test_every_field_of_the_client_is_known(parse: Any, names: Any) -> None:
    """A value of no sensible type is refused, but never as an unknown field."""
    for name in names.__annotations__.keys() | {"stream", "stream_options"}:
        error = refused(parse, **{name: [{"a": [1.5]}]})
        assert error.code != "unknown_parameter", name
        assert (error.param or "").startswith(name)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[1]",
        b'"text"',
        b"null",
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        api.parse_json(raw)
    assert caught.value.status == 400
    assert api.parse_json(b'{"a": 1e3}') == {"a": 1000.0}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(sorted({*ChatFields.__annotations__, *TextFields.__annotations__, "stream", "top_k"}))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.dictionaries(names, anything, max_size=4), st.booleans())
def test_no_body_breaks_the_reader(body: dict[str, Any], complete: bool) -> None:
    for parse, whole in ((api.parse_chat, CHAT), (api.parse_completion, TEXT)):
        found: list[ApiError] = []
        try:
            parse({**(whole if complete else {}), **body}, DEFAULTS)
        except ApiError as error:
            found.append(error)
        assert {error.status for error in found} <= {400}
        json.dumps([error.body for error in found], allow_nan=False)
