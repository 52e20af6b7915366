"""Mutated bytes on every port of a running cluster: nothing crashes, answers with a 500, or grows.

    python tests/fuzz.py [--frames 1000000] [--requests 100000] [--seed S]

A real rank 0 with its service and a real worker run on loopback, and every port that they have is tried, by
those who know the token, too. Connections send what an honest peer or client would send, with bits flipped,
bytes cut out, repeated, or random ones put in, and close. Now and then the text of one seed is asked for: it
must stay the same. At the end both processes live, no log has a traceback, no answer was a 500, and memory
and open files are what they were after the first tenth. Not collected by pytest.
"""

import argparse
import json
import os
import random
import re
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from nodes import TOKEN, Node, Nodes, free_ports, make_story

from tpilite.cluster import slice_protocol
from tpilite.errors import TpiliteError
from tpilite.net import auth, handshake, messages, wire

_KEY = auth.derive_key(TOKEN)
_BEARER = b"Bearer abc"
_THREADS = 8
_ANSWER_S = 0.2  # what an answer may take; a port that waits for more of a request is left alone
_BODY = {"model": "story", "prompt": "It was", "max_tokens": 3, "seed": 1}
_CHAT = {
    "model": "story",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 3,
    "stream": True,
}


def greetings() -> list[bytes]:
    """What somebody without the token may send to a port of ranks."""
    hello = wire.encode(messages.Hello(bytes(32)))
    return [hello, hello + wire.encode(messages.Proof(bytes(32)))]


def joins() -> list[bytes]:
    """What somebody with the token may say then."""
    said = [
        messages.Join(None, {"model": "x"}),
        messages.Heartbeat(),
        messages.Ready({}, 9),
        messages.Goodbye(),
    ]
    return [wire.encode(message) for message in (*said, messages.Barrier())]


