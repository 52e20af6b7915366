"""The memory that large bodies share."""

import threading

import pytest

from tpilite.net import body_memory
from tpilite.net.http import HttpError


def test_large_bodies_share_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_memory, "_WAIT_S", 0.2)
    memory = body_memory.BodyMemory()
    with memory.hold(4 << 20), memory.hold(4 << 20), memory.hold(1000):
        with pytest.raises(HttpError, match="too many large requests"), memory.hold(1 << 20):
            pass
        monkeypatch.setattr(body_memory, "_WAIT_S", 30)
        held = threading.Thread(target=lambda: memory.hold(1 << 20).__enter__())
        held.start()
    held.join(10)
    assert not held.is_alive()
