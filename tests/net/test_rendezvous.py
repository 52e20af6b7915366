"""Groups forming over loopback: joining, terms, silence, loss and coming back."""

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpilite.collective import Message
from tpilite.errors import ConfigError, PeerLost, ProtocolError
from tpilite.net import auth, handshake, messages
from tpilite.net import listener as listening
from tpilite.net.auth import Security
from tpilite.net.group import Group, GroupEnded, RankLost, RootGroup
from tpilite.net.membership import Membership, join
from tpilite.net.rendezvous import Rendezvous

SECURITY = Security("a token for tests")
TERMS = {"config": "c0ffee", "dtype": "bf16", "partition": [1, 1, 2]}
# Long against a loaded machine's hiccups, short against a test's patience; and so that nothing passes by
# waiting for it, LONG where silence is not what is tested.
SHORT_S, LONG_S = 1.0, 60.0


def rendezvous_of(world_size: int, **options: Any) -> Rendezvous:
    options = {"terms": TERMS, "timeout_s": LONG_S, "allreduce": "star", "payload": "f32", **options}
    where, security = options.pop("address", ("127.0.0.1", 0)), options.pop("security", SECURITY)
    return Rendezvous(where, security, world_size=world_size, **options)


def address(rendezvous: Rendezvous) -> tuple[str, int]:
    return "127.0.0.1", rendezvous.port


def sum_of_ranks(group: Group) -> Any:
    return group.all_reduce(np.full((2, 50), group.rank + 1, np.float32))


def work_once(rendezvous: Rendezvous, rank: int | None = None, security: Security = SECURITY) -> Any:
    with join(address(rendezvous), security, rank=rank, terms={"dtype": "bf16"}) as membership:
        with membership.wait_for_group(TERMS) as group:
            result = sum_of_ranks(group)
            assert group.broadcast(None).header == {"n": 1}
            with pytest.raises(GroupEnded, match="rank 0 ended the session"):
                group.broadcast(None)
        has_mesh = all(c is not None for r, c in enumerate(group._channels) if r != group.rank)
        return membership.rank, result, has_mesh, group.allreduce


