"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from disco.errors import InputError


def write_whole_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place and put there when it is whole.

    What a link names is written, the link stays; a device or a pipe is written as it is.

    Raises:
        InputError: it cannot be written.
    """
    target = path.resolve()
    try:
        if target.exists() and not target.is_file():
            write(path)
            return
        part = target.with_name(f"{target.name}.part")
        try:
            write(part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}: give another file"
        ) from error
