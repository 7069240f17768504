"""The secret that all ranks of one cluster share. In a file or the environment, never an argument:

arguments are there for every user of the machine to read.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from disco.errors import InputError

TOKEN_VARIABLE = "DISCO_TOKEN"
_LEAST_CHARACTERS = 16


def make_token(path: str | os.PathLike[str]) -> None:
    """Write a new token of 256 bits into a new file that only this user reads."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise InputError(
            f"the token file {os.fspath(path)} cannot be made: {error.strerror}"
        ) from None
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32) + "\n")


def read_token(path: str | os.PathLike[str] | None = None) -> bytes:
    """The token in a file, or without one in the variable ``DISCO_TOKEN``.

    Raises:
        InputError: there is none, it is too short to be a secret, or others can read its file.
    """
    if path is None:
        text = os.environ.get(TOKEN_VARIABLE, "")
        if not text.strip():
            raise InputError(
                "ranks need a token that they share: give --token-file FILE or set "
                f"{TOKEN_VARIABLE}"
            )
        return _checked(text, f"the variable {TOKEN_VARIABLE}")
    file = Path(path)
    try:
        if file.stat().st_mode & 0o077:
            raise InputError(
                f"others may read the token file {file}: make it yours alone (chmod 600 {file})"
            )
        return _checked(file.read_text("utf-8"), f"the token file {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the token file {file} cannot be read: {error}") from None


def _checked(text: str, where: str) -> bytes:
    token = text.strip()
    if len(token) < _LEAST_CHARACTERS:
        raise InputError(
            f"{where} has a token of {len(token)} characters: it needs at least "
            f"{_LEAST_CHARACTERS}, made at random"
        )
    return token.encode()
