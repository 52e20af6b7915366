"""How the ranks of a cluster find, trust and wait for each other."""

import math
from dataclasses import dataclass
from pathlib import Path

from tpilite.errors import ConfigError


@dataclass(frozen=True)
class ClusterConfig:
    """How ranks find, trust and wait for each other. Times are in seconds; None waits for ever."""

    token: str
    world_size: int = 1
    ratio: tuple[float, ...] | None = None  # shares of the ranks, any scale; None: even ones
    host: str = ""  # where rank 0 listens; empty: on all addresses of its machine
    broadcast_port: int = 29700  # join, control and all-reduce
    file_port: int = 29600  # slices
    timeout_s: float = 10.0  # the longest silence of a rank that lives
    rejoin_timeout_s: float | None = None  # how long a lost rank is waited for
    allreduce: str = "auto"
    payload: str = "f32"
    protect: bool = False  # sums, too, against changes on their way
    encrypt: bool = False  # all connections, by the token; the certificates below do so, too
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.world_size, int) or isinstance(self.world_size, bool) or self.world_size < 1:
            raise ConfigError(f"world_size must be a whole number above 0, found {self.world_size!r}")
        if self.ratio is not None and len(self.ratio) != self.world_size:
            raise ConfigError(
                f"ratio must name a share for each of the {self.world_size} ranks, found {len(self.ratio)}"
            )
        for name in ("broadcast_port", "file_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name} must be from 0 to 65535, found {getattr(self, name)}")
        for name in ("timeout_s", "rejoin_timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a number of seconds above 0, found {value!r}")
        if self.encrypt and (self.tls_cert or self.tls_ca):
            raise ConfigError("--encrypt and certificates (--tls_cert, --tls_ca) exclude each other")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls_cert and --tls_key go together; one of them is missing")
