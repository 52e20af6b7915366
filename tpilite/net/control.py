"""The connection beside the data: heartbeats both ways, and what ends a group."""

import contextlib
import threading
import time
from collections.abc import Callable

from tpilite.errors import PeerLost, ProtocolError, TpiliteError
from tpilite.net import messages
from tpilite.net.channel import Channel

# Heartbeats per timeout: three may get lost in a stall of the sender before it counts as silent.
_BEATS = 4
# Both connections of a dead process end in the same moment; the control connection knows the reason.
GRACE_S = 1.0


class Control:
    """A connection kept alive by a thread of its own, which hands on whatever else comes on it.

    `on_message` and `on_end` are called from that thread; `on_end` once, and not after a last word of ours.
    """

    def __init__(
        self,
        channel: Channel,
        timeout_s: float,
        on_message: Callable[[messages.Header], None],
        on_end: Callable[[TpiliteError], None],
    ) -> None:
        self.channel = channel
        self.alive = True
        self._timeout_s = timeout_s
        self._on_message, self._on_end = on_message, on_end
        self._sending = threading.Lock()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=f"control {channel.peer}", daemon=True)

    def start(self) -> None:
        """Begins to listen and to send heartbeats."""
        self._thread.start()

    def send(self, header: messages.Header) -> None:
        # Even a frozen peer's kernel takes these few bytes; the deadline is for one that took many.
        with self._sending:
            self.channel.send(header, deadline_s=time.monotonic() + GRACE_S)

    def send_last(self, last_message: messages.Header) -> None:
        """Sends what ends the connection, if the peer still takes it; its end is then no failure."""
        if not self._ending:
            self._ending = True
            with contextlib.suppress(PeerLost):
                self.send(last_message)

    def shutdown(self) -> None:
        """Ends the connection without waiting, from any thread."""
        self._ending = True
        self.channel.shutdown("this node ended the connection")

    def close(self, deadline_s: float) -> None:
        """Gives the peer until the deadline to end the connection first, then ends it and the thread."""
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        self.shutdown()
        self._thread.join()
        self.channel.close()

    def _run(self) -> None:
        interval_s = self._timeout_s / _BEATS
        heard_s = sent_s = time.monotonic()
        try:
            while True:
                now_s = time.monotonic()
                if self.channel.wait_readable(sent_s + interval_s - now_s):
                    header, _ = self.channel.receive(time.monotonic() + self._timeout_s)
                    heard_s = time.monotonic()
                    if not isinstance(header, messages.Heartbeat):
                        self._on_message(header)
                elif now_s - heard_s > self._timeout_s and not self.channel.wait_readable(0):
                    raise PeerLost(f"{self.channel.peer} was silent for {self._timeout_s:g} s")
                if time.monotonic() - sent_s >= interval_s:
                    self.send(messages.Heartbeat())
                    sent_s = time.monotonic()
        except (PeerLost, ProtocolError) as error:
            self.alive = False
            if not self._ending:
                self._ending = True
                self._on_end(error)
