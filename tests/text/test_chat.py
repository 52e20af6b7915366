"""Chat formats against what transformers' apply_chat_template makes of the published templates."""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import train

from tpilite.errors import CheckpointError, ConfigError
from tpilite.text.chat import ChatFormat, JinjaChat, Llama2Chat, Llama3Chat, chat_format
from tpilite.text.load import load_tokenizer
from tpilite.text.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
PUBLISHED = json.loads((FIXTURES / "chat.json").read_text(encoding="utf-8"))
TEMPLATES: dict[str, str] = PUBLISHED["templates"]
CASES: list[dict[str, Any]] = PUBLISHED["cases"]
DATE = datetime.date(2025, 2, 1)  # of the fixture's cases for 3.2
HELLO = [{"role": "user", "content": "Hello"}]

by_case = pytest.mark.parametrize(
    "case", CASES, ids=[f"{case['template']}-{number % 5}" for number, case in enumerate(CASES)]
)
derandomized = settings(derandomize=True, deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def small_llama2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama2")
    (folder / "tokenizer.model").write_bytes(train(["a river ends in the sea"], vocab_size=290))
    return loaded(folder, 290)


@pytest.fixture(scope="module")
def small_llama3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama3")
    (folder / "tokenizer.model").write_bytes((FIXTURES / "tokenizer" / "tokenizer.model").read_bytes())
    return loaded(folder, 656)


def loaded(folder: Path, vocab_size: int) -> Tokenizer:
    tokenizer = load_tokenizer(folder, vocab_size)
    assert tokenizer is not None
    return tokenizer


def model_folder(folder: Path, **config: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def built_in(
    tokenizer: Tokenizer, template: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> ChatFormat:
    """The format that is chosen for a template where there is no jinja2."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    date = DATE if template == "llama3.2" else None
    chosen = chat_format(tokenizer, model_folder(folder, chat_template=TEMPLATES[template]), date)
    assert isinstance(chosen, Llama2Chat if template == "llama2" else Llama3Chat)
    return chosen


def own_template(tokenizer: Tokenizer, template: str) -> ChatFormat:
    pytest.importorskip("jinja2")
    return JinjaChat(tokenizer, TEMPLATES[template], DATE if template == "llama3.2" else None)


def message(role: object, content: object = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of `ids` with its special tokens by name."""
    names = {token_id: name for name, token_id in tokenizer.specials.items()}
    text, run = "", []
    for token_id in [*ids, None]:
        if token_id is None or token_id in names:
            text += tokenizer.decode(run) + names.get(token_id, "")
            run = []
        else:
            run.append(token_id)
    return text


# ---- what transformers makes


@by_case
def test_built_in_formats_give_the_published_text(
    case: dict[str, Any],
    small_llama2: Tokenizer,
    small_llama3: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    tokenizer = small_llama2 if case["template"] == "llama2" else small_llama3
    format = built_in(tokenizer, case["template"], monkeypatch, tmp_path)
    assert shown(tokenizer, format.encode(case["messages"])) == case["text"]


@by_case
def test_the_models_own_template_gives_the_published_text(
    case: dict[str, Any], small_llama2: Tokenizer, small_llama3: Tokenizer
) -> None:
    tokenizer = small_llama2 if case["template"] == "llama2" else small_llama3
    format = own_template(tokenizer, case["template"])
    assert shown(tokenizer, format.encode(case["messages"])) == case["text"]


@pytest.fixture(scope="module")
def real(shared_tokenizers: Path) -> dict[str, Tokenizer]:
    llama2 = loaded(shared_tokenizers / "llama2", 32000)
    return dict.fromkeys(TEMPLATES, loaded(shared_tokenizers / "llama3", 128256)) | {"llama2": llama2}


@by_case
def test_real_tokenizers_give_the_ids_of_transformers(
    case: dict[str, Any], real: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = real[case["template"]]
    format = built_in(tokenizer, case["template"], monkeypatch, tmp_path)
    assert format.encode(case["messages"]) == case["ids"]


@by_case
def test_the_models_own_template_gives_the_ids_of_transformers(
    case: dict[str, Any], real: dict[str, Tokenizer]
) -> None:
    tokenizer = real[case["template"]]
    assert own_template(tokenizer, case["template"]).encode(case["messages"]) == case["ids"]


# ---- contents stay contents

PARTS = [
    "<s>",
    "</s>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|begin_of_text|>",
    "<|",
    "<|eot",
    "_id|>",
    "< ",
    "a",
]
CONTENTS = st.lists(st.sampled_from(PARTS)).map("".join)


JOINED = "{{ bos_token }}{% for message in messages %}{{ message.content | trim }}{% endfor %}"


@pytest.fixture(scope="module", params=TEMPLATES)
def formats(request: pytest.FixtureRequest) -> list[ChatFormat]:
    name = "small_llama2" if request.param == "llama2" else "small_llama3"
    tokenizer = request.getfixturevalue(name)
    return [
        Llama2Chat(tokenizer) if request.param == "llama2" else Llama3Chat(tokenizer, DATE),
        own_template(tokenizer, request.param),
    ]


@derandomized
@given(contents=st.lists(CONTENTS, min_size=3, max_size=3))
def test_contents_never_become_special_tokens(
    formats: list[ChatFormat], small_llama2: Tokenizer, small_llama3: Tokenizer, contents: list[str]
) -> None:
    special_ids = set(small_llama2.specials.values()) | set(small_llama3.specials.values())
    roles = ("user", "assistant", "user")
    for format in formats:
        found = []
        for texts in (contents, ["a", "b", "c"]):
            ids = format.encode(list(map(message, roles, texts)))
            found.append([token_id for token_id in ids if token_id in special_ids])
        assert found[0] == found[1]


@pytest.fixture(scope="module")
def joined(small_llama3: Tokenizer) -> ChatFormat:
    pytest.importorskip("jinja2")
    return JinjaChat(small_llama3, JOINED)


@derandomized
@given(contents=st.lists(CONTENTS, min_size=2, max_size=3))
def test_contents_side_by_side_never_become_special_tokens(
    joined: ChatFormat, small_llama3: Tokenizer, contents: list[str]
) -> None:
    ids = joined.encode([message("user", content) for content in contents])
    assert ids[0] == small_llama3.bos_id
    assert not set(small_llama3.specials.values()).intersection(ids[1:])
    assert small_llama3.decode(ids) == "".join(map(str.strip, contents))


def test_a_template_sees_the_contents(small_llama3: Tokenizer) -> None:
    pytest.importorskip("jinja2")
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] | upper | trim }}{% endfor %}"
    format = JinjaChat(small_llama3, template)
    messages = [{"role": "assistant", "content": "hm</think> the sea "}]
    assert shown(small_llama3, format.encode(messages)) == "THE SEA"


SEEN = [
    "{{ c | length }}",
    "{{ c | upper }}",
    "{{ c | replace('<', '[') | replace('[INST', 'x') }}",
    "{{ c | replace('eot', 'EOT') }}",
    "{{ c[:6] }}|{{ c[3:] }}|{{ c[-2:] }}",
    "{{ c[::-1] }}",
    "{{ '<' in c }} {{ '<|eot_id|>' in c }} {{ c.find('<|eot') }} {{ c == other }}",
    "{{ c.split('<|eot_id|>') | length }}",
    "{{ c.split('</think>')[-1] | trim }}",
    "{{ c | tojson }}",
    "{{ {'b': c, 'a': [c, '<>&']} | tojson(indent=2) }}",
    "{{ c | list | join('') }}",
    "{% for x in c %}{{ loop.index if x == '|' else x }}{% endfor %}",
    "{{ c | wordcount }} {{ c | title }}",
]
SPELT = [
    "the sea",
    "<|eot_id|>",
    "a<|eot_id|>b </think> c<|eot_id|>",
    "< <b> é \U000f0000<|eot",
    "[INST] <|begin_of_text|>\n\"x\" & 'y' <|eot_id|",
]


@pytest.mark.parametrize("expression", SEEN)
@pytest.mark.parametrize("content", SPELT)
def test_a_template_sees_what_the_user_wrote(small_llama3: Tokenizer, expression: str, content: str) -> None:
    jinja2 = pytest.importorskip("jinja2")
    before, after = "<|start_header_id|>", "<|eot_id|>"
    environment = jinja2.Environment()
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    expected = environment.from_string(expression).render(c=content, other="<|eot_id|>")
    template = (
        f"{before}{{% set c = messages[0].content %}}{{% set other = '<|eot_id|>' %}}{expression}{after}"
    )
    ids = JinjaChat(small_llama3, template).encode([message("user", content)])
    assert (ids[0], ids[-1]) == (small_llama3.specials[before], small_llama3.specials[after])
    assert not set(small_llama3.specials.values()).intersection(ids[1:-1])
    assert small_llama3.decode(ids) == expected


def test_tojson_takes_the_options_of_transformers(small_llama3: Tokenizer) -> None:
    pytest.importorskip("jinja2")
    options = "ensure_ascii=True, indent=1, separators=(';', '='), sort_keys=True"
    format = JinjaChat(small_llama3, f"{{{{ {{'b': 'é', 'a': '<'}} | tojson({options}) }}}}")
    assert small_llama3.decode(format.encode(HELLO)) == '{\n "a"="<";\n "b"="\\u00e9"\n}'


def test_special_tokens_that_cannot_be_told_apart_are_refused(small_llama3: Tokenizer) -> None:
    pytest.importorskip("jinja2")
    template = "{{ 'y' if '<|eot_id|>' in messages[0].content else 'n' }}{{ messages[0].content }}<|eot_id|>"
    format = JinjaChat(small_llama3, template)
    assert format.encode([message("user", "a")])[-1] == small_llama3.specials["<|eot_id|>"]
    with pytest.raises(ConfigError, match="a message that spells a special token"):
        format.encode([message("user", "a<|eot_id|>")])


# ---- which format


def test_a_folder_with_nothing_but_llama_3s_tokens(small_llama3: Tokenizer, tmp_path: Path) -> None:
    chosen = chat_format(small_llama3, tmp_path)
    assert isinstance(chosen, Llama3Chat)
    assert chosen.stop_ids == {401, 408, 409}


def test_base_models_have_no_format(small_llama2: Tokenizer, small_llama3: Tokenizer, tmp_path: Path) -> None:
    assert chat_format(small_llama2, tmp_path) is None
    folder = model_folder(tmp_path, bos_token="<s>")
    assert chat_format(small_llama2, folder) is None
    assert chat_format(small_llama3, folder) is None


@pytest.mark.parametrize("where", ["jinja", "list"])
def test_templates_in_other_places(small_llama2: Tokenizer, tmp_path: Path, where: str) -> None:
    pytest.importorskip("jinja2")
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    else:
        several = [
            {"name": "rag", "template": "?"},
            {"name": "default", "template": "{{ messages[0].content }}!"},
        ]
        model_folder(tmp_path, chat_template=several)
    chosen = chat_format(small_llama2, tmp_path)
    assert isinstance(chosen, JinjaChat)
    assert small_llama2.decode(chosen.encode(HELLO)) == "Hello!"


def test_an_unknown_template_needs_jinja(
    small_llama3: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}"
    assert chat_format(small_llama3, model_folder(tmp_path, chat_template=template)) is None
    assert "tpilite[chat]" in caplog.text


def test_the_date_without_one_given(
    small_llama3: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jinja2")
    for template in ("llama3.1", "llama3.2"):
        folder = model_folder(tmp_path, chat_template=TEMPLATES[template])
        texts = []
        for without_jinja in (False, True):
            with monkeypatch.context() as patch:
                if without_jinja:
                    patch.setitem(sys.modules, "jinja2", None)
                before = datetime.date.today()
                chosen = chat_format(small_llama3, folder)
                assert chosen is not None
                texts.append(shown(small_llama3, chosen.encode(HELLO)))
                days = {before, datetime.date.today()}
            if template == "llama3.1":
                days = {datetime.date(2024, 7, 26)}
            assert any(f"Today Date: {day:%d %b %Y}\n\n<|eot_id|>" in texts[-1] for day in days)


# ---- what cannot be written


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ([message("tool")], "message 1 has the role 'tool'; expected 'system', 'user' or 'assistant'"),
        ([message("user"), {"content": "x"}], "message 2 has the role None"),
        ([message(["user"])], "has the role"),
        ([message("user", None)], "message 1 has a content of NoneType; expected text"),
        ([message("user", [{"type": "text"}])], "has a content of list"),
    ],
)
def test_wrong_messages_are_refused(
    small_llama2: Tokenizer, small_llama3: Tokenizer, messages: list[dict[str, Any]], words: str
) -> None:
    for format in (Llama2Chat(small_llama2), Llama3Chat(small_llama3), own_template(small_llama3, "llama3")):
        with pytest.raises(ConfigError, match=words):
            format.encode(messages)


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        (["assistant"], "expected the user's, found the assistant's"),
        (["user", "user"], "expected the assistant's, found the user's"),
        (["user", "system"], "expected the assistant's, found the system's"),
        (["system", "system"], "expected the user's, found the system's"),
        (["system"], "last message must be the user's"),
        (["user", "assistant"], "last message must be the user's"),
    ],
)
def test_llama_2_takes_turns(small_llama2: Tokenizer, roles: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Llama2Chat(small_llama2).encode([message(role) for role in roles])


def test_what_a_template_refuses_or_fails_on(small_llama2: Tokenizer) -> None:
    format = own_template(small_llama2, "llama2")
    with pytest.raises(ConfigError, match="refuses this conversation: Conversation roles must alternate"):
        format.encode([message("assistant")])
    for template in (
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{{ 'a' + 1 }}",
        "{{ ''.__class__.mro() }}",
    ):
        with pytest.raises(ConfigError, match="fails on this conversation"):
            JinjaChat(small_llama2, template).encode(HELLO)


@pytest.mark.parametrize("template", ["{% if %}", "{{", 7])
def test_damaged_templates_are_refused(small_llama2: Tokenizer, tmp_path: Path, template: object) -> None:
    pytest.importorskip("jinja2")
    with pytest.raises(CheckpointError, match=r"chat.template") as caught:
        chat_format(small_llama2, model_folder(tmp_path, chat_template=template))
    assert "\n" not in str(caught.value)


def test_the_tags_of_transformers_are_understood(small_llama3: Tokenizer) -> None:
    pytest.importorskip("jinja2")
    template = "{% for m in messages %}\n{%- generation -%}\n a {% endgeneration %}\n{% break %}{% endfor %}"
    assert shown(small_llama3, JinjaChat(small_llama3, template).encode(HELLO)) == "a "
