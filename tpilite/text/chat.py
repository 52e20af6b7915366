"""A conversation to the ids of its prompt: the chat formats of Llama 2 and 3, or the model's own template.

A message is a mapping with a `role` ("system", "user" or "assistant") and a `content`. Only the format
itself gives special tokens: a content that spells one stays the characters that it is.
"""

import copy
import datetime
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tpilite.errors import CheckpointError, ConfigError
from tpilite.formats.json_file import read_json
from tpilite.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]

_LLAMA3_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA2_MARKS = ("[INST]", "<<SYS>>")
_CUTOFF = "Cutting Knowledge Date: December 2023"
# What Llama 3.1's template says where nobody tells it the date; 3.2's asks the clock.
_LLAMA31_DATE = datetime.date(2024, 7, 26)

_SETTINGS = str | int | float | None  # what a caller may set a template's variable to

# transformers marks the assistant's words in a template by these tags, for training.
_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


class ChatFormat(Protocol):
    """How a model wants conversations to be written."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ...

    def encode(self, messages: Messages) -> list[int]:
        """The prompt, BOS included, for the assistant's next message.

        Raises `ConfigError` for a conversation that the format cannot write.
        """
        ...


def chat_format(tokenizer: Tokenizer, folder: Path, today: datetime.date | None = None) -> ChatFormat | None:
    """The chat format of the model in `folder`; None for one that was not made for chat.

    The folder's own chat template counts where jinja2 is there to run it (the `chat` extra). Without it, a
    template with the marks of Llama 2 or 3 is served by the format built in here. A folder that has no
    tokenizer_config.json to hold a template is known by Llama 3's special tokens. `today` is the date that
    templates which tell it give; None leaves it to them.
    """
    template = _template(folder)
    has_llama3_tokens = all(mark in tokenizer.specials for mark in _LLAMA3_MARKS)
    if template is None:
        is_bare = not (folder / "tokenizer_config.json").is_file()
        return Llama3Chat(tokenizer) if is_bare and has_llama3_tokens else None
    try:
        return JinjaChat(tokenizer, template, today)
    except ImportError:
        pass
    if has_llama3_tokens and all(mark in template for mark in _LLAMA3_MARKS):
        if "Cutting Knowledge Date" not in template:
            return Llama3Chat(tokenizer)
        default = datetime.date.today() if "strftime_now" in template else _LLAMA31_DATE
        return Llama3Chat(tokenizer, today or default)
    if all(mark in template for mark in _LLAMA2_MARKS):
        return Llama2Chat(tokenizer)
    logger.warning("%s has a chat template that needs jinja2: pip install 'tpilite[chat]'", folder)
    return None


class Llama2Chat:
    """Llama 2's format: [INST] and <<SYS>> as plain text, each exchange between BOS and EOS.

    These marks are no tokens, so a content can spell them, here as everywhere.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = tokenizer.eos_ids

    def encode(self, messages: Messages) -> list[int]:
        turns = _checked(messages)
        system = turns.pop(0)[1] if turns[0][0] == "system" else None
        for i, (role, _) in enumerate(turns):
            expected = "assistant" if i % 2 else "user"
            if role != expected:
                raise ConfigError(
                    "this model takes user and assistant messages in turn, after at most one system message; "
                    f"expected the {expected}'s, found the {role}'s"
                )
        if len(turns) % 2 == 0:
            raise ConfigError("the last message must be the user's, for the assistant to answer")
        if system is not None:
            turns[0] = ("user", f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0][1]}")
        ids: list[int] = []
        text = ""
        for role, content in turns:
            if role == "user":
                text = f"[INST] {content.strip()} [/INST]"
                ids += _existing(self._tokenizer.bos_id)
            else:
                ids += self._tokenizer.encode(f"{text} {content.strip()} ", bos=False, at_start=not ids)
                ids += _existing(self._tokenizer.eos_id)
        return ids + self._tokenizer.encode(text, bos=False, at_start=not ids)


class Llama3Chat:
    """Llama 3's format: each message behind a header of its role, ended by <|eot_id|>.

    With `today`, the system message begins with the dates of knowledge and of today, as in 3.1 and 3.2,
    and is there even where the conversation has none.
    """

    def __init__(self, tokenizer: Tokenizer, today: datetime.date | None = None) -> None:
        self._tokenizer = tokenizer
        self._today = today
        self._start, self._end, self._eot = (tokenizer.specials[mark] for mark in _LLAMA3_MARKS)
        self.stop_ids = tokenizer.eos_ids

    def encode(self, messages: Messages) -> list[int]:
        turns = [(role, content.strip()) for role, content in _checked(messages)]
        if self._today is not None:
            system = turns.pop(0)[1] if turns[0][0] == "system" else ""
            dates = f"{_CUTOFF}\nToday Date: {self._today.strftime('%d %b %Y')}\n\n"
            turns.insert(0, ("system", dates + system))
        ids = _existing(self._tokenizer.bos_id)
        for role, content in turns:
            ids += [*self._header(role, content), self._eot]
        return ids + self._header("assistant", "")

    def _header(self, role: str, content: str) -> list[int]:
        encode = self._tokenizer.encode
        # The blank line and the content are one text for the tokenizer, as in the rendered template.
        return [self._start, *encode(role, bos=False), self._end, *encode(f"\n\n{content}", bos=False)]


