"""Completions over HTTP, as OpenAI's own client reads them: whole, streamed, given up, paused."""

import json
import re
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from servers import (
    CONFIG,
    HELLO,
    JSON,
    Gate,
    client_of,
    eventually,
    figures,
    get,
    health,
    lossy,
    post,
    served,
    write_model,
)

from tpilite import LLM, SamplingParams
from tpilite.chat.answers import AnswerSyntax
from tpilite.chat.format import ChatPrompt
from tpilite.errors import PeerLost
from tpilite.net import body_memory, http_server
from tpilite.serving import answer, openai_requests
from tpilite.serving import service as service_module
from tpilite.serving.server import Server
from tpilite.text.tokenizer import Tokenizer

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")


def test_a_completion_is_what_the_model_says(client: Any, llm: LLM) -> None:
    expected = llm.generate("Once upon", SamplingParams(temperature=0, length=20))
    answer = client.completions.create(model="tiny", prompt="Once upon", temperature=0, max_tokens=20)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    n_prompt = len(llm.tokenizer.encode("Once upon"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 20)
    assert answer.usage.total_tokens == n_prompt + 20
    ids = llm.tokenizer.encode("Once upon")
    by_ids = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=20, echo=True)
    assert by_ids.choices[0].text == "Once upon" + expected.text
    nothing = client.completions.create(model="tiny", prompt="Once", max_tokens=0, echo=True)
    assert (nothing.choices[0].text, nothing.usage.completion_tokens) == ("Once", 0)


def test_a_chat_is_answered_as_the_model_answers(client: Any, llm: LLM) -> None:
    params = SamplingParams(
        seed=7, temperature=0.8, p=0.9, k=40, min_p=0.01, repetition_penalty=1.1, length=20
    )
    request = llm.start_chat(HELLO, params)
    expected = "".join(llm.run(request))
    fields = {
        "model": "tiny",
        "messages": HELLO,
        "seed": 7,
        "temperature": 0.8,
        "top_p": 0.9,
        "max_completion_tokens": 20,
        "extra_body": {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1},
    }
    answer = client.chat.completions.create(**fields)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(request.prompt_ids)
    chunks = list(
        client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == answer.usage
    assert len(chunks) > 10
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_answer_does_not_begin_with_the_tokenizers_space(client: Any, llm: LLM) -> None:
    word = llm.tokenizer.encode(" river", bos=False)[0]
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=1, logit_bias={str(word): 100}
    )
    assert llm.tokenizer.token_bytes(word).startswith(b" ")
    assert not answer.choices[0].message.content.startswith(" ")


def test_several_choices_have_seeds_of_their_own(client: Any) -> None:
    def texts(**fields: Any) -> list[str]:
        answer = client.completions.create(model="tiny", max_tokens=12, temperature=1, **fields)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    pairs = texts(prompt=["Once", "One"], n=2, seed=5)
    assert pairs[:2] == [texts(prompt="Once", seed=5)[0], texts(prompt="Once", seed=6)[0]]
    assert pairs[2:] == texts(prompt="One", n=2, seed=5)
    assert len(set(pairs)) == 4
    streamed = ["", "", "", ""]
    chunks = client.completions.create(
        model="tiny", max_tokens=12, temperature=1, prompt=["Once", "One"], n=2, seed=5, stream=True
    )
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == pairs


def test_stop_texts_end_the_text_before_them(client: Any, llm: LLM) -> None:
    whole = llm.generate("Once", SamplingParams(temperature=0, length=30)).text
    stop = whole[20:24]
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny",
            prompt="Once",
            temperature=0,
            max_tokens=30,
            stop=["§", stop],
            stream=stream,
            logprobs=0,
        )
        choices = [c.choices[0] for c in (answer if stream else [answer])]
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"
        # What is not shown has no log-probabilities either; its last token may be shown in part.
        tokens = [t for choice in choices if choice.logprobs for t in choice.logprobs.tokens]
        *before, last = (len(re.sub(r"bytes:(\\x..)+", "\ufffd", token)) for token in tokens)
        assert sum(before) < whole.index(stop) <= sum(before) + last


