"""A service of two ranks used for an hour as people use it: what each process holds must not grow.

    python tests/soak.py [--minutes 60] [--seed S]

Clients chat in turns that come back, complete prompts, stream, hang up in the middle, send prompts near the
length of the context and above it, and wait in between. After every burst the service is quiet for a moment,
and the memory, descriptors and threads of each rank are read. After the first ten minutes (or the first
sixth) memory must grow by less than 1 MB an hour, by least squares, and descriptors and threads not at all;
the text of one seed must stay the same. pytest does not collect this.
"""

import argparse
import http.client
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nodes import TOKEN, Node, Nodes, free_ports
from servers import write_model

_CLIENTS = 4
_CONTEXT = 512
_BURST_S, _QUIET_S = 15.0, 1.0
_MOST_MB_AN_HOUR = 1.0
_WORDS = "the river ends where an old bridge meets two ships and a small blue bird sings of rain"


@dataclass(frozen=True)
class Sample:
    """What a process held at a moment after the beginning."""

    at_s: float
    rss_bytes: int
    n_files: int
    n_threads: int

    def __str__(self) -> str:
        held = f"{self.rss_bytes / 1e6:.2f} MB, {self.n_files} files, {self.n_threads} threads"
        return f"{held} after {self.at_s / 60:.0f} min"


def sample(node: Node, began_s: float) -> Sample:
    """What it holds now."""
    folder = Path(f"/proc/{node.pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    rss, threads = int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"])
    return Sample(time.monotonic() - began_s, rss, len(list((folder / "fd").iterdir())), threads)


