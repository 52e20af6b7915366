"""The page in a real browser: what a person sees and does, and what hostile text may not do."""

import json
import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import Browser, Page, browser
from servers import says, served, write_model

from tpilite import LLM, SamplingParams
from tpilite.errors import PeerLost
from tpilite.serving import answer as answering
from tpilite.serving.config import ServerConfig
from tpilite.serving.server import Server
from tpilite.serving.service import Recovery

CONFIG = ServerConfig(port=0, model_name="tiny", defaults=SamplingParams(seed=1, temperature=0, length=24))
IDLE = "!document.getElementById('log').hasAttribute('aria-busy')"
READY = "document.getElementById('model').textContent"
RANKS = [
    {"rank": 0, "name": "kitchen", "state": "ready", "memory_bytes": 1.9e9, "resident_share": 0.62},
    {"rank": 1, "name": "attic", "state": "missing", "memory_bytes": None, "resident_share": None},
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as connection:
        yield connection


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(write_model(tmp_path_factory.mktemp("model"), context=1024), threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def server(session: LLM) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch, served(session, CONFIG) as server:
        patch.setattr(server._completions._service, "ranks", lambda: RANKS)
        yield server


def opened(chromium: Browser, server: Server, **options: Any) -> Page:
    page = chromium.open(server.url, **options)
    page.wait(READY)
    return page


def say(page: Page, text: str) -> None:
    page.click("#prompt")
    page.write(text)
    page.press("Enter")


def answer(page: Page) -> str:
    page.wait(f"{IDLE} && document.querySelector('.message.assistant:last-child .said')?.textContent")
    return page.run("document.querySelector('.message.assistant:last-child .body').textContent")


def keep(page: Page, conversations: list[dict[str, Any]]) -> None:
    value = json.dumps(json.dumps(conversations))
    page.run(f"localStorage.setItem('tpilite.conversations', {value})")


def conversation(*contents: str, kind: str = "chat", name: str = "a") -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"id": name, "kind": kind, "messages": messages}


def test_a_message_is_answered_and_kept(chromium: Browser, server: Server, session: LLM) -> None:
    page = opened(chromium, server)
    say(page, "Where does the river end?")
    shown = answer(page)
    assert "24 tokens" in page.text(".message.assistant .said")
    page.go(server.url)
    page.wait(READY)
    assert page.text("#log") == ""
    page.click("#conversations .open")
    assert page.text(".message.user .body") == "Where does the river end?"
    assert page.run("document.querySelector('.message.assistant .body').textContent") == shown
    say(page, "And then?")
    assert answer(page)
    assert page.run("document.querySelectorAll('#conversations li').length") == 1
    sent = [
        json.loads(e["request"]["postData"])
        for e in page.events("Network.requestWillBeSent")
        if e["request"]["method"] == "POST"
    ]
    assert [m["role"] for m in sent[-1]["messages"]] == ["user", "assistant", "user"]
    assert page.complaints() == []
    assert {url for url in page.requested() if not url.startswith((server.url, "about:"))} == set()


def test_what_the_model_thinks_is_folded(
    chromium: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path, chat=False, context=1024)
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}{% if false %}</think>{% endif %}")
    with LLM(folder, threads=1) as session, served(session, CONFIG) as server:
        says(session, "<think>One <b>two</b>.</think>**Four.**", monkeypatch)
        page = opened(chromium, server)
        say(page, "Three?")
        assert answer(page) == "Four."
        assert page.text(".thought summary") == "Thought"
        assert page.run("document.querySelector('.thought div').textContent") == "One <b>two</b>."
        assert not page.run("document.querySelector('.thought').open")
        page.click(".thought summary")
        assert page.run("document.querySelector('.thought').open")
        page.go(server.url)
        page.wait(READY)
        page.click("#conversations .open")
        assert page.text(".thought summary") == "Thought"
        say(page, "And?")
        answer(page)
        requests = [event["request"] for event in page.events("Network.requestWillBeSent")]
        posts = [json.loads(request["postData"]) for request in requests if request["method"] == "POST"]
        assert posts[-1]["messages"][1] == {
            "role": "assistant",
            "content": "**Four.**",
            "reasoning_content": "One <b>two</b>.",
        }
        assert page.complaints() == []


