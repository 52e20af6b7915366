"""Where a model's chat templates are written, and the one that is built in.

A model has one template, or several by name: "default", "tool_use" for conversations with tools, others.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tpilite.errors import CheckpointError
from tpilite.formats.model_files import ModelFiles

DEFAULT, TOOL_USE = "default", "tool_use"

_CONFIG = "tokenizer_config.json"
_GGUF_KEY = "tokenizer.chat_template"
_GGUF_TOKENS = {
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

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


def find_templates(files: ModelFiles, specials: Collection[str]) -> dict[str, str]:
    """A model's chat templates by name; none for a model that was not made for chat.

    A GGUF has them in its metadata. In a folder, files of their own come before tokenizer_config.json's, and
    one that has nothing to hold a template is known by Llama 3's special tokens. Raises `CheckpointError` for
    what is no template.
    """
    if files.gguf is not None:
        return _of_gguf(files.path, files.gguf)
    found = _of_files(files.folder)
    for name in (_CONFIG, "chat_template.json"):
        if DEFAULT not in found:
            found = {**_of_json(files, name), **found}
    has_marks = all(mark in specials for mark in _LLAMA3_MARKS)
    return {DEFAULT: _LLAMA3} if not found and has_marks and files.json(_CONFIG) is None else found


def find_token_names(files: ModelFiles) -> dict[str, str]:
    """What a model says its templates may call tokens, beside BOS and EOS: `unk_token` and others."""
    names = {}
    if files.gguf is not None:
        for name, key in _GGUF_TOKENS.items():
            token_id, tokens = files.gguf.get(key), files.gguf.get("tokenizer.ggml.tokens", ())
            if isinstance(token_id, int) and 0 <= token_id < len(tokens):
                names[name] = tokens[token_id]
        return names
    for path in ("special_tokens_map.json", _CONFIG):
        for name, value in (files.json(path) or {}).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                names[name] = text
    return names


def _of_gguf(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    named = {key: key.removeprefix(_GGUF_KEY + ".") for key in metadata if key.startswith(_GGUF_KEY + ".")}
    if _GGUF_KEY in metadata:
        named[_GGUF_KEY] = DEFAULT
    for key in named:
        if not isinstance(metadata[key], str):
            raise CheckpointError(f"{path} is damaged: its {key} is no text; download it again")
    return {name: metadata[key] for key, name in named.items()}


def _of_files(folder: Path) -> dict[str, str]:
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


def _of_json(files: ModelFiles, name: str) -> dict[str, str]:
    """The templates in a JSON file: a text, or a list of objects with a name each."""
    value = (files.json(name) or {}).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    found = {}
    for entry in value if isinstance(value, list) else [value]:
        title, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(title, str) or not isinstance(text, str):
            raise CheckpointError(
                f"{files.folder / name} has a chat_template that is no text; download it again"
            )
        found[title] = text
    return found
