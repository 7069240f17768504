"""Files that are there whole or not at all. (Those of `disco.train.files` outlast a power cut.)"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import safetensors

from disco.errors import InputError


def check_can_be_written(path: Path, said: str) -> None:
    """Refuse now what could not be written after minutes of work.

    Args:
        said: what was given, for the message.

    Raises:
        InputError: a folder, no permission, or a file in a folder that does not exist.
    """
    if path.exists() and not path.is_file():
        possible = not path.is_dir() and os.access(path, os.W_OK)
    else:
        folder = path.resolve().parent
        possible = folder.is_dir() and os.access(folder, os.W_OK)
    if not possible:
        raise InputError(f"{said} cannot be written: give a file in a folder that exists")


def write_whole_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place and put there when it is whole.

    What a link names is written, the link stays; a device or a pipe is written as it is.

    Raises:
        InputError: it cannot be written; a file of that name is as it was.
    """
    try:
        # Asked of the path: what /dev/stdout names has no path of its own if it is a pipe.
        if path.exists() and not path.is_file():
            write(path)
            return
        target = path.resolve()
        part = target.with_name(f"{target.name}.part")
        try:
            write(part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written: {reason}: give another file") from error