def test_line_breaks_and_the_send_button(chromium: Browser, server: Server) -> None:
    page = opened(chromium, server)
    assert page.run("document.getElementById('send').disabled")
    page.click("#prompt")
    page.write("one")
    page.press("Enter", shift=True)
    page.write("two")
    assert page.run("document.getElementById('prompt').value") == "one\ntwo"
    page.click("#send")
    assert answer(page)
    assert page.run("document.querySelector('.message.user .body').textContent") == "one\ntwo"


@pytest.mark.parametrize("by_key", [True, False])
def test_an_answer_can_be_stopped(
    chromium: Browser, session: LLM, monkeypatch: pytest.MonkeyPatch, by_key: bool
) -> None:
    passes, step = threading.Semaphore(3), session.engine.step

    def held() -> Any:
        assert passes.acquire(timeout=20)
        return step()

    monkeypatch.setattr(session.engine, "step", held)
    with served(session, CONFIG) as server:
        page = opened(chromium, server)
        say(page, "Where does the river end?")
        page.wait("document.querySelector('.message.assistant .body').textContent")
        assert page.run("document.getElementById('send').getAttribute('aria-label')") == "Stop"
        if by_key:
            page.press("Escape")
        else:
            page.click("#send")
        page.wait("document.querySelector('.said')?.textContent === 'stopped'")
        page.wait("fetch('/v1/cluster').then(r => r.json()).then(s => s.figures.requests_cancelled === 1)")
        passes.release(1000)
        say(page, "Again")
        page.wait(f"document.querySelectorAll('.message').length === 4 && {IDLE}")
        assert page.complaints() == []


def test_conversations_are_listed_opened_and_deleted(chromium: Browser, server: Server) -> None:
    page = opened(chromium, server)
    keep(page, [conversation("First", "one"), conversation("Second", "two", name="b"), {"broken": 1}])
    page.go(server.url)
    page.wait(READY)
    names = "[...document.querySelectorAll('#conversations .open')].map(e => e.textContent)"
    assert page.run(names) == ["First", "Second"]
    page.click("#conversations li:nth-child(2) .open")
    assert page.text(".message.assistant .body") == "two"
    page.click("#conversations li:nth-child(2) .icon")
    page.click("#delete-dialog [data-close]")
    assert page.run(names) == ["First", "Second"]
    page.click("#conversations li:nth-child(2) .icon")
    page.click("#delete-yes")
    assert page.run(names) == ["First"]
    assert page.text("#log") == ""
    stored = json.loads(page.run("localStorage.getItem('tpilite.conversations')"))
    assert [c["id"] for c in stored] == ["a"]


def test_settings_are_sent_and_kept(chromium: Browser, server: Server) -> None:
    page = opened(chromium, server)
    page.click("#open-settings")
    assert page.run("document.getElementById('top_p').value") == "0.9"
    page.run(
        "for (const [id, value] of [['temperature', 0.5], ['top_k', 7], ['max_tokens', 3], ['seed', 11],"
        " ['stop', 'zzz'], ['system', 'Be kind.']]) { const e = document.getElementById(id); e.value = value;"
        " e.dispatchEvent(new Event('input')) }"
    )
    page.click("#settings .strong")
    page.go(server.url)
    page.wait(READY)
    say(page, "Hello")
    answer(page)
    assert "3 tokens" in page.text(".said")
    (body,) = (
        e["request"]["postData"]
        for e in page.events("Network.requestWillBeSent")
        if e["request"]["method"] == "POST"
    )
    sent = json.loads(body)
    assert {
        name: sent.get(name) for name in ("temperature", "top_k", "max_tokens", "seed", "stop", "top_p")
    } == {
        "temperature": 0.5,
        "top_k": 7,
        "max_tokens": 3,
        "seed": 11,
        "stop": "zzz",
        "top_p": None,
    }
    assert sent["messages"][0] == {"role": "system", "content": "Be kind."}
    page.click("#open-settings")
    page.click("#reset")
    assert page.run("document.getElementById('temperature').value") == "0"
    assert page.run("localStorage.getItem('tpilite.settings')") == "{}"


