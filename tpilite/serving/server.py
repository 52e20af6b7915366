"""The service over HTTP: listening, the threads of connections, and the end by a signal.

    serve(session, ServerConfig(port=8080))

Every connection has a thread. What it may cost is limited here by their number, and in `net` for each.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

from tpilite.closing import Closing
from tpilite.engine.session import Session
from tpilite.errors import ConfigError
from tpilite.net.http_server import HttpServer
from tpilite.net.listener import listen
from tpilite.serving.answer import Completions
from tpilite.serving.config import ServerConfig
from tpilite.serving.page import load_page
from tpilite.serving.routes import Routes
from tpilite.serving.service import Recovery, Service

logger = logging.getLogger(__name__)

# A thread each, of some tens of kilobytes: a household and its programs need a tenth of it.
_MAX_CONNECTIONS = 256


def serve(
    session: Session,
    config: ServerConfig,
    *,
    ready: Callable[[str], None] | None = None,
    recovery: Recovery | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets open requests finish within the grace; a second one ends it.

    `ready` is called with the address of the page; `recovery` is as in `Service`. For the main thread.
    """
    service = Service(session, max_waiting=config.max_waiting, recovery=recovery)
    with _Signals() as signals, service, Server(service, config, session.files.name) as server:
        if ready is not None:
            ready(server.url)
        signals.wait()
        until_s = time.monotonic() + config.grace_s
        logger.info("stopping; open requests have %g s to finish", config.grace_s)
        while not service.drain(0.1) and time.monotonic() < until_s and signals.n_heard < 2:
            pass
        # Before the connections are closed, so that those who still wait get the reason.
        service.close()
        server.finish_answers()


class Server(Closing):
    """The HTTP server of a service, which listens inside of `with`."""

    def __init__(self, service: Service, config: ServerConfig, model_name: str = "") -> None:
        name = config.model_name or model_name or "tpilite"
        own = socket.gethostname().lower()
        self._config = config
        self._completions = Completions(service, name)
        self._routes = Routes(
            service,
            self._completions,
            config,
            name,
            page=load_page(),
            host_names={"localhost", own, f"{own}.local", *(n.lower() for n in config.host_names)},
        )

    @property
    def port(self) -> int:
        """The port that it has, where 0 asked for any."""
        return self._http.port

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        host = self._config.host
        if host in ("", "0.0.0.0", "::"):
            host = "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def start(self) -> None:
        """Listens. Raises `ConfigError` for an address that it cannot have."""
        try:
            sock = listen((self._config.host, self._config.port), "--api_port")
        except ConfigError as error:
            raise ConfigError(f"{error}; --api_host another address") from error
        self._http = HttpServer(sock, lambda: self._routes, max_connections=_MAX_CONNECTIONS)
        self._http.start()
        if self._config.is_open:
            logger.warning("whoever reaches port %d may use the model: give it an --api_key", self.port)

    def finish_answers(self, timeout_s: float = 5.0) -> None:
        """Waits until no answer is being sent any more."""
        until_s = time.monotonic() + timeout_s
        while self._completions.n_open and time.monotonic() < until_s:
            time.sleep(0.01)

    def close(self) -> None:
        """Ends every connection and thread."""
        self._http.close()

    def __enter__(self) -> "Server":
        self.start()
        return self


class _Signals:
    """SIGTERM and SIGINT, counted and waited for in the main thread."""

    def __init__(self) -> None:
        self.n_heard = 0

    def wait(self) -> None:
        # A lock that the handler set could be one that the waiting thread holds just then; a pipe cannot.
        os.read(self._pipe[0], 1)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.n_heard += 1
        os.write(self._pipe[1], b"!")

    def __enter__(self) -> "_Signals":
        self._pipe = os.pipe()
        self._before = {n: signal.signal(n, self._hear) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for end in self._pipe:
            os.close(end)