@pytest.mark.parametrize("allreduce", ["star", "direct", "scatter", "auto"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_group_forms_works_and_ends(world_size: int, allreduce: str, pool: ThreadPoolExecutor) -> None:
    with rendezvous_of(world_size, allreduce=allreduce, info={"file_port": 29600}) as rendezvous:
        working = [pool.submit(work_once, rendezvous) for _ in range(1, world_size)]
        with rendezvous.wait_for_group(LONG_S) as group:
            total = sum_of_ranks(group)
            group.broadcast(Message({"n": 1}))
        workers = [future.result() for future in working]
    assert (total == sum(range(1, world_size + 1))).all()
    assert sorted(rank for rank, *_ in workers) == list(range(1, world_size))
    for _, result, has_mesh, used in workers:
        np.testing.assert_array_equal(result, total)
        assert has_mesh == (allreduce != "star" or world_size == 2)
        assert used == allreduce == group.allreduce


@pytest.mark.parametrize("allreduce", ["star", "direct", "scatter"])
def test_all_ranks_sum_in_the_payload_that_rank_0_says(allreduce: str, pool: ThreadPoolExecutor) -> None:
    with rendezvous_of(3, allreduce=allreduce, payload="q8") as rendezvous:
        working = [pool.submit(work_once, rendezvous) for _ in range(2)]
        with rendezvous.wait_for_group(LONG_S) as group:
            total = sum_of_ranks(group)
            group.broadcast(Message({"n": 1}))
        workers = [future.result() for future in working]
    assert 0 < np.abs(total - 6).max() < 0.1  # eight bits hold no 1, 2 and 3 exactly
    for _, result, *_ in workers:
        np.testing.assert_array_equal(result, total)


def test_ranks_that_are_asked_for_are_given_and_the_rest_goes_to_the_others(
    pool: ThreadPoolExecutor,
) -> None:
    with rendezvous_of(4) as rendezvous:
        asking = pool.submit(work_once, rendezvous, 2)
        until(lambda: rendezvous.states[2] == "ready")
        others = [pool.submit(work_once, rendezvous) for _ in range(2)]
        with rendezvous.wait_for_group(LONG_S) as group:
            sum_of_ranks(group)
            group.broadcast(Message({"n": 1}))
        assert asking.result()[0] == 2
        assert sorted(other.result()[0] for other in others) == [1, 3]


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_joiner_learns_what_it_needs_and_prepares_longer_than_silence_may_last(
    pool: ThreadPoolExecutor,
) -> None:
    with rendezvous_of(2, timeout_s=SHORT_S, info={"file_port": 29600, "manifest": "ab12"}) as rendezvous:
        forming = pool.submit(rendezvous.wait_for_group, LONG_S)
        with join(address(rendezvous), SECURITY) as membership:
            assert (membership.rank, membership.world_size) == (1, 2)
            assert membership.info == {"file_port": 29600, "manifest": "ab12"}
            assert rendezvous.states == {1: "preparing"}
            time.sleep(2 * SHORT_S)
            membership.check()
            with membership.wait_for_group(TERMS) as group, forming.result() as hub:
                assert rendezvous.states == {1: "missing"}  # of the next group
                sent = pool.submit(hub.broadcast, Message({"n": 2}))
                assert group.broadcast(None).header == {"n": 2}
                sent.result()


DIFFERENCE = (
    r"dtype is 'bf16' on rank 0 and 'f16' on the joining node \(take other slices\); "
    r"partition is \[1, 1, 2\] on rank 0 and \[2, 1, 1\] on the joining node \(start both with the same\)"
)


def test_other_terms_are_told_to_both_sides_when_joining(caplog: pytest.LogCaptureFixture) -> None:
    with rendezvous_of(2, advice={"dtype": "take other slices"}) as rendezvous:
        with pytest.raises(ConfigError, match=r"rank 0 at .* refuses this node: " + DIFFERENCE):
            join(address(rendezvous), SECURITY, terms={"dtype": "f16", "partition": (2, 1, 1)})
        assert rendezvous.states == {1: "missing"}
    (text,) = [record.getMessage() for record in caplog.records]
    assert text.startswith("refused 127.0.0.1:")
    assert text.endswith("on the joining node (start both with the same)")


def test_other_terms_are_told_to_both_sides_when_ready(caplog: pytest.LogCaptureFixture) -> None:
    with rendezvous_of(2, advice={"dtype": "take other slices"}) as rendezvous:
        with join(address(rendezvous), SECURITY) as membership:
            with pytest.raises(ConfigError, match="rank 0 refuses this node: " + DIFFERENCE):
                membership.wait_for_group({**TERMS, "dtype": "f16", "partition": (2, 1, 1)})
        with join(address(rendezvous), SECURITY) as membership:
            with pytest.raises(ConfigError, match=r"config is 'c0ffee' on rank 0 and nothing on the joining"):
                membership.wait_for_group({"dtype": "bf16", "partition": (1, 1, 2)})
    texts = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("refused rank 1 at 127.0.0.1: dtype is 'bf16'") for text in texts)


def test_a_rank_that_does_not_exist() -> None:
    with rendezvous_of(3) as rendezvous:
        for rank in (0, 3, -1):
            with pytest.raises(
                ConfigError, match=f"expected a rank of 1 to 2 in a cluster of 3, found {rank}"
            ):
                join(address(rendezvous), SECURITY, rank=rank)


def test_a_taken_rank_and_a_full_cluster_can_be_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with rendezvous_of(2) as rendezvous:
        membership = join(address(rendezvous), SECURITY)
        with pytest.raises(PeerLost, match=r"has no place for this node: rank 1 is taken by a node at 127"):
            join(address(rendezvous), SECURITY, rank=1, timeout_s=0.2)
        with pytest.raises(PeerLost, match="has no place for this node: no rank of 2 is free"):
            join(address(rendezvous), SECURITY, timeout_s=0.2)
        with pytest.raises(PeerLost, match="has no place for this node: rank 1 is taken by a node at 127"):
            join(address(rendezvous), SECURITY, rank=1, patience_s=0.2)
        membership.close()
        until(lambda: rendezvous.states[1] == "missing")
        join(address(rendezvous), SECURITY, rank=1).close()


def test_another_token(caplog: pytest.LogCaptureFixture) -> None:
    with rendezvous_of(2) as rendezvous:
        with pytest.raises(PeerLost, match="did not accept the token"):
            join(address(rendezvous), Security("another of these tests"), timeout_s=0.2)
        until(lambda: bool(caplog.records))
        assert "does not know the token; start it with that of this node" in caplog.text
        assert "a token for" not in caplog.text + repr(SECURITY)
    with pytest.raises(ConfigError, match="expected at least 16"):
        Security("fifteen letters")


def test_waiting_names_who_is_missing_and_gives_up() -> None:
    with rendezvous_of(3) as rendezvous, join(address(rendezvous), SECURITY, rank=2):
        with pytest.raises(PeerLost, match="gave up waiting: rank 1 is missing, rank 2 is preparing"):
            rendezvous.wait_for_group(0.1)


def test_rank_0_that_ends_tells_those_who_wait() -> None:
    rendezvous = rendezvous_of(2)
    rendezvous.open()
    with join(address(rendezvous), SECURITY) as membership:
        rendezvous.close()
        with pytest.raises(GroupEnded, match="rank 0 ended the session"):
            membership.wait_for_group(TERMS)


def test_a_worker_waits_for_rank_0_to_start(pool: ThreadPoolExecutor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
    joining = pool.submit(join, place, SECURITY)
    time.sleep(0.15)
    with rendezvous_of(2, address=place) as rendezvous:
        with joining.result() as membership:
            assert rendezvous.states[membership.rank] == "preparing"


# Connections without a token


def test_unauthenticated_connections_do_not_keep_a_group_from_forming(
    pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    with rendezvous_of(3) as rendezvous, contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(contextlib.closing(socket.create_connection(address(rendezvous))))
            for _ in range(80)
        ]
        for i, sock in enumerate(silent):
            with contextlib.suppress(OSError):  # the oldest are closed already
                sock.sendall([b"GET / HTTP/1.1\r\n\r\n", b"T", b"", bytes(1000)][i % 4])
        for header in (
            messages.Ready({}, 1),
            messages.Attach(1, 1),
            messages.Attach(rendezvous._members._epoch, 1),
        ):
            insider = handshake.connect(address(rendezvous), SECURITY.key, timeout_s=LONG_S)
            insider.send(header)
            with pytest.raises(PeerLost):
                insider.receive(time.monotonic() + LONG_S)
            insider.close()
        working = [pool.submit(work_once, rendezvous) for _ in range(2)]
        with rendezvous.wait_for_group(LONG_S) as group:
            sum_of_ranks(group)
            group.broadcast(Message({"n": 1}))
        for future in working:
            future.result()
        # Those of connections that were closed may be about to end.
        until(lambda: len(rendezvous._listener._acceptor._threads) <= listening.MAX_UNAUTHENTICATED)
    lines = [record for record in caplog.records if "unauthenticated connection" in record.getMessage()]
    assert 1 <= len(lines) <= listening.LOG_LINES


def test_a_port_that_is_taken() -> None:
    with rendezvous_of(2) as rendezvous:
        with pytest.raises(
            ConfigError,
            match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use; .*--broadcast_port",
        ):
            rendezvous_of(2, address=address(rendezvous)).open()


# Loss


class Cluster:
    """A rendezvous and its formed group, with workers' memberships and groups in the hands of the test."""

    def __init__(self, world_size: int, **options: Any) -> None:
        self.stack = contextlib.ExitStack()
        self.pool = self.stack.enter_context(ThreadPoolExecutor(2 * world_size))
        self.rendezvous = self.stack.enter_context(rendezvous_of(world_size, **options))
        self.memberships: dict[int, Membership] = {}
        self.workers: dict[int, Group] = {}
        self.hub: RootGroup = self.form(range(1, world_size))

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def form(self, ranks: Any) -> RootGroup:
        """Joins these ranks, and forms the group of all."""

        def enter(rank: int) -> None:
            self.memberships[rank] = self.stack.enter_context(
                join(address(self.rendezvous), SECURITY, rank=rank)
            )
            self.workers[rank] = self.stack.enter_context(self.memberships[rank].wait_for_group(TERMS))

        entering = [self.pool.submit(enter, rank) for rank in ranks]
        self.hub = self.stack.enter_context(self.rendezvous.wait_for_group(LONG_S))
        for future in entering:
            future.result()
        return self.hub

    def start(self, function: Callable[[Group], Any], *ranks: int) -> list[Future[Any]]:
        groups = {0: self.hub, **self.workers}
        return [self.pool.submit(function, groups[rank]) for rank in ranks]


@contextlib.contextmanager
def frozen(group: Group) -> Iterator[None]:
    """As SIGSTOP or a cut cable do: the sockets stay open, nothing is read or sent any more."""
    thaw = threading.Event()
    for control in group.controls:
        control.channel.wait_readable = lambda timeout_s: thaw.wait()  # type: ignore[method-assign]
    yield
    thaw.set()


@pytest.mark.parametrize("allreduce", ["star", "direct"])
def test_a_worker_that_dies_ends_the_group_and_one_that_comes_back_restores_it(allreduce: str) -> None:
    with Cluster(3, allreduce=allreduce) as cluster:
        dead = cluster.workers[2]
        summing = cluster.start(sum_of_ranks, 0, 1)
        for one in (*dead._channels, *(control.channel for control in dead.controls)):
            if one is not None:
                one.shutdown("killed")
        with pytest.raises(RankLost, match=r"rank 2 at .*(closed the connection|broke)") as caught:
            summing[0].result()
        assert caught.value.rank == 2
        with pytest.raises(PeerLost, match="rank 2"):
            summing[1].result()
        cluster.form([1, 2])
        assert [(f.result() == 6).all() for f in cluster.start(sum_of_ranks, 0, 1, 2)] == [True] * 3


def test_a_frozen_worker_is_noticed_while_rank_0_waits_for_it() -> None:
    with Cluster(3, timeout_s=SHORT_S) as cluster:
        with frozen(cluster.workers[1]):
            summing = cluster.start(sum_of_ranks, 0, 2)
            until(lambda: all(future.done() for future in summing))
        with pytest.raises(RankLost, match=r"rank 1 at .* was silent for 1 s") as caught:
            summing[0].result()
        assert caught.value.rank == 1
        with pytest.raises(RankLost, match=r"rank 0 says: rank 1 at .* was silent for 1 s") as caught:
            summing[1].result()
        assert caught.value.rank == 1


def test_a_frozen_worker_is_noticed_while_nobody_does_anything() -> None:
    with Cluster(2, timeout_s=SHORT_S) as cluster:
        with frozen(cluster.workers[1]):
            until(lambda: cluster.hub.failure is not None)
        with pytest.raises(RankLost, match=r"rank 1 at .* was silent"):
            cluster.hub.broadcast(Message({}))


def test_a_frozen_rank_0_is_noticed_by_the_workers() -> None:
    with Cluster(3, timeout_s=SHORT_S) as cluster:
        with frozen(cluster.hub):
            waiting = cluster.start(lambda group: group.broadcast(None), 1, 2)
            until(lambda: all(future.done() for future in waiting))
        for future in waiting:
            with pytest.raises(PeerLost, match=r"rank 0 at .* was silent for 1 s"):
                future.result()


def test_a_slow_rank_is_waited_for() -> None:
    with Cluster(3, timeout_s=SHORT_S) as cluster:
        summing = cluster.start(sum_of_ranks, 0, 1)
        time.sleep(2.5 * SHORT_S)
        summing += cluster.start(sum_of_ranks, 2)
        assert [(future.result() == 6).all() for future in summing] == [True] * 3


def test_what_was_sent_before_a_clean_end_is_received_after_it() -> None:
    with Cluster(2) as cluster:
        cluster.hub.broadcast(Message({"n": 1}))
        closing = cluster.pool.submit(cluster.hub.close)
        until(lambda: cluster.workers[1].failure is not None)
        assert cluster.workers[1].broadcast(None).header == {"n": 1}
        with pytest.raises(GroupEnded, match="rank 0 ended the session"):
            cluster.workers[1].broadcast(None)
        closing.result()


def test_a_worker_that_leaves_is_not_a_crash_but_ends_the_group() -> None:
    with Cluster(3) as cluster:
        summing = cluster.start(sum_of_ranks, 0, 2)
        cluster.workers[1].close()
        with pytest.raises(RankLost, match=r"rank 1 at .* left the group"):
            summing[0].result()
        with pytest.raises(RankLost, match=r"rank 0 says: rank 1 at .* left the group"):
            summing[1].result()


def test_a_worker_that_sees_another_one_lost_tells_rank_0_which() -> None:
    with Cluster(3, allreduce="direct") as cluster:
        cluster.workers[1].channel(2).shutdown("this link alone is cut")
        summing = cluster.start(sum_of_ranks, 0, 1, 2)
        until(lambda: cluster.hub.failure is not None)  # it may have had both parts of this sum
        assert isinstance(cluster.hub.failure, RankLost)
        assert cluster.hub.failure.rank in (1, 2)
        for future in summing[1:]:
            with pytest.raises(PeerLost):
                future.result()


def test_while_a_group_runs_nobody_else_gets_in_but_the_lost_rank_does_after() -> None:
    with Cluster(3) as cluster:
        with pytest.raises(PeerLost, match="no place for this node: all 3 ranks are taken"):
            join(address(cluster.rendezvous), SECURITY, timeout_s=0.2)
        cluster.workers[2].close()
        until(lambda: cluster.hub.failure is not None)
        # A node without a rank gets the lost one; the place of rank 1 is kept for rank 1.
        with join(address(cluster.rendezvous), SECURITY) as membership:
            assert membership.rank == 2
            with pytest.raises(PeerLost, match="no rank of 3 is free"):
                join(address(cluster.rendezvous), SECURITY, timeout_s=0.2)
            with join(address(cluster.rendezvous), SECURITY, rank=1) as other:
                assert other.rank == 1


WORKER = """
import sys
from tpilite.errors import PeerLost
from tpilite.net.auth import Security
from tpilite.net.group import GroupEnded
from tpilite.net.membership import join
import numpy as np

SECURITY = Security("a token for tests")
while True:
    try:
        with join(("127.0.0.1", int(sys.argv[1])), SECURITY, rank=int(sys.argv[2])) as membership:
            with membership.wait_for_group({}) as group:
                while True:
                    n = group.broadcast(None).header["n"]
                    group.all_reduce(np.full(n, group.rank + 1, np.float32))
    except GroupEnded:
        break
    except PeerLost as error:
        print(error, flush=True)
"""


@contextlib.contextmanager
def worker_process(rendezvous: Rendezvous, rank: int) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", WORKER, str(rendezvous.port), str(rank)]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_processes_that_are_killed_and_frozen() -> None:
    with (
        rendezvous_of(3, terms={}, timeout_s=1.0, allreduce="auto") as rendezvous,
        contextlib.ExitStack() as stack,
    ):
        workers = {rank: stack.enter_context(worker_process(rendezvous, rank)) for rank in (1, 2)}
        for harm, text in (
            (signal.SIGKILL, "rank 2 at .*(closed|broke)"),
            (signal.SIGSTOP, "was silent for 1 s"),
        ):
            with rendezvous.wait_for_group(LONG_S) as group:
                group.broadcast(Message({"n": 100}))
                assert (group.all_reduce(np.ones(100, np.float32)) == 6).all()
                workers[2].send_signal(harm)
                with pytest.raises(RankLost, match=text) as caught:
                    ask_for_sums(group)
                assert caught.value.rank == 2
            assert workers[1].stdout is not None
            assert "rank 2" in workers[1].stdout.readline()
            workers[2].kill()
            workers[2] = stack.enter_context(worker_process(rendezvous, 2))
        with rendezvous.wait_for_group(LONG_S):
            pass
        assert [worker.wait(30) for worker in workers.values()] == [0, 0]


def ask_for_sums(group: Group) -> None:
    while True:
        group.broadcast(Message({"n": 100}))
        group.all_reduce(np.ones(100, np.float32))


def test_a_worker_lost_while_it_prepares_leaves_its_place(caplog: pytest.LogCaptureFixture) -> None:
    with rendezvous_of(2, timeout_s=SHORT_S) as rendezvous:
        member = handshake.connect(address(rendezvous), SECURITY.key, timeout_s=LONG_S)
        member.send(messages.Join(None, {}))
        assert member.expect(messages.Welcome)[0] == messages.Welcome(1, 2, SHORT_S, {})
        until(lambda: rendezvous.states[1] == "missing")
        assert "rank 1 at 127.0.0.1" in caplog.text
        assert "was silent for 1 s" in caplog.text
        member.close()


def test_a_worker_that_does_not_attach_does_not_stop_the_others(
    pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    with rendezvous_of(2, timeout_s=SHORT_S) as rendezvous:
        forming = pool.submit(rendezvous.wait_for_group, LONG_S)
        stuck = handshake.connect(address(rendezvous), SECURITY.key, timeout_s=LONG_S)
        stuck.send(messages.Join(1, {}))
        stuck.expect(messages.Welcome)
        stuck.send(messages.Ready(TERMS, 0))
        header: messages.Header = messages.Heartbeat()
        while not isinstance(header, messages.Error):
            stuck.send(messages.Heartbeat())
            header, _ = stuck.receive(time.monotonic() + LONG_S)
        assert header.reason == "rank 1 did not open its data connection"
        stuck.close()
        working = pool.submit(work_once, rendezvous)
        with forming.result() as group:
            sum_of_ranks(group)
            group.broadcast(Message({"n": 1}))
        assert working.result()[0] == 1


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (messages.Start(1, [], "star", "f32", False), "expected 2 peers, found 0"),
        (messages.Start(1, [[], ["h", 1]], "ring", "f32", False), "found 'ring'"),
        (messages.Barrier(), "expected Start from rank 0, found Barrier"),
        (messages.Error("x" * 9, None), "rank 0 says: xxxxxxxxx"),
    ],
)
def test_a_rank_0_that_makes_no_sense(sent: messages.Header, text: str, pool: ThreadPoolExecutor) -> None:
    def rank_0(server: socket.socket) -> None:
        for reply in (messages.Welcome(1, 2, LONG_S, {}), sent):
            if isinstance(reply, messages.Welcome):
                one = handshake.accept(server.accept()[0], "worker", SECURITY.key, timeout_s=LONG_S)
                one.expect(messages.Join)
            one.send(reply)
        with contextlib.closing(one), contextlib.suppress(PeerLost):
            while True:
                one.receive()

    with socket.create_server(("127.0.0.1", 0)) as server:
        serving = pool.submit(rank_0, server)
        with join(server.getsockname(), SECURITY) as membership:
            with pytest.raises((ProtocolError, PeerLost, ConfigError), match=text):
                membership.wait_for_group(TERMS)
        serving.result()


@pytest.mark.parametrize("workers_have_certificates", [True, False])
def test_a_group_over_tls(
    workers_have_certificates: bool, certificates: tuple[Path, Path], pool: ThreadPoolExecutor
) -> None:
    """Workers that could not prove themselves to each other make a star."""
    cert, key = certificates
    own = Security("a token for tests", auth.server_tls(cert, key, None), auth.client_tls(cert, None, None))
    theirs = (
        own
        if workers_have_certificates
        else Security("a token for tests", None, auth.client_tls(cert, None, None))
    )
    with rendezvous_of(3, security=own, allreduce="direct") as rendezvous:
        working = [pool.submit(work_once, rendezvous, None, theirs) for _ in range(2)]
        with rendezvous.wait_for_group(LONG_S) as group:
            total = sum_of_ranks(group)
            group.broadcast(Message({"n": 1}))
        for future in working:
            _, result, has_mesh, used = future.result()
            np.testing.assert_array_equal(result, total)
            assert has_mesh is workers_have_certificates
            assert used == ("direct" if has_mesh else "star")