def test_logprobs_are_the_models_own(client: Any, llm: LLM) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    request = llm.start_chat(HELLO, SamplingParams(temperature=0, length=5, logprobs=3))
    for _ in llm.run(request):
        pass
    entries = answer.choices[0].logprobs.content
    assert [e.logprob for e in entries] == pytest.approx([t.logprob for t in request.logprobs], abs=1e-5)
    assert b"".join(bytes(e.bytes) for e in entries) == b"".join(
        llm.tokenizer.token_bytes(i) for i in request.new_ids
    )
    assert all(len(e.top_logprobs) == 3 and e.top_logprobs[0].logprob == e.logprob for e in entries)
    chunks = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in entries]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in entries], abs=1e-5)
    text = client.completions.create(model="tiny", prompt="Once", max_tokens=5, temperature=0, logprobs=2)
    logprobs = text.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_the_end_of_a_text_is_stop(tmp_path: Path, llm: LLM) -> None:
    eos = llm.generate("Once", SamplingParams(temperature=0, length=8)).ids[7]
    folder = write_model(tmp_path, eos_token_ids=(eos,))
    with LLM(folder, threads=1) as session, served(session, CONFIG) as server, client_of(server) as client:
        answer = client.completions.create(
            model="tiny", prompt="Once", temperature=0, max_tokens=50, logprobs=0
        )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.tokens) + 1 <= 8


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": "gpt-9"}, "model_not_found", "model"),
        ({"messages": [{"role": "user", "content": "river " * 300}]}, "context_length_exceeded", "messages"),
        ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
        ({"temperature": 3}, "integer_above_max_value", "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
        ({"logit_bias": {"400": 1}}, "invalid_value", "messages"),
        ({"extra_body": {"colour": "red"}}, "unknown_parameter", "colour"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais(client: Any, fields: Any, code: str, param: str, stream: bool) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "stream": stream, **fields})
    error = caught.value
    assert error.status_code == (404 if code == "model_not_found" else 400)
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert error.request_id


def test_the_cap_of_a_chat_is_cut_to_what_the_context_leaves(client: Any, llm: LLM) -> None:
    n_prompt = len(llm.encode_chat(HELLO).ids)
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=100_000)
    assert answer.usage.completion_tokens == 256 - n_prompt
    assert answer.choices[0].finish_reason == "length"


def test_variables_reach_the_models_own_template(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{% if loud %}!{{ loud }}{% endif %}"
    )
    with LLM(folder, threads=1) as session, served(session, CONFIG) as server, client_of(server) as client:

        def n_prompt(**variables: Any) -> int:
            extra = {"chat_template_kwargs": variables}
            answer = client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=1, extra_body=extra
            )
            return answer.usage.prompt_tokens

        plain = len(session.encode_chat(HELLO).ids)
        assert n_prompt(enable_thinking=False) == n_prompt() == plain
        assert n_prompt(loud="and clear") > plain
        for wrong in ({"messages": []}, {"bos_token": "x"}, {"loud": "</s>"}, {"loud": ["x"]}):
            with pytest.raises(openai.BadRequestError, match="variable"):
                n_prompt(**wrong)


def test_a_model_without_a_chat_format_says_so(tmp_path: Path) -> None:
    folder = write_model(tmp_path, chat=False)
    with LLM(folder, threads=1) as session, served(session, CONFIG) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="not made for chat"):
            client.chat.completions.create(model="tiny", messages=HELLO)
        assert client.completions.create(model="tiny", prompt="Once").usage.completion_tokens == 16
        assert not json.loads(get(server, "/v1/cluster")[2])["model"]["chat"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place_within_a_pass(session: LLM, stream: bool) -> None:
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server) as client:
        body = json.dumps({"model": "tiny", "prompt": "Once", "max_tokens": 200, "stream": stream}).encode()
        request = b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (JSON, len(body), body)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request)
            gate.let(3)
            eventually(lambda: gate.n_steps == 3)
        eventually(lambda: figures(server)["requests_cancelled"] == 1)
        assert figures(server)["requests_running"] == 0
        gate.let()  # for the pass that may have been about to be made
        waiting = client.completions.create(model="tiny", prompt="One", max_tokens=2, stream=True)
        gate.let(2)
        assert [c.choices[0].finish_reason for c in waiting][-1] == "length"
        assert gate.n_steps <= 3 + 1 + 2


def test_the_clients_time_out_ends_the_work(session: LLM) -> None:
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server, timeout=0.5) as client:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="tiny", messages=HELLO)
        eventually(lambda: figures(server)["requests_cancelled"] == 1)
        gate.open()


def test_leaving_a_stream_early_ends_the_work(session: LLM) -> None:
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server) as client:
        with client.chat.completions.create(model="tiny", messages=HELLO, stream=True) as stream:
            gate.let(2)
            assert next(iter(stream))
        eventually(lambda: figures(server)["requests_cancelled"] == 1)
        gate.open()
        assert client.completions.create(model="tiny", prompt="Once").choices


