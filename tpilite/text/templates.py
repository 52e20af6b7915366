"""Where a model's chat templates are written, and the one that is built in.

A model has one template, or several by name: "default", "tool_use" for conversations with tools, others.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tpilite.errors import CheckpointError
from tpilite.formats.json_file import read_json

DEFAULT, TOOL_USE = "default", "tool_use"

_GGUF_KEY = "tokenizer.chat_template"

_LLAMA3_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Llama 3's format, for a folder as Meta has it, which says nothing of it.
_LLAMA3 = """{{ bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""


def folder_templates(folder: Path, specials: Collection[str]) -> dict[str, str]:
    """The chat templates of a model folder by name; none for a model that was not made for chat.

    Files of their own come before tokenizer_config.json's. A folder that has nothing to hold a template is
    known by Llama 3's special tokens. Raises `CheckpointError` for what is no template.
    """
    config = folder / "tokenizer_config.json"
    found = _files(folder)
    for path in (config, folder / "chat_template.json"):
        if DEFAULT not in found and path.is_file():
            found = {**_named(path, read_json(path).get("chat_template")), **found}
    if not found and not config.is_file() and all(mark in specials for mark in _LLAMA3_MARKS):
        return {DEFAULT: _LLAMA3}
    return found


def gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates in a GGUF's metadata by name. Raises `CheckpointError` for what is no text."""
    found = {}
    for key, text in metadata.items():
        name = DEFAULT if key == _GGUF_KEY else key.removeprefix(_GGUF_KEY + ".")
        if name != key and isinstance(text, str):
            found[name] = text
        elif key == _GGUF_KEY:
            raise CheckpointError(f"the file's {key} is no text; download it again")
    return found


def folder_token_names(folder: Path) -> dict[str, str]:
    """What a model folder says its templates may call tokens: `unk_token`, `pad_token` and others."""
    names = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        for key, value in (read_json(path) if path.is_file() else {}).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                names[key] = text
    return names


def _files(folder: Path) -> dict[str, str]:
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    paths = {**{path.stem: path for path in more}, DEFAULT: folder / "chat_template.jinja"}
    found = {}
    for name, path in paths.items():
        if path.is_file():
            try:
                found[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
    return found


def _named(path: Path, value: Any) -> dict[str, str]:
    """The templates in a JSON file: a text, or a list of objects with a name each."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    found = {}
    for entry in value if isinstance(value, list) else [value]:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(f"{path} has a chat_template that is no text; download it again")
        found[name] = text
    return found
