"""A cluster on hosts of its own: network namespaces joined by a bridge, with cables that can be pulled.

What loopback cannot show: a peer that is gone without a FIN. No address of these hosts exists outside of
them, and everything made here has a name of this run and is removed with it.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from nodes import Cluster, Nodes, Story, make_story

pytestmark = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="needs root and the ip command (package iproute2) to make network namespaces",
)

HOSTS = ("host", "worker1", "worker2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


class Lan:
    """Hosts at 10.77.0.1, .2, ... on one bridge, which stands in a namespace of its own too."""

    def __init__(self, stack: ExitStack, hosts: tuple[str, ...]) -> None:
        self._name = f"tpilite-{os.getpid()}"
        self._hosts = hosts
        self._switch = self._namespace(stack, "switch")
        ip("-n", self._switch, "link", "add", "bridge0", "type", "bridge")
        ip("-n", self._switch, "link", "set", "bridge0", "up")
        for i, host in enumerate(hosts):
            inside = ("-n", self._namespace(stack, host))
            cable = ("type", "veth", "peer", "name", "eth0", "netns", inside[1])
            ip("-n", self._switch, "link", "add", f"port{i}", *cable)
            ip("-n", self._switch, "link", "set", f"port{i}", "master", "bridge0", "up")
            ip(*inside, "address", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            ip(*inside, "link", "set", "eth0", "up")
            ip(*inside, "link", "set", "lo", "up")

    def _namespace(self, stack: ExitStack, host: str) -> str:
        name = f"{self._name}-{host}"
        ip("netns", "add", name)
        stack.callback(ip, "netns", "delete", name)
        return name

    def cable(self, host: str, state: str) -> None:
        """Pulls the cable of a host ("down") or plugs it in again ("up"): nobody is told."""
        ip("-n", self._switch, "link", "set", f"port{self._hosts.index(host)}", state)

    @property
    def prefixes(self) -> dict[str, list[str]]:
        """By what command a program runs on each host."""
        return {host: ["ip", "netns", "exec", f"{self._name}-{host}"] for host in self._hosts}


@pytest.fixture
def lan() -> Iterator[Lan]:
    with ExitStack() as stack:
        try:
            made = Lan(stack, HOSTS)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield made


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return make_story(tmp_path_factory.mktemp("story"))


@pytest.fixture
def nodes(tmp_path: Path, lan: Lan) -> Iterator[Nodes]:
    with Nodes(tmp_path) as nodes:  # after `lan`, so that they end before their hosts do
        yield nodes


@pytest.mark.parametrize("cut_off", ["worker1", "host"])
def test_a_pulled_cable(nodes: Nodes, lan: Lan, story: Story, cut_off: str) -> None:
    options = {"address": "10.77.0.1", "prefixes": lan.prefixes}
    cluster = Cluster(nodes, story, 3, "--timeout", 1, **options)
    workers = {home: cluster.start_worker(home) for home in HOSTS[1:]}
    cluster.host.wait_for_text(10)
    lan.cable(cut_off, "down")
    cluster.host.wait_for_line("was silent for 1 s")
    cluster.host.wait_for_line("the text goes on when rank")
    for worker in workers.values():
        worker.wait_for_line("was silent for 1 s; joining again")
    assert len(cluster.host.out) < len(story.text)
    lan.cable(cut_off, "up")
    assert cluster.host.finish(60) == 0, cluster.host.err
    assert cluster.host.out == story.text
    for worker in workers.values():
        worker.wait_for_line("rank 0 ended the session")
        worker.signal(signal.SIGTERM)
        assert worker.finish() == 143


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs the unshare command (util-linux)")
def test_a_full_disk_is_said_on_both_sides(nodes: Nodes, lan: Lan, story: Story, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # Mounted in a namespace of its own, the disk is there for this node alone and goes with it.
    mount = f'mount -t tmpfs -o size=64k none "{disk}" && exec "$@"'
    prefixes = lan.prefixes
    small = {**prefixes, "worker1": [*prefixes["worker1"], "unshare", "-m", "sh", "-c", mount, "sh"]}
    cluster = Cluster(nodes, story, 2, address="10.77.0.1", prefixes=small)
    worker = cluster.start_worker("worker1", "--save_dir", disk)
    assert worker.finish() == 2
    for node in (worker, cluster.host):
        node.wait_for_line("make room or choose another place with --save_dir")
    assert not list(disk.iterdir())
    cluster.prefixes = prefixes
    cluster.start_worker("worker1", "--save_dir", disk)
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text
