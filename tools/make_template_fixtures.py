"""Makes tests/fixtures/templates/prompts.json: what transformers makes of the templates beside it.

    python tools/make_template_fixtures.py

Development only: needs transformers 5. The templates are written here in the manner of several families; each
is given every conversation, with and without tools, and what it refuses is kept by its words.
"""

import json
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

_FOLDER = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "templates"
# As the small tokenizer of the fixtures and the test call them.
_TOKENS = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}

_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": 'Looks a <word> up & says what it\'s about: größer, "als"',
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string"}, "n": {"type": "integer", "enum": [1, 2]}},
            "required": ["word"],
        },
    },
}
_CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"word": "größer <b>", "n": 2, "more": [None, True, 1.5]}},
}
_DOCUMENTS = [{"title": "River", "text": "It ends\nin the sea."}, {"title": "", "text": "🌊"}, {"text": "x"}]

_QUESTION = {"role": "user", "content": "  Where does the river end?\n"}
_SYSTEM = {"role": "system", "content": "You are brief.\n\nAlways."}
_ANSWER = {"role": "assistant", "content": "In the sea, of course: größer 🌊. "}
_AGAIN = {"role": "user", "content": "\tAnd\nthis?"}
_THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIn the sea."}
_REASONED = {"role": "assistant", "content": "In the sea.", "reasoning_content": "\nHm.\n"}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_CALLING_ONLY = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "content": '{"found": "✓"}', "tool_call_id": "abcdefghi", "name": "look_up"}

_CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [_QUESTION]},
    {"messages": [_SYSTEM, _QUESTION]},
    {"messages": [_SYSTEM, _QUESTION, _ANSWER, _AGAIN]},
    {"messages": [_QUESTION, _QUESTION]},
    {"messages": [_QUESTION, _THOUGHT, _AGAIN]},
    {"messages": [_QUESTION, _REASONED, _AGAIN]},
    {"messages": [_QUESTION, _REASONED], "continues": True},
    {"messages": [_QUESTION, _ANSWER], "continues": True},
    {"messages": [_QUESTION], "tools": [_TOOL]},
    {"messages": [_SYSTEM, _QUESTION], "tools": [_TOOL, _TOOL]},
    {"messages": [_QUESTION, _CALLING, _RESULT], "tools": [_TOOL]},
    {"messages": [_QUESTION, _CALLING_ONLY, _RESULT, _RESULT, _ANSWER, _AGAIN], "tools": [_TOOL]},
    {"messages": [_SYSTEM, _QUESTION], "documents": _DOCUMENTS},
    {"messages": [_QUESTION], "variables": {"enable_thinking": False}},
    {"messages": [_QUESTION], "variables": {"enable_thinking": True}},
]


def main() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **_TOKENS)
    prompts = {
        path.stem: [_prompt(tokenizer, path, conversation) for conversation in _CONVERSATIONS]
        for path in sorted(_FOLDER.glob("*.jinja"))
    }
    content = {"conversations": _CONVERSATIONS, "prompts": prompts}
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (_FOLDER / "prompts.json").write_text(text + "\n", encoding="utf-8")


def _prompt(tokenizer: Any, path: Path, conversation: dict[str, Any]) -> dict[str, str]:
    continues = conversation.get("continues", False)
    try:
        text = tokenizer.apply_chat_template(
            conversation["messages"],
            tools=conversation.get("tools"),
            documents=conversation.get("documents"),
            chat_template=path.read_text(encoding="utf-8"),
            add_generation_prompt=not continues,
            continue_final_message=continues,
            tokenize=False,
            date_string="01 Feb 2025",
            **conversation.get("variables", {}),
        )
    except (jinja2.TemplateError, TypeError) as error:
        return {"error": str(error)}
    return {"text": text}


if __name__ == "__main__":
    main()
