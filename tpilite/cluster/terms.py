"""What the ranks of a cluster agree on before they work together: who they trust and what they share."""

import secrets
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

from tpilite.cluster.config import ClusterConfig
from tpilite.errors import ConfigError
from tpilite.net.auth import Security, client_tls, derive_key, server_tls, token_tls
from tpilite.weights.partition import Partition


def security_of(cluster: ClusterConfig) -> Security:
    """The token and the TLS contexts that the options name."""
    if cluster.encrypt:
        return Security(cluster.token, *token_tls(derive_key(cluster.token)))
    server: ssl.SSLContext | None = None
    client: ssl.SSLContext | None = None
    if cluster.tls_cert is not None and cluster.tls_key is not None:
        server = server_tls(cluster.tls_cert, cluster.tls_key, cluster.tls_ca)
    if cluster.tls_ca is not None:
        client = client_tls(cluster.tls_ca, cluster.tls_cert, cluster.tls_key)
    elif server is not None:
        raise ConfigError("--tls_ca is missing: with TLS every node checks the others' certificates by it")
    return Security(cluster.token, server, client)


def terms_of(fingerprint: str, partition: Partition) -> dict[str, Any]:
    """What must be the same on all ranks. Ratios that come to the same shares are the same."""
    counts = {name: list(value) for name, value in partition.to_dict().items() if name != "ratio"}
    return {"model": fingerprint, "partition": counts}


# Where rank 0 serves slices from, a file of this name says which start of rank 0 that is.
MARK_NAME = ".served"


def mark_served(save_dir: Path) -> str:
    """Marks the folder that slices are served from; the mark, for workers that may share the folder."""
    mark = secrets.token_hex(8)
    with suppress(OSError):  # nobody can fetch into what cannot be written
        save_dir.mkdir(parents=True, exist_ok=True)
        (save_dir / MARK_NAME).write_text(mark)
    return mark


def is_served(save_dir: Path, mark: object) -> bool:
    """Whether this is the folder that bears the mark, by whatever path or network it is reached."""
    try:
        return (save_dir / MARK_NAME).read_text() == mark
    except (OSError, UnicodeDecodeError):
        return False