def test_a_lost_rank_pauses_streams_and_they_go_on(
    session: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "_KEEP_ALIVE_S", 0.1)
    back = threading.Event()

    def recover(_lost: PeerLost) -> None:
        assert back.wait(30)
        session.engine.runner.reset()

    recovery = lossy(session, monkeypatch, recover)
    expected = llm.generate("Once", SamplingParams(temperature=0, length=8)).text
    with served(session, CONFIG, recovery=recovery) as server:
        body = json.dumps(
            {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 8, "stream": True}
        ).encode()
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.0\r\n%sContent-Length: %d\r\n\r\n%s" % (JSON, len(body), body)
            )
            text = b""
            while b": waiting\n\n" not in text:
                text += connection.recv(65536)
            assert health(server) == {"status": "waiting", "reason": "rank 1 (pi-two) is gone"}
            assert get(server, "/health")[0] == 503
            assert b"tpilite_up 0" in get(server, "/metrics")[2]
            back.set()
            while piece := connection.recv(65536):
                text += piece
        events = [line[6:] for line in text.decode().split("\n") if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        assert "".join(json.loads(e)["choices"][0]["text"] for e in events) == expected
        assert health(server) == {"status": "ok", "reason": None}


def test_past_the_grace_open_streams_are_told(session: LLM) -> None:
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server) as client:
        stream = client.completions.create(model="tiny", prompt="Once", max_tokens=100, stream=True)
        gate.let(3)
        assert next(iter(stream))
        ending = threading.Thread(target=server._completions._service.close)
        ending.start()
        gate.let(1)
        ending.join()
        with pytest.raises(openai.APIError, match="stopped before this answer was complete"):
            list(stream)


def test_what_cannot_fit_is_refused_by_its_length(
    shared: Server, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is decoded, and before it is made tokens."""
    most = llm.max_prompt_bytes
    assert most is not None

    def never(*_: Any) -> Any:
        pytest.fail("it was read")

    def refused(path: str, body: dict[str, Any]) -> str:
        status, _, answer = post(shared, path, {"model": "tiny", **body})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        return answer["error"]["message"]

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", never)
        long = {"role": "user", "content": "a" * (most + 1)}
        assert "tokens" in refused("/v1/chat/completions", {"messages": [long]})
        assert "tokens" in refused("/v1/completions", {"prompt": "a" * (most + 1)})
        assert "tokens" in refused("/v1/completions", {"prompt": ["\u00e9" * (most // 2 + 1), "a"]})
        patch.setattr(openai_requests, "parse_json", never)
        huge = {"role": "user", "content": "a" * 3_900_000}
        assert "bytes" in refused("/v1/chat/completions", {"messages": [huge]})
    # Spaces around a message are no part of it.
    spaced = [{"role": "user", "content": " " * most + "Hello" + " " * 9}]
    monkeypatch.setattr(llm.chat_format, "encode", lambda messages, **_: ChatPrompt([1], AnswerSyntax()))
    assert llm.encode_chat(spaced).ids == [1]


@pytest.mark.parametrize("n_sent", [10, 100_000], ids=["little", "much"])
def test_bodies_that_trickle_in_keep_no_large_one_out(
    shared: Server, n_sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has sent little holds nothing yet; who has sent much and stops makes room."""
    monkeypatch.setattr(http_server, "_SLOW_S", 60.0 if n_sent < 1000 else 0.1)
    monkeypatch.setattr(body_memory, "_WAIT_S", 10.0)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {4 << 20}\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(4):
            trickling = socket.create_connection(("127.0.0.1", shared.port), 10)
            stack.enter_context(trickling).sendall(head.encode() + b" " * n_sent)
        while n_sent > 1000 and not shared._routes._memory.is_wanted():
            time.sleep(0.01)
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 1, "user": " " * 300_000}
        assert post(shared, "/v1/completions", body)[0] == 200


def test_several_prompts_have_a_bound_together(
    client: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = llm.engine.context
    monkeypatch.setattr(service_module, "_MAX_PROMPT_TOKENS", 0)
    ask = {"model": "tiny", "max_tokens": 1}
    client.completions.create(prompt=[[5] * (most // 2)] * 2, **ask)
    with pytest.raises(openai.BadRequestError, match=f"the prompts together have more than {most} tokens"):
        client.completions.create(prompt=[[5] * (most // 2)] * 3, **ask)
