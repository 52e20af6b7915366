"""A conversation to the ids of its prompt, by the model's own chat template.

A message is a mapping with a `role` ("system", "user", "assistant" or "tool"), a `content`, and what else its
template reads: `tool_calls`, `reasoning_content`, `name`. Only the template gives special tokens: a message
that spells one stays the characters that it is.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpilite.chat.answers import THINK, THOUGHT_END, AnswerSyntax, calls_of
from tpilite.chat.spelling import Spelling
from tpilite.chat.template_process import TemplateProcess
from tpilite.checks import short
from tpilite.closing import Closing
from tpilite.errors import ConfigError
from tpilite.text.templates import DEFAULT, TOOL_USE
from tpilite.text.tokenizer import Tokenizer

Objects = Sequence[Mapping[str, Any]]

_ROLES = ("system", "user", "assistant", "tool")
_OURS = ("messages", "tools", "documents", "add_generation_prompt")  # variables that no caller sets by name
_SETTINGS = str | int | float | None  # what a caller may set the others to
_PLAIN = re.compile(r"[\w ,.:+-]*")  # a text that spells no special token
_MARKER = "\U0010fffd"  # of the place up to which a message that is to be continued goes


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as ids, and what an answer to it may have in it."""

    ids: list[int]
    syntax: AnswerSyntax


class ChatFormat(Closing):
    """How a model wants conversations to be written: its templates by name, run as transformers runs them.

    `names` is what templates may call tokens, beside `bos_token` and `eos_token`. It is closed by `with`, or
    when nobody has it any more.
    """

    def __init__(
        self, tokenizer: Tokenizer, templates: Mapping[str, str], names: Mapping[str, str] | None = None
    ) -> None:
        by_id = {token_id: name for name, token_id in tokenizer.specials.items()}
        self._variables: dict[str, Any] = dict(names or {})
        for variable, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
            self._variables[variable] = "" if token_id is None else by_id.get(token_id, "")
        self._templates = templates
        self._process = TemplateProcess(templates)
        self._spelling = Spelling(tokenizer)
        self.stop_ids = tokenizer.eos_ids
        # A tokenizer that knows the mark has it as one token.
        self._thinks = len(tokenizer.encode(THOUGHT_END, bos=False, allow_special=True)) == 1

    def open(self) -> None:
        """Has the templates read, which the first `encode` does otherwise. Raises `CheckpointError`."""
        self._process.names()

    def takes(self, variable: str, *, with_tools: bool = False) -> bool:
        """Whether the template that counts reads a variable. Raises as `encode`."""
        return variable in self._process.names()[self._name(with_tools)]

    @property
    def calls_tools(self) -> bool:
        """Whether tools can be offered, and their calls be read. Raises as `encode`."""
        name = self._name(with_tools=True)
        return self.takes("tools", with_tools=True) and calls_of(self._templates[name]) is not None

    def close(self) -> None:
        """Ends the process of its templates."""
        self._process.close()

    def with_variables(self, variables: Mapping[str, Any]) -> "ChatFormat":
        """The same format with variables of its templates set. Raises `ConfigError` for others than settings.

        A text must be a plain one: it could spell special tokens otherwise.
        """
        for name, value in variables.items():
            is_plain = not isinstance(value, str) or _PLAIN.fullmatch(value)
            if name in (*_OURS, *self._variables) or not (isinstance(value, _SETTINGS) and is_plain):
                raise ConfigError(f"the chat template's variable {name[:100]!r} cannot be set like this")
        changed = copy.copy(self)
        changed._variables = {**self._variables, **variables}
        return changed

    def encode(
        self,
        messages: Objects,
        *,
        tools: Objects | None = None,
        documents: Objects | None = None,
        continues: bool = False,
    ) -> ChatPrompt:
        """The prompt for the assistant's next message, BOS included.

        `tools` and `documents` are what the template may offer to the model, each as OpenAI's API and
        transformers have it. With `continues`, the last message is left open, for the model to go on with.
        Raises `ConfigError` for a conversation that the template cannot write, and `CheckpointError` for a
        template that is damaged.
        """
        written: dict[str, Any] = {"messages": _checked(messages)}
        name = self._name(bool(tools))
        for variable, given in (("tools", tools), ("documents", documents)):
            if given and not self.takes(variable, with_tools=bool(tools)):
                raise ConfigError(f"the model's chat template takes no {variable}")
            written[variable] = list(given) if given else None
        if continues:
            last = written["messages"][-1]
            # The space shows whether the template trims.
            last["content"] = f"{last['content'] or ''}{_MARKER} "
        prompts: list[str] = []

        def render(written: dict[str, Any]) -> str:
            settings = {"add_generation_prompt": not continues, **self._variables}
            text = self._process.render(name, {**settings, **written})
            prompts.append(_up_to_marker(text) if continues else text)
            return prompts[-1]

        ids = self._spelling.encode(render, written)
        return ChatPrompt(ids, self._syntax(name, prompts[0], tools or ()))

    def _name(self, with_tools: bool) -> str:
        """The template that counts, chosen as transformers does."""
        if with_tools and TOOL_USE in self._templates:
            return TOOL_USE
        if DEFAULT not in self._templates:
            names = ", ".join(map(short, sorted(self._templates)))
            raise ConfigError(f"the model has chat templates for other uses only ({names}), and no default")
        return DEFAULT

    def _syntax(self, name: str, prompt: str, tools: Objects) -> AnswerSyntax:
        template = self._templates[name]
        thinking = prompt.rstrip().endswith(THINK) if self._thinks or THOUGHT_END in template else None
        if not tools:
            return AnswerSyntax(thinking)
        offered = (tool.get("function", tool) for tool in tools)
        names = (tool.get("name") for tool in offered if isinstance(tool, Mapping))
        called = frozenset(name for name in names if isinstance(name, str))
        return AnswerSyntax(thinking, calls_of(template), called)


def chat_format(
    tokenizer: Tokenizer, templates: Mapping[str, str], names: Mapping[str, str] | None = None
) -> ChatFormat | None:
    """The chat format of a model with these templates; None for one without, which was not made for chat."""
    return ChatFormat(tokenizer, templates, names) if templates else None


def _checked(messages: Objects) -> list[dict[str, Any]]:
    """The messages, to be changed. Raises `ConfigError` for what no template can write."""
    if not messages:
        raise ConfigError("a conversation needs at least one message, found none")
    turns = []
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            expected = "'system', 'user', 'assistant' or 'tool'"
            raise ConfigError(f"message {number} has the role {role!r}; expected {expected}")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ConfigError(f"message {number} has a content of {type(content).__name__}; expected text")
        turns.append(dict(message))
    return turns


def _up_to_marker(text: str) -> str:
    """The text of a conversation whose last message is left open, as transformers cuts it."""
    before, found, behind = text.rpartition(_MARKER)
    if not found:
        raise ConfigError("the model's chat template does not write the message that is to be continued")
    return before if behind.startswith(" ") else before.rstrip()
