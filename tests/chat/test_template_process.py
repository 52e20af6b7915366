"""Templates in their process: what they are given, and what ends them."""

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from tpilite.chat.template_process import TemplateProcess
from tpilite.errors import CheckpointError, ConfigError, TpiliteError


def rendered(template: str, **variables: Any) -> str:
    with TemplateProcess({"default": template}) as process:
        return process.render("default", variables)


def test_templates_are_rendered_as_often_as_asked() -> None:
    with TemplateProcess({"default": "{{ x }}", "more": "{{ y | length }}{{ z }}"}) as process:
        assert process.render("default", {"x": "größer \U000f0000\ud800\n"}) == "größer \U000f0000\ud800\n"
        assert process.names() == {"default": {"x"}, "more": {"y", "z"}}
        assert process.render("more", {"y": ["a"] * 1000}) == "1000"


def test_threads_may_share_a_process() -> None:
    found: list[bool] = []
    with TemplateProcess({"default": "{{ x }}"}) as process:

        def ask(x: str) -> None:
            found.append(all(process.render("default", {"x": x}) == x for _ in range(20)))

        threads = [threading.Thread(target=ask, args=(str(i) * 1000,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 4


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops_with_text": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "large_text": "{{ 'a' * n * n * n }}",
    "large_number": "{{ n ** (n ** n) }}",
    "doubling": "{% set s = namespace(x='a') %}{% for i in range(99) %}{% set s.x = s.x * 2 %}{% endfor %}",
    "nested": "{% set s = namespace() %}{% for _ in x * 9 %}{% set s.x = [s.x] * 99 %}{% endfor %}{{ s.x }}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "padding": "{{ 'x' | center(n ** 4) }}",
    "format": "{{ '%99999999999d' % n }}",
    "constants": "{{ 'a' * 10 ** 10 }}",
    "lipsum": "{{ lipsum(n=10 ** 9) }}",
    "too_much": "{{ 'a' * 9000000 }}",
    "depth": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "blocks": "{% if 1 %}" * 20_000,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_would_take_all_time_or_memory_is_ended(kind: str) -> None:
    with TemplateProcess({"default": ENDLESS[kind], "good": "{{ x }}"}) as process:
        for _ in range(2):
            with pytest.raises(TpiliteError, match="the model's chat template") as caught:
                process.render("default", {"n": 1000, "x": "a"})
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 500
        if not isinstance(caught.value, CheckpointError):
            assert process.render("good", {"x": "y"}) == "y"


def test_the_template_s_own_words_are_told() -> None:
    with pytest.raises(ConfigError, match=r"refuses this conversation: roles must alternate$"):
        rendered("{{ raise_exception('roles\n must alternate') }}")
    with pytest.raises(ConfigError, match="fails on this conversation: division by zero"):
        rendered("{{ 1 / 0 }}")
    with pytest.raises(ConfigError, match="fails on this conversation: access to attribute"):
        rendered("{{ ''.__class__.mro() }}")
    with pytest.raises(ConfigError, match="fails on this conversation: no loader"):
        rendered("{% include 'x' %}")
    with pytest.raises(CheckpointError, match="is damaged: Expected an expression"):
        rendered("{% if %}")


def test_variables_are_what_json_can_hold() -> None:
    with pytest.raises(ConfigError, match="holds what JSON can say and nothing else"):
        rendered("", x={1j})


def test_a_process_that_was_killed_is_started_again() -> None:
    with TemplateProcess({"default": "{{ x }}"}) as process:
        process.names()
        assert process._process is not None
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(ConfigError):
            process.render("default", {"x": "y"})
        assert process.render("default", {"x": "y"}) == "y"


def test_it_ends_with_its_owner() -> None:
    process = TemplateProcess({"default": ""})
    process.names()
    child = process._process
    assert child is not None
    del process
    assert child.returncode is not None


def test_it_ends_with_a_program_that_is_killed() -> None:
    program = (
        "import os, signal; from tpilite.chat.template_process import TemplateProcess as T;"
        "t = T({'default': ''}); t.names(); print(t._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    for _ in range(1000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as file:
            if file.read().split()[2] == "Z":
                return
        threading.Event().wait(0.01)
    pytest.fail("it goes on")


def test_where_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ConfigError, match="no process can be started for the chat template"):
        rendered("")
