"""The parts of an answer: what a model thinks before it speaks, what it says, and the tools that it calls.

    reader = AnswerReader(syntax)
    for text in stream:
        for part in reader.add(text): ...
    for part in reader.finish(): ...

A model marks them by texts or tokens of its own: `<think>` and `</think>` around what it thinks, and for
calls the marks of its family. What looks like a call but is none, or calls what was not offered, stays text.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

THINK, THOUGHT_END = "<think>", "</think>"


@dataclass(frozen=True)
class CallMarks:
    """How a family writes calls: as JSON behind an opening mark, to the closing one or the answer's end.

    `known_by` is what a template of the family has. `whole` says that an answer is a call from its first
    character, or has none.
    """

    known_by: str
    opening: tuple[str, ...]
    closing: str = ""
    whole: bool = False


CALLS = (
    CallMarks("<tool_call>", ("<tool_call>",), "</tool_call>"),  # Qwen, SmolLM, Hermes
    CallMarks("[TOOL_CALLS]", ("[TOOL_CALLS]",)),  # Mistral
    CallMarks('"parameters": ', ("<|python_tag|>", "{"), whole=True),  # Llama 3.1 and later
)


@dataclass(frozen=True)
class AnswerSyntax:
    """What the answer to a prompt may have in it."""

    # Whether the prompt has begun the thought already; None for a model that does not think.
    thinking: bool | None = None
    calls: CallMarks | None = None
    tools: frozenset[str] = frozenset()  # the names of those offered

    @property
    def marks(self) -> frozenset[str]:
        """All marks: a model may have special tokens for them, which otherwise show as nothing."""
        thinking = () if self.thinking is None else (THINK, THOUGHT_END)
        calls = () if self.calls is None else (*self.calls.opening, self.calls.closing)
        return frozenset((*thinking, *calls)) - {""}


@dataclass(frozen=True)
class Part:
    """More of an answer: of its thought or its text, or the call of a tool with its arguments in JSON."""

    thought: str = ""
    text: str = ""
    tool: str = ""
    arguments: str = ""


class AnswerReader:
    """The parts of one answer, as its text comes: a token's at a time, or more."""

    def __init__(self, syntax: AnswerSyntax) -> None:
        self.n_calls = 0
        self.n_thought = 0  # the texts that were added while it thought
        self._thoughts = _Thoughts(syntax.thinking)
        self._calls = None if syntax.calls is None else _Calls(syntax.calls, syntax.tools)

    def add(self, text: str) -> list[Part]:
        """What this text makes certain."""
        was_thinking = self._thoughts.inside
        parts = self._parts(text, last=False)
        self.n_thought += was_thinking or self._thoughts.inside
        return parts

    def finish(self) -> list[Part]:
        """What was held back for what could have followed."""
        return self._parts("", last=True)

    def _parts(self, piece: str, *, last: bool) -> list[Part]:
        thought, text = self._thoughts.split(piece, last)
        parts = [Part(thought=thought)] if thought else []
        if self._calls is not None:
            found = self._calls.split(text, last)
            self.n_calls += sum(bool(part.tool) for part in found)
            return parts + found
        return parts + ([Part(text=text)] if text else [])


class _Thoughts:
    """Tells the thought that an answer begins with from the text behind it, without the space around it."""

    def __init__(self, thinking: bool | None) -> None:
        self._state = {None: "text", False: "start", True: "thought"}[thinking]
        self._held = ""
        self._begun = False

    @property
    def inside(self) -> bool:
        return self._state == "thought"

    def split(self, piece: str, last: bool) -> tuple[str, str]:
        """What this piece makes certain of the thought, and of the text."""
        self._held += piece
        if self._state == "start":
            text = self._held.lstrip()
            if text.startswith(THINK):
                self._state, self._held = "thought", text[len(THINK) :]
            elif last or not THINK.startswith(text):
                self._state = "text"
        thought = self._thought(last) if self._state == "thought" else ""
        if self._state == "behind":
            self._held = self._held.lstrip()
            self._state = "text" if self._held else "behind"
        text = ""
        if self._state == "text":
            text, self._held = self._held, ""
        return thought, text

    def _thought(self, last: bool) -> str:
        thought, found, rest = self._held.partition(THOUGHT_END)
        if not self._begun:
            thought = thought.lstrip()
        if found:
            self._state, self._held, thought = "behind", rest, thought.rstrip()
        else:
            n_open = 0 if last else open_tail(thought, (THOUGHT_END,))
            certain = thought[: len(thought) - n_open].rstrip()
            self._held, thought = thought[len(certain) :], certain
        self._begun = self._begun or bool(thought)
        return thought


