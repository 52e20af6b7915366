"""The token that is kept for the user: made once, private, and never taken from a file that is not."""

import stat
from pathlib import Path

import pytest

from tpilite.cluster.token import checked_token, kept_token
from tpilite.errors import ConfigError


def test_it_is_made_once_and_is_the_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "config" / "token"
    assert kept_token(path, make=False) is None
    token = kept_token(path, make=True)
    assert token
    assert kept_token(path, make=False) == token
    assert kept_token(tmp_path / "other", make=True) != token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    kept_token(path, make=True)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        kept_token(path, make=True)


@pytest.mark.parametrize("text", ["", "fifteen-letters", "two words, and more", "x" * 257, "\x00" * 16])
def test_what_cannot_be_a_token_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="16 to 256 characters") as caught:
        kept_token(path, make=True)
    assert not text or text not in str(caught.value)


def test_a_place_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--token"):
        kept_token(tmp_path / "file" / "token", make=True)


def test_tokens_of_any_printable_kind_are_fine() -> None:
    assert checked_token("grüße-an-alle-16-Zeichen", "--token") == "grüße-an-alle-16-Zeichen"