def test_a_key_is_asked_for_and_kept(chromium: Browser, session: LLM) -> None:
    with served(session, ServerConfig(port=0, model_name="tiny", api_key="s3cret")) as server:
        page = chromium.open(server.url)
        for key in ("wrong", "s3cret"):
            page.wait("document.getElementById('key-dialog').open")
            page.click("#key")
            page.write(key)
            page.press("Enter")
            if key == "wrong":
                page.wait("!document.getElementById('key-error').hidden")
        page.wait(READY)
        say(page, "Hello")
        assert answer(page)
        page.go(server.url)
        page.wait(READY)
        assert not page.run("document.getElementById('key-dialog').open")


def test_a_base_model_goes_on_with_a_text(chromium: Browser, tmp_path: Path) -> None:
    folder = write_model(tmp_path, chat=False, context=100)
    with LLM(folder, threads=1) as session, served(session, CONFIG) as server:
        page = opened(chromium, server)
        assert "continues texts" in page.text("#about")
        say(page, "Once upon a time")
        first = answer(page)
        expected = session.generate("Once upon a time", SamplingParams(temperature=0, length=24)).text
        assert first == expected
        page.press("Enter")  # nothing added: the model goes on by itself
        page.wait(f"document.querySelectorAll('.message').length === 3 && {IDLE}")
        say(page, "The fox")
        page.wait(f"document.querySelectorAll('.message').length === 5 && {IDLE}")
        assert (
            page.run("document.querySelector('.message.user:nth-child(4) .body').textContent") == " The fox"
        )
        for n in range(6, 20):
            page.press("Enter")
            page.wait(f"document.querySelectorAll('.message').length === {n} && {IDLE}")
            if page.text(".failure"):
                break
        assert "longer than the model can hold" in page.text(".failure")


def test_the_cluster_is_shown(chromium: Browser, server: Server) -> None:
    page = opened(chromium, server)
    assert page.text("#status-text") == "1 of 2 machines"
    assert page.run("document.getElementById('status-dot').className") == "dot waiting"
    page.click("#open-cluster")
    ranks = page.text("#ranks")
    for text in ("kitchen", "Ready", "1.9 GB in use", "62 %", "attic", "Missing"):
        assert text in ranks
    for _ in range(3):
        before = page.run("document.querySelectorAll('#chart rect').length")
        say(page, "Hello")
        answer(page)
        page.wait(f"document.querySelectorAll('#chart rect').length > {before}")
    assert page.run(
        "[...document.querySelectorAll('#legend dd')].every(e => /^[\\d.]+ ms$/.test(e.textContent))"
    )
    heights = page.run(
        "[...document.querySelectorAll('#chart rect')].map(e => Number(e.getAttribute('height')))"
    )
    assert all(0 <= height <= 100 for height in heights)
    assert max(heights) > 10
    page.click("#cluster [data-close]")
    assert page.run("document.activeElement.id") == "open-cluster"