class _Calls:
    """Tells the calls of tools from the text around them."""

    def __init__(self, marks: CallMarks, tools: frozenset[str]) -> None:
        self._marks, self._tools = marks, tools
        self._held = ""
        self._space = ""  # at the end of the text so far: dropped where a call comes next
        self._inside = False
        self._over = False  # no call can come any more
        self._after_call = False

    def split(self, piece: str, last: bool) -> list[Part]:
        """What this piece makes certain."""
        self._held += piece
        parts: list[Part] = []
        while self._held:
            if not self._inside:
                parts += self._said(self._until_call(last))
            if not self._inside or not (last or self._is_closed()):
                break
            parts += self._called()
        if last and self._space and not self._after_call:
            parts.append(Part(text=self._space))
        return parts

    def _is_closed(self) -> bool:
        return bool(self._marks.closing) and self._marks.closing in self._held

    def _until_call(self, last: bool) -> str:
        """The text before the next call, or before where it may begin. Says whether one does."""
        opening = self._marks.opening
        if self._marks.whole:
            begun = self._held.lstrip()
            if not self._over and begun.startswith(opening):
                self._inside = True
                return ""
            if not self._over and not last and any(mark.startswith(begun) for mark in opening):
                return ""
            self._over = True
            at = len(self._held)
        elif places := [at for mark in opening if (at := self._held.find(mark)) >= 0]:
            self._inside, at = True, min(places)
        else:
            at = len(self._held) - (0 if last else open_tail(self._held, opening))
        text, self._held = self._held[:at], self._held[at:]
        return text

    def _said(self, text: str) -> list[Part]:
        """The text without the space at its end, which is kept; and without any behind a call."""
        text = text.lstrip() if self._after_call else self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        self._after_call = self._after_call and not said
        return [Part(text=said)] if said else []

    def _called(self) -> list[Part]:
        """The calls in what is held, up to the closing mark; as a text where they are none."""
        body, mark, rest = self._held, "", ""
        if self._marks.closing:
            body, mark, rest = self._held.partition(self._marks.closing)
        self._inside, self._held = False, rest
        calls = _parsed(body, self._marks, self._tools)
        if not calls:
            return self._said(body + mark)
        self._space, self._after_call = "", True
        return calls


def calls_of(template: str) -> CallMarks | None:
    """How the model of a chat template writes calls; None where that is not known."""
    return next((marks for marks in CALLS if marks.known_by in template), None)


def open_tail(text: str, marks: Iterable[str]) -> int:
    """The length of the longest end of `text` that begins one of the marks without being all of it."""
    for n in range(min(len(text), max((len(mark) - 1 for mark in marks), default=0)), 0, -1):
        tail = text[-n:]
        if any(mark.startswith(tail) for mark in marks):
            return n
    return 0


def _parsed(body: str, marks: CallMarks, tools: frozenset[str]) -> list[Part]:
    """The calls in a text: one JSON object, or an array of them. None where any is not as it should be."""
    body = body.strip()
    for mark in marks.opening:
        body = body if mark == "{" else body.removeprefix(mark)
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return []
    calls = [_call(entry, tools) for entry in (value if isinstance(value, list) else [value])]
    return [] if None in calls else [call for call in calls if call is not None]


def _call(entry: Any, tools: frozenset[str]) -> Part | None:
    if not isinstance(entry, dict) or entry.get("name") not in tools:
        return None
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return Part(tool=entry["name"], arguments=json.dumps(arguments, ensure_ascii=False))