class JinjaChat:
    """The model's own `chat_template`, run in jinja2's sandbox with the names that transformers gives it.

    A template sees the contents as they are, and may do with them what it likes; special tokens that they
    spell stay text. Raises `ImportError` without jinja2.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, today: datetime.date | None = None) -> None:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(reason: str) -> NoReturn:
            raise ConfigError(f"the model's chat template refuses this conversation: {reason}")

        def strftime_now(style: str) -> str:
            return (today or datetime.datetime.now()).strftime(style)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=refuse, strftime_now=strftime_now)
        self._template_error = jinja2.TemplateError
        try:
            self._template = environment.from_string(_GENERATION.sub(r"{#\1 \2#}", template))
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the model's chat template is damaged: {_one_line(error)}") from error
        names = {token_id: name for name, token_id in tokenizer.specials.items()}
        self._variables: dict[str, Any] = {"add_generation_prompt": True, "tools": None, "documents": None}
        for variable, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
            self._variables[variable] = "" if token_id is None else names.get(token_id, "")
        if today is not None:
            self._variables["date_string"] = today.strftime("%d %b %Y")
        self._tokenizer = tokenizer
        self._names = _Names(tokenizer.specials)
        self.stop_ids = tokenizer.eos_ids

    def with_variables(self, variables: Mapping[str, Any]) -> "JinjaChat":
        """The same format with variables of its template set. Raises `ConfigError` for others than settings.

        A text must be a plain one: it could spell special tokens otherwise.
        """
        for name, value in variables.items():
            is_plain = not isinstance(value, str) or re.fullmatch(r"[\w ,.:+-]*", value)
            if name in ("messages", *self._variables) or not (isinstance(value, _SETTINGS) and is_plain):
                raise ConfigError(f"the chat template's variable {name[:100]!r} cannot be set like this")
        changed = copy.copy(self)
        changed._variables = {**self._variables, **variables}
        return changed

    def encode(self, messages: Messages) -> list[int]:
        turns = _checked(messages)
        rendered, shown = self._guarded(turns)
        ids: list[int] = []
        for part in self._tokenizer.split_specials(rendered):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._tokenizer.encode(part.translate(shown), bos=False, at_start=not ids)
        return ids

    def _guarded(self, turns: list[tuple[str, str]]) -> tuple[str, dict[int, str]]:
        """The rendered text, with stand-ins where contents spell special tokens, and what these stand for.

        What counts is the text that the template makes of the contents as they are. Which special tokens in
        it are the contents' is found by rendering them again with stand-ins for characters: for all that can
        begin a special token, or, where the template looks at these, for those that do begin one.
        """
        plain = self._render(turns)
        stand_ins = self._stand_ins("".join(content for _, content in turns))
        shown = {ord(stand_in): char for char, stand_in in stand_ins.items()}
        table = str.maketrans(stand_ins)
        guarded = [(role, content.translate(table)) for role, content in turns]
        if guarded == turns:
            return plain, {}
        rendered = self._render(guarded)
        if rendered.translate(shown) == plain:
            return rendered, shown
        if self._specials(rendered) == self._specials(plain):
            return plain, {}
        rendered = self._render([(role, self._names.replace(content, stand_ins)) for role, content in turns])
        if rendered.translate(shown) == plain:
            return rendered, shown
        raise ConfigError(
            "the model's chat template changes a message that spells a special token of the model, so that "
            "the two cannot be told apart; write the message without it"
        )

    def _stand_ins(self, text: str) -> dict[str, str]:
        """For each character that begins a special token, one of private use that is not in the text."""
        unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
        return {name[0]: next(unused) for name in self._tokenizer.specials}

    def _specials(self, text: str) -> list[int]:
        return [part for part in self._tokenizer.split_specials(text) if isinstance(part, int)]

    def _render(self, turns: list[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return self._template.render(messages=messages, **self._variables)
        except (self._template_error, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ConfigError(
                f"the model's chat template fails on this conversation: {_one_line(error)}"
            ) from error


class _Names:
    """Where in a content special tokens' names begin.

    Also where one may begin at the end of the content, once that is trimmed, for what follows to complete.
    """

    def __init__(self, names: Iterable[str]) -> None:
        whole = "|".join(map(re.escape, names))
        self._begins = re.compile(f"(?={whole})" if whole else r"(?!)")
        self._cut = {name[:length] for name in names for length in range(1, len(name))}
        self._longest = max(map(len, self._cut), default=0)

    def replace(self, content: str, stand_ins: Mapping[str, str]) -> str:
        """The content with a stand-in for the first character of each."""
        end = len(content.rstrip())
        starts = {found.start() for found in self._begins.finditer(content)}
        starts |= {i for i in range(max(0, end - self._longest), end) if content[i:end] in self._cut}
        return "".join(stand_ins[char] if i in starts else char for i, char in enumerate(content))


def _checked(messages: Messages) -> list[tuple[str, str]]:
    """Each message's role and content. Raises `ConfigError` for what no format can write."""
    if not messages:
        raise ConfigError("a conversation needs at least one message, found none")
    turns = []
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ConfigError(
                f"message {number} has the role {role!r}; expected 'system', 'user' or 'assistant'"
            )
        if not isinstance(content, str):
            raise ConfigError(f"message {number} has a content of {type(content).__name__}; expected text")
        turns.append((role, content))
    return turns


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as transformers has it: jinja2's own escapes HTML and sorts."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _existing(token_id: int | None) -> list[int]:
    return [] if token_id is None else [token_id]


def _template(folder: Path) -> str | None:
    """The folder's chat template: a file of its own, or a key of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # several, each an object with its name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str | None):
        raise CheckpointError(f"{path} has a chat_template that is no text; download it again")
    return template