def test_a_lost_machine_is_told_and_the_answer_goes_on(
    chromium: Browser, session: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_KEEP_ALIVE_S", 0.1)
    back, runs, run = threading.Event(), iter(range(10_000)), session.engine.runner._run

    def losing(step: Any, x: Any = None) -> Any:
        if next(runs) == 5:
            raise PeerLost("rank 1 (attic) is gone")
        return run(step, x)

    def recover(_lost: PeerLost) -> None:
        assert back.wait(20)
        session.engine.runner.reset()

    recovery = Recovery(recover)
    monkeypatch.setattr(session.engine.runner, "_run", losing)
    monkeypatch.setattr(session.engine, "_recover", recovery)
    with served(session, CONFIG, recovery=recovery) as server:
        page = opened(chromium, server)
        page.click("#open-cluster")
        say(page, "Hello")
        page.wait("document.getElementById('notice').textContent.includes('A machine is missing')")
        page.wait("document.getElementById('health').textContent === 'rank 1 (attic) is gone'")
        assert page.text("#status-text") == "Waiting for a machine"
        back.set()
        assert answer(page)
        assert page.run("document.getElementById('notice').hidden")
        page.wait("document.getElementById('health').hidden")


def test_a_server_that_went_away_is_told(chromium: Browser, session: LLM) -> None:
    with served(session, CONFIG) as server:
        page = opened(chromium, server)
    say(page, "Hello")
    page.wait("document.querySelector('.failure')?.textContent.includes('does not answer')")
    page.wait("document.getElementById('status-text').textContent === 'Not reachable'")


MARKDOWN = [
    (
        "Plain *em* and **strong** and `code` and ~~old~~.",
        "<p>Plain <em>em</em> and <strong>strong</strong> and <code>code</code> and <del>old</del>.</p>",
    ),
    ("a_b_c and 2*3*4 = 24", "<p>a_b_c and 2<em>3</em>4 = 24</p>"),
    ("# One\n## Two ##\nText\nmore", "<h1>One</h1><h2>Two</h2><p>Text\nmore</p>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("1. a\n\n2. b", "<ol><li>a</li><li>b</li></ol>"),
    ("> quoted\n> > deeper", "<blockquote><p>quoted</p><blockquote><p>deeper</p></blockquote></blockquote>"),
    ("---\n***", "<hr><hr>"),
    ("`` a`b `` and \\*no\\*", "<p><code> a`b </code> and *no*</p>"),
    ("<b>no</b> &amp; <!-- x -->", "<p>&lt;b&gt;no&lt;/b&gt; &amp;amp; &lt;!-- x --&gt;</p>"),
    ("**unfinished and `open", "<p>**unfinished and `open</p>"),
    (
        "| a | b |\n|---|--:|\n| 1 | 2 |",
        "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>",
    ),
]


def rendered(page: Page, text: str) -> str:
    """The renderer's HTML, without what only styles it."""
    page.run("import('/markdown.js').then(m => { window.render = m.render })")
    return page.run(
        f"(() => {{ const e = document.createElement('div'); e.append(render({json.dumps(text)}));"
        "e.querySelectorAll('.table').forEach(t => t.replaceWith(...t.childNodes)); return e.innerHTML })()"
    )


def test_markdown_becomes_what_it_means(chromium: Browser, server: Server) -> None:
    page = opened(chromium, server)
    for text, html in MARKDOWN:
        assert rendered(page, text) == html, text
    code = rendered(page, "```python\nif a < b:\n\n    pass\n```\nafter")
    assert "<code>if a &lt; b:\n\n    pass</code>" in code
    assert code.endswith("<p>after</p>")
    assert "<code>half</code>" in rendered(page, "```\nhalf")
    link = rendered(page, "[tides](https://example.org/a_(b)) https://example.org/x.")
    assert link.count('rel="noopener noreferrer"') == 2
    assert 'href="https://example.org/a_(b)"' in link
    assert link.endswith("</a>.</p>")


HOSTILE = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 1">
![image](https://example.org/pixel.png) [x](javascript:window.hacked=1)
[y](data:text/html,<script>alert(1)</script>)
[z](JaVaScRiPt:alert(1)) [v](vbscript:x) [f](file:///etc/passwd) <https://example.org/"onmouseover="alert(1)>
[q](https://example.org/"onmouseover=alert(1)) <svg onload=alert(1)> <iframe src=//example.org></iframe>

| <img src=x onerror=alert(1)> |
|---|
| <script>alert(1)</script> |

```<img src=x onerror=alert(1)>
</code><script>window.hacked = 1</script>
```
"""


def test_hostile_text_stays_text_and_fetches_nothing(chromium: Browser, server: Server) -> None:
    page = opened(chromium, server)
    keep(page, [conversation(HOSTILE, HOSTILE), conversation(HOSTILE, HOSTILE, kind="text", name="b")])
    page.go(server.url)
    page.wait(READY)
    for n in (1, 2):
        page.click(f"#conversations li:nth-child({n}) .open")
        page.wait("document.querySelectorAll('.message').length === 2")
        tags = set(page.run("[...document.querySelectorAll('.message .body *')].map(e => e.localName)"))
        assert not tags - {
            "p",
            "a",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "div",
            "pre",
            "code",
            "span",
            "button",
            "svg",
            "use",
        }
        attributes = set(
            page.run("[...document.querySelectorAll('.message .body *')].flatMap(e => e.getAttributeNames())")
        )
        assert not {name for name in attributes if name.startswith("on")}
        assert all(
            href.startswith("https://")
            for href in page.run("[...document.querySelectorAll('.body a')].map(e => e.href)")
        )
    assert page.run("window.hacked === undefined")
    assert {url for url in page.requested() if not url.startswith((server.url, "about:"))} == set()
    assert page.complaints() == []


def test_no_text_holds_the_page_up(chromium: Browser, server: Server) -> None:
    """Each takes a blink, or, if the time grew with the square of the length, longer than a call may."""
    page = opened(chromium, server)
    for unit in ("*", "[", "`", "> ", "- ", "_a", "**a ", "~~a ", "[a](b", "```\n", "|a", "![", "__a "):
        assert rendered(page, unit * (60_000 // len(unit)))


def test_a_strict_policy_is_in_force(chromium: Browser, server: Server) -> None:
    page = opened(chromium, server)
    page.run(
        "{ const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        "document.body.append(s) }"
    )
    page.run("{ const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(i) }")
    assert page.run("fetch('https://example.org/').then(() => 'went', () => 'refused')") == "refused"
    assert page.run("window.hacked === undefined")
    assert len(page.complaints()) >= 3


# ---- for everybody

STATES = {
    "welcome": "",
    "sidebar": "document.getElementById('open-sidebar').click()",
    "conversation": "document.querySelector('#conversations .open').click()",
    "cluster": "document.getElementById('open-cluster').click()",
    "settings": "document.querySelector('#cluster [data-close]').click();"
    "document.getElementById('open-settings').click()",
}
LONG = (
    "A "
    + "very" * 60
    + " long word, `"
    + "code" * 50
    + "`\n\n```\n"
    + "x" * 300
    + "\n```\n\n|"
    + " cell |" * 30
    + "\n|"
    + "---|" * 30
)


@pytest.mark.parametrize(
    ("width", "height", "dark"), [(320, 568, True), (390, 844, False), (820, 1180, True), (1440, 900, False)]
)
def test_it_fits_and_can_be_read_everywhere(
    chromium: Browser, server: Server, width: int, height: int, dark: bool
) -> None:
    page = opened(chromium, server, width=width, height=height, dark=dark)
    keep(page, [conversation("Question " + "long" * 60, LONG)])
    page.go(server.url)
    page.wait(READY)
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(24, 23, 21)") == dark
    for state, script in STATES.items():
        page.run(script or "0")
        page.wait("!document.getAnimations().length")
        assert page.run("document.documentElement.scrollWidth") <= width, state
        wide = page.run(
            "[...document.querySelectorAll("
            "'main, #scroll, #log, #composer, .message, #sidebar, #cluster, dialog[open]')]"
            ".filter(e => e.offsetParent !== null && e.scrollWidth > e.clientWidth + 1)"
            ".map(e => e.id || e.className)"
        )
        assert wide == [], state
        assert page.run(_FAINT) == [], state
        small = page.run(
            "[...document.querySelectorAll('button')].map(e => [e, e.getBoundingClientRect()])"
            ".filter(([e, r]) => r.width && (r.width < 24 || r.height < 24)).map(([e]) => e.outerHTML)"
        )
        assert small == [], state


# Texts whose contrast with what is behind them is below 4.5 (3 for large ones), as WCAG 2.2 counts it.
_FAINT = """
(() => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const linear = (v) => v <= 10.31 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = c.map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    if (!e.checkVisibility({ opacityProperty: true, visibilityProperty: true }) || e.disabled) continue;
    const style = getComputedStyle(e), size = parseFloat(style.fontSize);
    const [a, b] = [light(rgb(style.color).slice(0, 3)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05), needed = size >= 24 ? 3 : 4.5;
    if (ratio < needed) found.push(`${e.outerHTML.slice(0, 80)} ${ratio.toFixed(2)}`);
  }
  return found;
})()
"""


def test_every_control_has_a_name(chromium: Browser, server: Server) -> None:
    page = opened(chromium, server)
    say(page, "Hello")
    answer(page)
    roles = {
        "button",
        "textbox",
        "slider",
        "spinbutton",
        "link",
        "dialog",
        "log",
        "navigation",
        "complementary",
    }
    for script in (
        "0",
        "document.getElementById('open-cluster').click()",
        "document.getElementById('open-settings').click()",
    ):
        page.run(script)
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        controls = [n for n in nodes if not n.get("ignored") and n.get("role", {}).get("value") in roles]
        assert len(controls) > 6
        assert [n["role"]["value"] for n in controls if not n.get("name", {}).get("value")] == []


def test_the_keyboard_is_enough(chromium: Browser, server: Server) -> None:
    page = opened(chromium, server)
    assert page.run("document.activeElement.id") == "prompt"
    page.write("Hello")
    page.press("Tab")
    assert page.run("document.activeElement.id") == "send"
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    assert answer(page)
    seen = set()
    for _ in range(30):
        page.press("Tab")
        seen.add(page.run("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
    assert {"new", "open-cluster", "open-settings", "prompt", "Copy", "Try again"} <= seen
    page.run("document.getElementById('open-settings').focus()")
    page.press("Enter")
    assert page.run("document.getElementById('settings').open")
    page.press("Escape")
    page.wait("!document.getElementById('settings').open")
    assert page.run("document.activeElement.id") == "open-settings"


def test_who_wants_no_motion_gets_none(chromium: Browser, server: Server) -> None:
    for reduced in (False, True):
        page = opened(chromium, server, width=390, height=844, reduced_motion=reduced)
        moves = page.run("getComputedStyle(document.getElementById('sidebar')).transitionProperty !== 'none'")
        assert moves != reduced


class _Prefix(socketserver.BaseRequestHandler):
    """A proxy that serves a server's paths under /assistant/, and nothing else."""

    to_port: int

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (packet := self.request.recv(65536)):
            head += packet
        head = re.sub(rb"^(\w+) /assistant/", rb"\1 /", head, count=1)
        head = head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        if b" /" not in head:
            return
        with socket.create_connection(("127.0.0.1", self.to_port)) as far:
            far.sendall(head)
            while packet := far.recv(65536):
                self.request.sendall(packet)


class _Proxy(socketserver.ThreadingTCPServer):
    request_queue_size = 64  # a browser opens several connections at once
    daemon_threads = True


def test_the_page_works_under_a_path_of_a_proxy(chromium: Browser, server: Server) -> None:
    handler = type("Handler", (_Prefix,), {"to_port": server.port})
    with _Proxy(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        page = chromium.open(f"http://127.0.0.1:{proxy.server_address[1]}/assistant/")
        page.wait(READY)
        assert page.text("#model")
        paths = {urlsplit(url).path for url in page.requested() if url.startswith("http")}
        assert {"/assistant/app.js", "/assistant/v1/cluster"} <= paths
        assert all(path.startswith("/assistant/") for path in paths)
        proxy.shutdown()