class Client:
    """Somebody who asks for one thing after another, as a seed has it."""

    def __init__(self, port: int, seed: int, asked: "Counter[str]") -> None:
        self._port, self._choose, self._asked = port, random.Random(seed), asked
        self._turns: list[dict[str, str]] = []
        self.wrong: list[str] = []

    def run(self, until_s: float) -> None:
        """Asks until then."""
        kinds = [
            self._chat,
            self._chat,
            self._complete,
            self._stream,
            self._hang_up,
            self._long,
            self._too_long,
        ]
        while time.monotonic() < until_s:
            kind: Callable[[], None] = self._choose.choice(kinds)
            self._asked[kind.__name__.strip("_")] += 1
            kind()
            time.sleep(self._choose.uniform(0, 0.5))

    def ask(self, path: str, body: dict[str, Any], status: int = 200) -> Any:
        """The answer; another status than this is noted as wrong."""
        with self._answer(path, body) as answer:
            said = answer.read()
            if answer.status != status:
                self.wrong.append(f"{path}: {answer.status} {said[:300]!r}")
            return json.loads(said) if answer.status == 200 else None

    def _answer(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", path, json.dumps({"model": "model", **body}), headers)
        return connection.getresponse()

    def _text(self, n_words: int) -> str:
        return " ".join(self._choose.choices(_WORDS.split(), k=n_words))

    def _chat(self) -> None:
        """The next turn of a conversation, which begins anew when it gets long."""
        if len(self._turns) > 6:
            self._turns = []
        self._turns.append({"role": "user", "content": self._text(self._choose.randint(1, 12))})
        said = self.ask("/v1/chat/completions", {"messages": self._turns, "max_tokens": 20})
        if said is not None:
            self._turns.append(said["choices"][0]["message"])

    def _complete(self) -> None:
        n, best = self._choose.choice(((1, 5), (1, 40), (3, 15)))
        self.ask("/v1/completions", {"prompt": self._text(8), "max_tokens": best, "n": n, "logprobs": 2})

    def _stream(self) -> None:
        with self._answer("/v1/completions", self._streamed()) as answer:
            if not answer.read().endswith(b"data: [DONE]\n\n"):
                self.wrong.append("a stream has no end")

    def _hang_up(self) -> None:
        """Leaves after some bytes of a stream."""
        with self._answer("/v1/completions", self._streamed()) as answer:
            answer.read(self._choose.randint(1, 2000))

    def _long(self) -> None:
        self.ask("/v1/completions", {"prompt": self._ids(_CONTEXT - 20), "max_tokens": 5})

    def _too_long(self) -> None:
        self.ask("/v1/completions", {"prompt": self._ids(_CONTEXT + 1), "max_tokens": 5}, status=400)

    def _streamed(self) -> dict[str, Any]:
        return {"prompt": self._text(5), "max_tokens": 60, "stream": True}

    def _ids(self, n: int) -> list[int]:
        return [self._choose.randrange(3, 200) for _ in range(n)]


def slope_an_hour(samples: list[Sample]) -> tuple[float, float]:
    """By how many MB the memory grows in an hour, by least squares, and the standard error of that."""
    hours = np.array([one.at_s / 3600 for one in samples])
    megabytes = np.array([one.rss_bytes / 1e6 for one in samples])
    slope, level = np.polyfit(hours, megabytes, 1)
    rest = megabytes - (slope * hours + level)
    error = np.sqrt((rest**2).sum() / max(1, len(samples) - 2) / ((hours - hours.mean()) ** 2).sum())
    return float(slope), float(error)


def judged(name: str, samples: list[Sample], from_s: float) -> bool:
    """Whether a process held as much at the end as at the beginning; prints it."""
    settled = [one for one in samples if one.at_s >= from_s]
    slope, error = slope_an_hour(settled)
    half = len(settled) // 2
    kept = [
        (max(getattr(one, what) for one in settled[:half]), max(getattr(one, what) for one in settled[half:]))
        for what in ("n_files", "n_threads")
    ]
    print(
        f"{name}: {slope:+.2f} MB an hour (standard error {error:.2f}) over {len(settled)} samples, "
        f"{settled[0].rss_bytes / 1e6:.1f} MB at {settled[0].at_s / 60:.0f} min, "
        f"{settled[-1].rss_bytes / 1e6:.1f} MB at the end; most descriptors {kept[0][0]} then {kept[0][1]}, "
        f"most threads {kept[1][0]} then {kept[1][1]}"
    )
    return slope < _MOST_MB_AN_HOUR and all(after <= before for before, after in kept)


def use(ranks: dict[str, Node], clients: list[Client], minutes: float) -> dict[str, list[Sample]]:
    """Has the clients use the service for so long; what each rank held after each burst."""
    began_s = time.monotonic()
    told = {"prompt": "The river", "max_tokens": 30, "seed": 7}
    expected = clients[0].ask("/v1/completions", told)["choices"][0]["text"]
    samples: dict[str, list[Sample]] = {name: [] for name in ranks}
    with ThreadPoolExecutor(_CLIENTS) as threads:
        while time.monotonic() < began_s + 60 * minutes:
            end_s = time.monotonic() + _BURST_S
            for done in [threads.submit(client.run, end_s) for client in clients]:
                done.result()
            if clients[0].ask("/v1/completions", told)["choices"][0]["text"] != expected:
                clients[0].wrong.append("the text of one seed is another one")
            time.sleep(_QUIET_S)
            for name, node in ranks.items():
                samples[name].append(sample(node, began_s))
            if len(samples["rank 0"]) % 10 == 0:
                print("; ".join(f"{name}: {some[-1]}" for name, some in samples.items()), flush=True)
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary, Nodes(Path(temporary)) as nodes:
        folder = write_model(Path(temporary) / "model", context=_CONTEXT)
        join_port, file_port, api_port = free_ports(3)
        ports = ("--broadcast_port", join_port, "--file_port", file_port, "--api_port", api_port)
        host = nodes.start("--model_path", folder, "--world_size", 2, "--serve", *ports, token=TOKEN)
        worker = nodes.start("--join", f"127.0.0.1:{join_port}", token=TOKEN)
        host.wait_for_line("the page and the API are at")
        asked: Counter[str] = Counter()
        clients = [Client(api_port, args.seed + i, asked) for i in range(_CLIENTS)]
        samples = use({"rank 0": host, "rank 1": worker}, clients, args.minutes)
        flat = [judged(name, some, min(600.0, 10 * args.minutes)) for name, some in samples.items()]
        print(f"asked: {dict(asked)}")
        wrong = [each for client in clients for each in client.wrong]
        wrong += [node.err[-3000:] for node in (host, worker) if "Traceback" in node.err]
    for each in wrong[:5]:
        print(f"WRONG: {each}")
    ok = all(flat) and not wrong
    print("nothing wrong" if ok else "WRONG")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
