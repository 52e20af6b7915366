"""What the server of slices and its clients agree on.

HTTP/1.1. Paths are /node_{rank}/manifest.json and /node_{rank}/{file} for each file that the manifest names.
GET and HEAD, one byte range (RFC 9110, section 14), the sha256 of the content as its ETag, If-Range. A rank
whose slices are not there yet answers 503 with Retry-After.

A connection begins with the proof of the token in both directions:

    client  any request
    server  401, WWW-Authenticate: TPILITE version=2, nonce=HEX
    client  Authorization: TPILITE client_nonce=HEX, proof=HEX
    server  the answer, with Authentication-Info: proof=HEX

The proofs are those of `auth`. The client's role is "slice client"; the server's, sent with this and every
later answer of the connection, is "slice server STATUS PATH ETAG", so that nobody in between can pass off
one content as another. Before its proof a connection learns nothing, not even which paths exist. A wrong
proof closes it.
"""

import re

AUTH_VERSION = 2
CLIENT_ROLE = "slice client"

_CHALLENGE = re.compile(r"TPILITE version=([0-9]{1,9}), nonce=([0-9a-f]{64})")
_AUTHORIZATION = re.compile(r"TPILITE client_nonce=([0-9a-f]{64}), proof=([0-9a-f]{64})")
_PROOF = re.compile(r"proof=([0-9a-f]{64})")
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def server_role(status: int, path: str, etag: str) -> str:
    """The role by which the server proves itself together with the answer that it gives."""
    return f"slice server {status} {path} {etag}"


def folder_path(rank: int) -> str:
    """What the paths of a rank's slices begin with."""
    return f"/node_{rank}/"


def etag_of(sha256: str) -> str:
    """The ETag of a content."""
    return f'"{sha256}"'


def challenge(nonce: bytes) -> str:
    """The server's WWW-Authenticate."""
    return f"TPILITE version={AUTH_VERSION}, nonce={nonce.hex()}"


def read_challenge(header: str) -> tuple[int, bytes] | None:
    """Its version and nonce; None for what is no challenge."""
    match = _CHALLENGE.fullmatch(header)
    return (int(match[1]), bytes.fromhex(match[2])) if match else None


def authorization(nonce: bytes, proof: bytes) -> str:
    """The client's Authorization."""
    return f"TPILITE client_nonce={nonce.hex()}, proof={proof.hex()}"


def read_authorization(header: str) -> tuple[bytes, bytes] | None:
    """Its nonce and proof; None for what is malformed."""
    match = _AUTHORIZATION.fullmatch(header)
    return (bytes.fromhex(match[1]), bytes.fromhex(match[2])) if match else None


def authentication_info(proof: bytes) -> str:
    """The server's Authentication-Info."""
    return f"proof={proof.hex()}"


def read_authentication_info(header: str) -> bytes:
    """Its proof; empty, which proves nothing, for what is malformed."""
    match = _PROOF.fullmatch(header)
    return bytes.fromhex(match[1]) if match else b""


def read_range(header: str, size: int) -> tuple[int, int] | None:
    """The bytes [start, stop) that a Range header asks for; (size, size) where there are none of them.

    None stands for no range: other units, several ranges and what is malformed are answered in full, as
    RFC 9110 allows.
    """
    match = _RANGE.fullmatch(header)
    if not match or header == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    if last and int(last) < int(first):
        return None
    return min(int(first), size), min(int(last) + 1, size) if last else size
