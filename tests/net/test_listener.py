"""A port for those who know the token: what the others can cost it, and its end."""

import socket

import pytest

from tpilite.errors import ConfigError
from tpilite.net.auth import Security
from tpilite.net.listener import LOG_LINES, Listener, RefusalLog, Unauthenticated, listen


def is_ended(sock: socket.socket) -> bool:
    sock.settimeout(0)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def test_the_oldest_unauthenticated_connection_makes_room_for_the_newest() -> None:
    pairs = [socket.socketpair() for _ in range(4)]
    waiting = Unauthenticated(limit=2)
    waiting.add(pairs[0][0])
    waiting.add(pairs[1][0])
    waiting.remove(pairs[0][0])  # it proved the token
    waiting.add(pairs[2][0])
    waiting.add(pairs[3][0])
    assert [is_ended(theirs) for _, theirs in pairs] == [False, True, False, False]
    waiting.end()
    assert [is_ended(theirs) for _, theirs in pairs] == [False, True, True, True]
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_refusals_are_logged_in_a_limited_number_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    refusals = RefusalLog()
    for i in range(3 * LOG_LINES):
        refusals.add(f"10.0.0.{i}", "it says nothing")
    assert len(caplog.messages) == LOG_LINES
    assert caplog.messages[0] == "closed an unauthenticated connection: 10.0.0.0: it says nothing"


def test_a_port_that_is_taken_names_the_option_that_chooses_another() -> None:
    with listen(("127.0.0.1", 0), "--some_port") as first:
        with pytest.raises(ConfigError, match=r"cannot serve on 127.*in use.* --some_port chooses another"):
            listen(first.getsockname(), "--some_port", "serve")


@pytest.mark.parametrize("host", ["192.0.2.1", "no such name"])
def test_a_host_that_is_not_this_machine_is_told(host: str) -> None:
    with pytest.raises(ConfigError, match="--host must be an address of this machine"):
        listen((host, 0), "--some_port")


def test_a_listener_does_nothing_before_it_is_opened_and_can_be_closed_at_any_time() -> None:
    listener = Listener(("127.0.0.1", 0), Security("a token for tests"), lambda channel, header: None)
    listener.close()
    listener.open()
    address = ("127.0.0.1", listener.port)
    socket.create_connection(address).close()
    listener.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(address)
