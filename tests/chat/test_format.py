"""Chat formats against what transformers' apply_chat_template makes of the published templates."""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import loaded, train

from tpilite.chat.format import ChatFormat, chat_format
from tpilite.errors import CheckpointError, ConfigError
from tpilite.formats.model_files import ModelFiles
from tpilite.text.templates import find_templates
from tpilite.text.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
PUBLISHED = json.loads((FIXTURES / "chat.json").read_text(encoding="utf-8"))
TEMPLATES: dict[str, str] = PUBLISHED["templates"]
CASES: list[dict[str, Any]] = PUBLISHED["cases"]
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


def formatted(tokenizer: Tokenizer, template: str) -> ChatFormat:
    return ChatFormat(tokenizer, {"default": template})


def published(tokenizer: Tokenizer, template: str) -> ChatFormat:
    """The format of a published template, on the day of the fixture's cases."""
    format = formatted(tokenizer, TEMPLATES[template])
    return format.with_variables({"date_string": "01 Feb 2025"}) if template == "llama3.2" else format


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
def test_the_models_own_template_gives_the_published_text(
    case: dict[str, Any], small_llama2: Tokenizer, small_llama3: Tokenizer
) -> None:
    tokenizer = small_llama2 if case["template"] == "llama2" else small_llama3
    format = published(tokenizer, case["template"])
    assert shown(tokenizer, format.encode(case["messages"]).ids) == case["text"]


@pytest.fixture(scope="module")
def real(shared_tokenizers: Path) -> dict[str, Tokenizer]:
    llama2 = loaded(shared_tokenizers / "llama2", 32000)
    return dict.fromkeys(TEMPLATES, loaded(shared_tokenizers / "llama3", 128256)) | {"llama2": llama2}


@by_case
def test_the_models_own_template_gives_the_ids_of_transformers(
    case: dict[str, Any], real: dict[str, Tokenizer]
) -> None:
    tokenizer = real[case["template"]]
    assert published(tokenizer, case["template"]).encode(case["messages"]).ids == case["ids"]


