"""Runs a model's chat templates, in a process of its own that the system holds to a bound.

    python -c "import sys; sys.path[:] = sys.argv[1:]; import template_runner as r; r.main()" FOLDER...

A template is a program by whoever published the model. jinja2's sandbox keeps it from everything but its
variables, but not from looping for ever or from making a text of any size, inside a single operation even.
So the kernel does: a processor time after which the process ends, and a size of its memory (not on macOS,
where the time alone has to do). Each line of stdin is a JSON object that gets one on stdout:

    {"templates": {NAME: TEXT}}
        {"names": {NAME: [the variables that it reads]}} or {"damaged": why}
    {"template": NAME, "variables": {...}}
        {"text": TEXT} or {"refused": the template's own words} or {"failed": why}

It knows nothing of this package: it is imported by its file's name, without what the package imports.
"""

import datetime
import json
import re
import resource
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

# A long conversation takes 10 ms, on a slow machine 100.
_CPU_S = 0.5
# jinja2's compiler takes a few MiB for a long template, and a text goes through several copies.
_SPARE_BYTES = 64 << 20
_COPIES = 32
# A template adds a few hundred characters to a message, and the descriptions of tools.
_SPARE_CHARACTERS = 1 << 20
_GROWTH = 8
_MAX_WORDS = 1000  # of an error

# transformers marks the assistant's words in a template by these tags, for training.
_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


class _Refused(Exception):
    """What the template itself says of a conversation."""


def main() -> None:
    """Answers every line of stdin, until its end."""
    environment = _environment()
    templates: dict[str, Template] = {}
    for line in sys.stdin.buffer:
        with suppress(OSError, ValueError):  # macOS has no limit to set
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (_used_bytes() + _SPARE_BYTES + _COPIES * len(line), hard))
        # Without a handler its signal ends the process, whatever that is doing.
        signal.setitimer(signal.ITIMER_PROF, _CPU_S)
        request = json.loads(line)
        if "templates" in request:
            answer = _compiled(environment, request["templates"], templates)
        else:
            most = _SPARE_CHARACTERS + _GROWTH * len(line)
            answer = _rendered(templates[request["template"]], request["variables"], most)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


def _environment() -> Environment:
    """jinja2 as transformers sets it up."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
    return environment


def _compiled(
    environment: Environment, texts: dict[str, str], templates: dict[str, Template]
) -> dict[str, Any]:
    """Compiles all templates, and tells which variables each reads."""
    names = {}
    try:
        for name, text in texts.items():
            text = _GENERATION.sub(r"{#\1 \2#}", text)
            tree = environment.parse(text)
            names[name] = sorted({node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"})
            templates[name] = environment.from_string(text)
    except (TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"damaged": _words(error)}
    return {"names": names}


def _rendered(template: Template, variables: dict[str, Any], most: int) -> dict[str, str]:
    """What comes of a template: at most so many characters."""
    try:
        text = template.render(variables)
    except _Refused as error:
        return {"refused": str(error)[:_MAX_WORDS]}
    except Exception as error:  # it is the template's program, not ours
        return {"failed": _words(error)}
    if len(text) > most:
        return {"failed": f"it makes a text of {len(text)} characters; expected at most {most}"}
    return {"text": text}


def _words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it takes too much memory"
    if isinstance(error, RecursionError):
        return "it calls itself too deeply"
    return " ".join((str(error) or type(error).__name__).split())[:_MAX_WORDS]


def _refuse(reason: object) -> NoReturn:
    raise _Refused(" ".join(str(reason).split()))


def _strftime_now(style: str) -> str:
    return datetime.datetime.now().strftime(style)


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


def _used_bytes() -> int:
    """The size of this process's memory. Raises `OSError` where the system does not tell."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
