"""The cluster's token where none is given: made at random once and kept in the user's own folder."""

import contextlib
import os
import secrets
from pathlib import Path

from tpilite.errors import ConfigError
from tpilite.net.auth import MIN_TOKEN_CHARACTERS

# 96 bits are beyond guessing, and 16 letters can be typed on another machine.
_TOKEN_BYTES = 12

# Long enough for any secret, short enough that a wrong file is noticed.
_MAX_LENGTH = 256


def kept_token(path: Path, *, make: bool) -> str | None:
    """The token in `path`; where there is none, a new one kept there if `make`, else None.

    Raises `ConfigError` for a file that others can read, that holds no token or that cannot be written.
    """
    try:
        if make:
            with contextlib.suppress(FileExistsError):
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(fd, "w") as file:
                    file.write(new_token() + "\n")
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by other users: run chmod 600 {path}")
        return checked_token(path.read_text().strip(), str(path))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token in {path} cannot be kept: {error}; use --token_file") from error


def new_token() -> str:
    """A token that nobody can guess."""
    return secrets.token_urlsafe(_TOKEN_BYTES)


def checked_token(token: str, source: str) -> str:
    """`token`, if it can be one. Raises `ConfigError` that names its source and not the token."""
    fits = MIN_TOKEN_CHARACTERS <= len(token) <= _MAX_LENGTH
    if not fits or any(c.isspace() or not c.isprintable() for c in token):
        raise ConfigError(
            f"the token from {source} must be {MIN_TOKEN_CHARACTERS} to {_MAX_LENGTH} characters without "
            "spaces, and hard to guess; without one, rank 0 makes it and says what it is"
        )
    return token