PROMPTS = json.loads((FIXTURES / "templates" / "prompts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("template", PROMPTS["prompts"])
def test_templates_of_many_families_give_the_prompts_of_transformers(
    template: str, small_llama3: Tokenizer
) -> None:
    text = (FIXTURES / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    with ChatFormat(small_llama3, {"default": text}, {"unk_token": "<unk>", "pad_token": "<pad>"}) as format:
        for asked, expected in zip(PROMPTS["conversations"], PROMPTS["prompts"][template], strict=True):
            options = {name: asked[name] for name in ("tools", "documents", "continues") if name in asked}
            given = format.with_variables({"date_string": "01 Feb 2025", **asked.get("variables", {})})
            ignored = {name for name in ("tools", "documents") if name in asked and name not in text}
            if ignored:
                with pytest.raises(ConfigError, match=f"takes no {ignored.pop()}"):
                    given.encode(asked["messages"], **options)
            elif "error" in expected:
                with pytest.raises(ConfigError) as caught:
                    given.encode(asked["messages"], **options)
                assert str(caught.value).endswith(expected["error"])
            else:
                assert shown(small_llama3, given.encode(asked["messages"], **options).ids) == expected["text"]


@pytest.mark.parametrize(
    ("template", "variables", "thinking"),
    [
        ("qwen", {}, False),
        ("qwen", {"enable_thinking": False}, False),
        ("deepseek", {}, True),
        ("chatml", {}, None),
    ],
)
def test_a_prompt_says_what_its_answer_may_begin_with(
    template: str, variables: dict[str, Any], thinking: bool | None, small_llama3: Tokenizer
) -> None:
    text = (FIXTURES / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    syntax = formatted(small_llama3, text).with_variables(variables).encode(HELLO).syntax
    assert (syntax.thinking, syntax.calls) == (thinking, None)


def test_offered_tools_are_told(small_llama3: Tokenizer) -> None:
    text = (FIXTURES / "templates" / "qwen.jinja").read_text(encoding="utf-8")
    tools = [{"type": "function", "function": {"name": "f"}}, {"name": "g"}, {"function": 7}]
    syntax = formatted(small_llama3, text).encode(HELLO, tools=tools).syntax
    assert syntax.tools == {"f", "g"}
    assert syntax.calls is not None
    assert syntax.calls.opening == ("<tool_call>",)


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


@pytest.fixture(scope="module", params=TEMPLATES)
def format(request: pytest.FixtureRequest) -> Iterator[ChatFormat]:
    name = "small_llama2" if request.param == "llama2" else "small_llama3"
    with published(request.getfixturevalue(name), request.param) as format:
        yield format


JOINED = "{{ bos_token }}{% for message in messages %}{{ message.content | trim }}{% endfor %}"


@derandomized
@given(contents=st.lists(CONTENTS, min_size=3, max_size=3))
def test_contents_never_become_special_tokens(
    format: ChatFormat, small_llama2: Tokenizer, small_llama3: Tokenizer, contents: list[str]
) -> None:
    special_ids = set(small_llama2.specials.values()) | set(small_llama3.specials.values())
    roles = ("user", "assistant", "user")
    found = []
    for texts in (contents, ["a", "b", "c"]):
        ids = format.encode(list(map(message, roles, texts))).ids
        found.append([token_id for token_id in ids if token_id in special_ids])
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def joined(small_llama3: Tokenizer) -> ChatFormat:
    return formatted(small_llama3, JOINED)


@derandomized
@given(contents=st.lists(CONTENTS, min_size=2, max_size=3))
def test_contents_side_by_side_never_become_special_tokens(
    joined: ChatFormat, small_llama3: Tokenizer, contents: list[str]
) -> None:
    ids = joined.encode([message("user", content) for content in contents]).ids
    assert ids[0] == small_llama3.bos_id
    assert not set(small_llama3.specials.values()).intersection(ids[1:])
    assert small_llama3.decode(ids) == "".join(map(str.strip, contents))


def test_a_template_sees_the_contents(small_llama3: Tokenizer) -> None:
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] | upper | trim }}{% endfor %}"
    format = formatted(small_llama3, template)
    messages = [{"role": "assistant", "content": "hm</think> the sea "}]
    assert shown(small_llama3, format.encode(messages).ids) == "THE SEA"


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
def test_a_template_sees_what_the_user_wrote(small_llama3: Tokenizer, expression: str) -> None:
    before, after = "<|start_header_id|>", "<|eot_id|>"
    environment = jinja2.Environment()
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    template = (
        f"{before}{{% set c = messages[0].content %}}{{% set other = '<|eot_id|>' %}}{expression}{after}"
    )
    format = formatted(small_llama3, template)
    for content in SPELT:
        ids = format.encode([message("user", content)]).ids
        assert (ids[0], ids[-1]) == (small_llama3.specials[before], small_llama3.specials[after])
        assert not set(small_llama3.specials.values()).intersection(ids[1:-1])
        expected = environment.from_string(expression).render(c=content, other="<|eot_id|>")
        assert small_llama3.decode(ids) == expected


def test_tojson_takes_the_options_of_transformers(small_llama3: Tokenizer) -> None:
    options = "ensure_ascii=True, indent=1, separators=(';', '='), sort_keys=True"
    format = formatted(small_llama3, f"{{{{ {{'b': 'é', 'a': '<'}} | tojson({options}) }}}}")
    assert small_llama3.decode(format.encode(HELLO).ids) == '{\n "a"="<";\n "b"="\\u00e9"\n}'


def test_special_tokens_that_cannot_be_told_apart_are_refused(small_llama3: Tokenizer) -> None:
    template = "{{ 'y' if '<|eot_id|>' in messages[0].content else 'n' }}{{ messages[0].content }}<|eot_id|>"
    format = formatted(small_llama3, template)
    assert format.encode([message("user", "a")]).ids[-1] == small_llama3.specials["<|eot_id|>"]
    with pytest.raises(ConfigError, match="a message that spells a special token"):
        format.encode([message("user", "a<|eot_id|>")])


def test_what_tools_documents_and_other_fields_spell_stays_text(small_llama3: Tokenizer) -> None:
    template = (
        "<|eot_id|>{{ tools | tojson }}{{ documents[0].text }}{{ messages[0].reasoning_content }}<|eot_id|>"
    )
    spelt = "a<|eot_id|>b"
    tool = {"type": "function", "function": {"name": spelt, "parameters": {spelt: [spelt]}}}
    hello = [{**HELLO[0], "reasoning_content": spelt}]
    format = formatted(small_llama3, template)
    ids = format.encode(hello, tools=[tool], documents=[{"text": spelt}]).ids
    assert [i for i in ids if i in small_llama3.specials.values()] == [ids[0], ids[-1]]
    assert small_llama3.decode(ids) == json.dumps([tool]) + spelt + spelt


# ---- which template


def test_the_template_is_chosen_as_transformers_does(small_llama3: Tokenizer) -> None:
    templates = {"default": "{{ documents }} one", "tool_use": "{{ tools | length }} many", "rag": "?"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    with ChatFormat(small_llama3, templates) as format:

        def text(**options: Any) -> str:
            return small_llama3.decode(format.encode(HELLO, **options).ids)

        assert text() == "None one"
        assert text(tools=tools) == "1 many"
        with pytest.raises(ConfigError, match="takes no documents"):
            text(tools=tools, documents=[{"text": "x"}])
    with pytest.raises(ConfigError, match='for other uses only \\("rag", "tool_use"\\), and no default'):
        ChatFormat(small_llama3, {"rag": "?", "tool_use": "?"}).encode(HELLO)
    with pytest.raises(ConfigError, match="takes no tools"):
        formatted(small_llama3, "{{ messages[0].content }}").encode(HELLO, tools=tools)


def test_a_model_without_templates_was_not_made_for_chat(small_llama2: Tokenizer) -> None:
    assert chat_format(small_llama2, {}) is None


def test_llama_3s_own_format_for_a_folder_that_has_none(small_llama3: Tokenizer, tmp_path: Path) -> None:
    format = chat_format(small_llama3, find_templates(ModelFiles(tmp_path), small_llama3.specials))
    assert format is not None
    assert format.stop_ids == {401, 408, 409}
    for case in CASES:
        if case["template"] == "llama3":
            assert shown(small_llama3, format.encode(case["messages"]).ids) == case["text"]


def test_the_date_without_one_given(small_llama3: Tokenizer) -> None:
    for template in ("llama3.1", "llama3.2"):
        before = datetime.date.today()
        text = shown(small_llama3, formatted(small_llama3, TEMPLATES[template]).encode(HELLO).ids)
        days = {before, datetime.date.today()} if template == "llama3.2" else {datetime.date(2024, 7, 26)}
        assert any(f"Today Date: {day:%d %b %Y}\n\n<|eot_id|>" in text for day in days)


# ---- what cannot be written


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        (
            [message("ipython")],
            "message 1 has the role 'ipython'; expected 'system', 'user', 'assistant' or 'tool'",
        ),
        ([message("user"), {"content": "x"}], "message 2 has the role None"),
        ([message(["user"])], "has the role"),
        ([message("user", None)], "message 1 has a content of NoneType; expected text"),
        ([message("user", [{"type": "text"}])], "has a content of list"),
    ],
)
def test_wrong_messages_are_refused(
    small_llama3: Tokenizer, messages: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        formatted(small_llama3, "").encode(messages)


def test_what_a_template_refuses_or_fails_on(small_llama2: Tokenizer) -> None:
    format = published(small_llama2, "llama2")
    with pytest.raises(ConfigError, match="refuses this conversation: Conversation roles must alternate"):
        format.encode([message("assistant")])
    for template in (
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{{ 'a' + 1 }}",
        "{{ ''.__class__.mro() }}",
    ):
        with pytest.raises(ConfigError, match="fails on this conversation"):
            formatted(small_llama2, template).encode(HELLO)


def test_the_tags_of_transformers_are_understood(small_llama3: Tokenizer) -> None:
    template = "{% for m in messages %}\n{%- generation -%}\n a {% endgeneration %}\n{% break %}{% endfor %}"
    assert shown(small_llama3, formatted(small_llama3, template).encode(HELLO).ids) == "a "


@pytest.mark.parametrize("template", ["{% if %}", "{{"])
def test_damaged_templates_are_refused(small_llama2: Tokenizer, template: str) -> None:
    for use in (ChatFormat.open, lambda format: format.encode(HELLO)):
        with pytest.raises(CheckpointError, match="chat template is damaged") as caught:
            use(formatted(small_llama2, template))
        assert "\n" not in str(caught.value)
