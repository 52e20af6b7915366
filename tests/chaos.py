"""Random faults in a running cluster, round after round; the text must be what it is without them.

    python tests/chaos.py [--minutes 20] [--rounds N] [--seed S] [--allreduce star] [--tls]

A round is a cluster of two to four ranks on loopback that makes a text while one to four things happen to it:
a rank is killed, or stopped for a while; the connections of a worker are cut; a worker ends and another one
comes with other options; rank 0 is killed and started again; somebody without the token sends noise. Each
round has a seed of its own; `--seed S --rounds 1` repeats it. pytest does not collect this:
it runs as long as it is told to.
"""

import argparse
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from certificates import certificates
from nodes import Cluster, Node, Nodes, Story, make_story

_TIMEOUT_S = 2  # the longest silence of a rank that lives, so that a stopped one is soon missed
_WORKER_OPTIONS = ((), (), ("--threads", 2), ("--memory_window", 2), ("--kv_dtype", "f32"))


class Link:
    """A port of loopback that passes everything on to another one, until it is cut."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends every connection that goes through here; new ones may come."""
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target, timeout=5)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                with self._lock:
                    self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while packet := source.recv(65536):
                sink.sendall(packet)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class Round:
    """One cluster, the faults that a seed chooses for it, and the text that comes out."""

    def __init__(
        self, nodes: Nodes, story: Story, seed: int, allreduce: str, tls: tuple[object, ...]
    ) -> None:
        self._choose = random.Random(seed)
        self._nodes, self._allreduce, self._tls = nodes, allreduce, tls
        self.world_size = self._choose.randint(2, 4)
        self._cluster = Cluster(nodes, story, self.world_size, "--timeout", _TIMEOUT_S, *tls, start=False)
        self._links = [Link(self._cluster.broadcast_port) for _ in range(1, self.world_size)]
        self._workers: list[Node] = []
        self.happened: list[str] = []

    def run(self) -> str | None:
        """What went wrong; None where nothing did."""
        try:
            self._start_host()
            self._workers = [self._start_worker(i) for i in range(self.world_size - 1)]
            for _ in range(self._choose.randint(1, 4)):
                self._cluster.host.wait_for_text(
                    self._choose.randrange(1, len(self._cluster.story.text) // 2)
                )
                what = self._choose.choice(self._faults())
                self.happened.append(what.__name__.strip("_"))
                what()
            code = self._cluster.host.finish(60)
            text, wanted = self._cluster.host.out, self._cluster.story.text
            if code == 0 and text == wanted:
                return None
            return f"exit code {code}, {'the text' if text == wanted else f'another text: {text!r}'}"
        except AssertionError as error:
            return str(error)
        finally:
            for link in self._links:
                link.close()

    def log(self) -> str:
        """What every process has said."""
        return "\n".join(f"--- process {node.pid}\n{node.err}" for node in self._nodes.started)

    def _faults(self) -> list[Callable[[], None]]:
        common = [self._kill_worker, self._kill_worker, self._stop_worker, self._cut_links, self._send_noise]
        return [*common, self._replace_worker, self._kill_host, self._stop_host]

    def _kill_worker(self) -> None:
        i = self._choose.randrange(len(self._workers))
        self._workers[i].kill()
        self._workers[i] = self._start_worker(i)

    def _replace_worker(self) -> None:
        """One leaves in order, and one that has nothing yet comes in its place."""
        i = self._choose.randrange(len(self._workers))
        self._workers[i].signal(signal.SIGTERM)
        self._workers[i].finish()
        self._workers[i] = self._start_worker(i, home=f"new{len(self._nodes.started)}")

    def _stop_worker(self) -> None:
        self._stop(self._choose.choice(self._workers))

    def _stop_host(self) -> None:
        self._stop(self._cluster.host)

    def _stop(self, node: Node) -> None:
        """For a moment that nobody notices, or until it is given up."""
        node.signal(signal.SIGSTOP)
        time.sleep(self._choose.choice((0.1, 0.5, 1.5 * _TIMEOUT_S)))
        node.signal(signal.SIGCONT)

    def _kill_host(self) -> None:
        self._cluster.host.kill()
        self._start_host()

    def _cut_links(self) -> None:
        self._choose.choice(self._links).cut()

    def _send_noise(self) -> None:
        """Some connections that say nothing, nonsense, or the beginning of something right."""
        ports = (self._cluster.broadcast_port, self._cluster.file_port)
        for _ in range(self._choose.randint(1, 5)):
            with (
                suppress(OSError),
                socket.create_connection(("127.0.0.1", self._choose.choice(ports)), 5) as sock,
            ):
                beginning = self._choose.choice((b"", b"TPI\x01\x10\x00\x00\x00", b"GET / HTTP/1.1\r\n"))
                sock.sendall(beginning + self._choose.randbytes(self._choose.randint(0, 2000)))

    def _start_host(self) -> None:
        self._cluster.start_host(*self._cluster.story.ask, "--allreduce", self._allreduce)

    def _start_worker(self, i: int, home: str | None = None) -> Node:
        options = (*self._choose.choice(_WORKER_OPTIONS), *self._tls)
        return self._cluster.start_worker(home or f"worker{i}", *options, port=self._links[i].port)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rounds", type=int, help="end after so many")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9, help="of the first round")
    parser.add_argument("--allreduce", default="star")
    parser.add_argument("--tls", action="store_true", help="with certificates made for it")
    args = parser.parse_args()
    end_s = time.monotonic() + 60 * args.minutes
    n_rounds = n_wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        story = make_story(folder / "story")
        tls: tuple[object, ...] = ()
        if args.tls:
            certificates(folder, "node")
            own = ("--tls_cert", folder / "node.pem", "--tls_key", folder / "node.key")
            tls = (*own, "--tls_ca", folder / "ca.pem")
        while time.monotonic() < end_s and n_rounds != args.rounds:
            seed = args.seed + n_rounds
            n_rounds += 1
            with Nodes(folder / f"round{seed}") as nodes:
                a_round = Round(nodes, story, seed, args.allreduce, tls)
                started_s = time.monotonic()
                wrong = a_round.run()
                took_s = time.monotonic() - started_s
            print(
                f"seed {seed}: {a_round.world_size} ranks, {', '.join(a_round.happened)}, {took_s:.1f} s",
                flush=True,
            )
            if wrong is not None:
                n_wrong += 1
                print(f"WRONG: {wrong}\n{a_round.log()}", flush=True)
            shutil.rmtree(folder / f"round{seed}")
    print(f"{n_rounds} rounds from seed {args.seed}, {n_wrong} wrong")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