def unknown(port: int, data: bytes) -> socket.socket:
    """A connection that has sent `data`."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=5)
    sock.sendall(data)
    return sock


def known(port: int, data: bytes) -> socket.socket:
    """A connection that has proved the token and then sent `data` with the tag that vouches for it."""
    channel = handshake.connect(("127.0.0.1", port), _KEY, timeout_s=5)
    tag = channel.tag(bytearray(data))
    sock = socket.socket(fileno=channel._sock.detach())
    sock.sendall(data + tag)
    return sock


def attaches() -> list[bytes]:
    """What a worker says to another one."""
    return [wire.encode(message) for message in (messages.Attach(1 << 61, 2), messages.Formed(True))]


def proved(port: int, data: bytes) -> socket.socket:
    """A connection for slices that sends `data` with the token's proof in it, where it has its place."""
    sock = unknown(port, b"GET /node_1/manifest.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    asked = re.search(rb"WWW-Authenticate: ([^\r]*)\r", sock.recv(65536))
    found = slice_protocol.read_challenge(asked[1].decode()) if asked else None
    if found is None:
        sock.close()
        raise ConnectionError("no challenge came")
    nonce = auth.new_nonce()
    proof = auth.prove(_KEY, slice_protocol.CLIENT_ROLE, found[1], nonce)
    sock.sendall(data.replace(_BEARER, slice_protocol.authorization(nonce, proof).encode()))
    return sock


def requests(paths: Sequence[str], bodies: Sequence[object]) -> list[bytes]:
    """What a client may send to an HTTP server."""
    bearer = f"Authorization: {_BEARER.decode()}"
    lines = ["Host: 127.0.0.1", "Accept: */*", bearer, "Range: bytes=0-99"]
    found = [
        f"{verb} {path} HTTP/1.1\r\n" + "\r\n".join(lines) + "\r\n\r\n"
        for verb in ("GET", "HEAD")
        for path in paths
    ]
    for body in bodies:
        text = json.dumps(body)
        head = "\r\n".join([*lines, "Content-Type: application/json", f"Content-Length: {len(text)}"])
        found += [f"POST {path} HTTP/1.1\r\n{head}\r\n\r\n{text}" for path in paths]
    return [request.encode() for request in found]


def mutated(honest: bytes, choose: random.Random) -> bytes:
    """`honest` with one to four things wrong."""
    data = bytearray(honest)
    for _ in range(choose.randint(1, 4)):
        at = choose.randrange(len(data) + 1)
        match choose.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << choose.randrange(8)
            case 1:
                data[at:at] = choose.randbytes(choose.randint(1, 20))
            case 2:
                del data[at : at + choose.randint(1, 20)]
            case 3:
                del data[at:]
            case 4:
                data[at:at] = data[max(0, at - choose.randint(1, 60)) : at]
            case _:
                data[at:at] = choose.choice((b"\r\n", b" ", b"\0", b"\xff" * 8, b"9" * 30, b":", b"\r\n\r\n"))
    return bytes(data)


class Target:
    """A port, what honest peers send there, and what became of the mutated."""

    def __init__(
        self,
        name: str,
        port: int,
        honest: Sequence[bytes],
        n: int,
        connect: Callable[[int, bytes], socket.socket] = unknown,
    ) -> None:
        self.name, self.port, self.honest, self.n, self._connect = name, port, honest, n, connect
        self.n_sent = self.n_refused = 0
        self.wrong: list[bytes] = []
        self._lock = threading.Lock()

    def attack(self, seed: int, until: int) -> None:
        """Sends until `until` connections have been made."""
        choose = random.Random(seed)
        while True:
            with self._lock:
                if self.n_sent >= until:
                    return
                self.n_sent += 1
            self._send(mutated(choose.choice(self.honest), choose))

    def _send(self, data: bytes) -> None:
        answer = b""
        try:
            with self._connect(self.port, data) as sock:
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(_ANSWER_S)
                with suppress(OSError):
                    while packet := sock.recv(65536):
                        answer += packet
        except (OSError, TpiliteError):
            self.n_refused += 1
        if answer.startswith(b"HTTP/1.1 500"):
            self.wrong.append(data)


def memory_and_files(node: Node) -> tuple[int, int]:
    """Resident bytes and open descriptors of a process."""
    pages = int(Path(f"/proc/{node.pid}/statm").read_text().split()[1])
    return pages * 4096, len(list(Path(f"/proc/{node.pid}/fd").iterdir()))


def port_of(node: Node) -> int:
    """The one port on which this process listens: a worker's, for other workers."""
    links = [os.readlink(link) for link in Path(f"/proc/{node.pid}/fd").iterdir() if link.is_symlink()]
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (port,) = (
        int(row[1].partition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links
    )
    return port


def in_threads(work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(_THREADS) as threads:
        for done in [threads.submit(work, i) for i in range(_THREADS)]:
            done.result()


def told(api_port: int) -> str:
    """The text of one seed, by an honest client."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{api_port}/v1/completions",
        json.dumps({"model": "story", "prompt": "It was", "max_tokens": 20, "seed": 7}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=100_000, help="on each of the two HTTP servers")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary, Nodes(Path(temporary)) as nodes:
        story = make_story(Path(temporary) / "story")
        join_port, file_port, api_port = free_ports(3)
        ports = ("--broadcast_port", join_port, "--file_port", file_port)
        service = ("--serve", "--api_port", api_port)
        host = nodes.start("--model_path", story.folder, "--world_size", 2, *ports, *service, token=TOKEN)
        worker = nodes.start("--join", f"127.0.0.1:{join_port}", token=TOKEN)
        host.wait_for_line("the page and the API are at")
        expected = told(api_port)
        bodies = [_BODY, _CHAT]
        slices = requests(["/node_1/manifest.json", "/node_1", "/node_1/head", "/node_2/manifest.json"], [])
        targets = [
            Target("greetings", join_port, greetings(), args.frames // 4),
            Target("joins", join_port, joins(), args.frames // 4, known),
            Target("greetings to a worker", port_of(worker), greetings(), args.frames // 4),
            Target("attaches", port_of(worker), attaches(), args.frames // 4, known),
            Target("slices", file_port, slices, args.requests // 2),
            Target("slices by the token", file_port, slices, args.requests // 2, proved),
            Target(
                "api",
                api_port,
                requests(["/", "/v1/models", "/v1/completions", "/v1/chat/completions", "/health"], bodies),
                args.requests,
            ),
        ]
        ok = True
        for target in targets:
            settled: dict[int, tuple[int, int]] = {}
            started_s = time.monotonic()
            for tenth in range(1, 11):
                in_threads(lambda i, t=tenth, at=target: at.attack(args.seed + 100 * t + i, at.n * t // 10))
                same = told(api_port) == expected
                alive = host.process.poll() is None and worker.process.poll() is None
                ok &= same and alive
                if tenth == 1:
                    settled = {node.pid: memory_and_files(node) for node in (host, worker)}
                print(
                    f"{target.name}: {target.n_sent} sent, {target.n_refused} not taken, "
                    f"{len(target.wrong)} answered by 500, {time.monotonic() - started_s:.0f} s, "
                    f"{'the same text' if same else 'ANOTHER TEXT'}, "
                    + ", ".join(
                        f"{n / 1e6:.1f} MB and {f} files" for n, f in map(memory_and_files, (host, worker))
                    ),
                    flush=True,
                )
                if not alive:
                    break
            for node in (host, worker):
                (before, files_before), (after, files_after) = settled[node.pid], memory_and_files(node)
                ok &= after < before + 10e6 and files_after <= files_before + 5
            ok &= not target.wrong
            for data in target.wrong[:5]:
                print(f"answered by 500: {data!r}")
        for node in (host, worker):
            if "Traceback" in node.err:
                ok = False
                print(node.err[-5000:])
    print("nothing wrong" if ok else "WRONG")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
