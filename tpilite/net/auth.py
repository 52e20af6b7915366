"""Who may speak: the cluster's token proved in both directions, and TLS where it is wanted.

From the token comes, by scrypt, the key of all proofs: whoever has heard a handshake pays for each token that
he tries at home. Each side sends a random nonce and proves the key by an HMAC-SHA256 over its role and
both nonces. The token itself never travels, a recorded exchange is worth nothing later, and because the role
is part of what is signed neither side can pass with the other's own answer sent back to it. Of the same
nonces come the keys by which frames are protected from then on (`wire`), one for each direction.
"""

import functools
import hashlib
import hmac
import secrets
import ssl
from dataclasses import InitVar, dataclass, field
from pathlib import Path

from tpilite.errors import ConfigError

NONCE_BYTES = 32
PROOF_BYTES = 32
MIN_TOKEN_CHARACTERS = 16

# RFC 7914, once a process: 16 MiB, which a small machine can spare before it has loaded anything, and 0.07 s
# of a server core (perhaps five times that on a Raspberry Pi 4). One salt for all, as nodes have nothing but
# the token in common when they meet; tokens that we make are random, and need none.
_SCRYPT_N, _SCRYPT_R, _SCRYPT_SALT = 1 << 14, 8, b"tpilite cluster token"


@dataclass(frozen=True)
class Security:
    """What a node needs to prove itself and to check others. TLS contexts: None is without TLS.

    A node with only the client's context can join, but other workers cannot connect to it.
    """

    token: InitVar[str]
    server_tls: ssl.SSLContext | None = None
    client_tls: ssl.SSLContext | None = None
    key: bytes = field(init=False, repr=False)

    def __post_init__(self, token: str) -> None:
        object.__setattr__(self, "key", derive_key(token))


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


@functools.cache
def derive_key(token: str) -> bytes:
    """The key that the token stands for, computed once. Raises `ConfigError` where that cannot be."""
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise ConfigError(
            f"the cluster's token has {len(token)} characters; expected at least {MIN_TOKEN_CHARACTERS}"
        )
    if not hasattr(hashlib, "scrypt"):
        raise ConfigError("this Python has no hashlib.scrypt; use one that was built with OpenSSL")
    return hashlib.scrypt(token.encode(), salt=_SCRYPT_SALT, n=_SCRYPT_N, r=_SCRYPT_R, p=1, dklen=PROOF_BYTES)


def prove(key: bytes, role: str, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """The proof [PROOF_BYTES] that the side `role` ("server" or "client") knows the token."""
    message = b"tpilite " + role.encode() + b"\0" + server_nonce + client_nonce
    return hmac.new(key, message, hashlib.sha256).digest()


def verify(key: bytes, role: str, server_nonce: bytes, client_nonce: bytes, proof: bytes) -> bool:
    """Whether `proof` is that of a side `role` that knows the token, compared in constant time."""
    return hmac.compare_digest(prove(key, role, server_nonce, client_nonce), proof)


def server_tls(cert: Path, key: Path, ca: Path | None) -> ssl.SSLContext:
    """TLS for the listening side; with `ca`, clients must show a certificate that it signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, cert, key, ca)
    if ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_tls(ca: Path, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    """TLS for the joining side: the server's certificate must come from `ca`.

    Host names are not compared: home machines are reached by changing addresses, and the private
    authority plus the token say who the server is.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    _load(context, cert, key, ca)
    return context


def token_tls(key: bytes) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS 1.3 for the listening and for the joining side, by the token's key instead of certificates.

    Raises `ConfigError` where this Python cannot: before 3.13, or without it in its OpenSSL.
    """
    if not getattr(ssl, "HAS_PSK", False):
        raise ConfigError(
            "--encrypt needs Python 3.13 or newer; --tls_cert, --tls_key and --tls_ca encrypt with any"
        )
    secret = prove(key, "tls", b"", b"")
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Nobody has a certificate: who could show one to a client still could not go on to the server.
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    server.set_psk_server_callback(lambda _name: secret, "tpilite")  # type: ignore[attr-defined, unused-ignore]
    client.set_psk_client_callback(lambda _hint: ("tpilite", secret))  # type: ignore[attr-defined, unused-ignore]
    return server, client


def _load(context: ssl.SSLContext, cert: Path | None, key: Path | None, ca: Path | None) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for what, path in (("--tls_cert", cert), ("--tls_key", key), ("--tls_ca", ca)):
        if path is not None and not path.is_file():
            raise ConfigError(f"{what} {path} does not exist")
    try:
        if cert is not None:
            context.load_cert_chain(cert, key)
        if ca is not None:
            context.load_verify_locations(ca)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"the TLS files cannot be used: {error}; expected PEM certificates and key"
        ) from error
