"""Files that are whole or not there: written beside, flushed to the disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors

from disco.errors import TrainingError

# The folder that files are made in, beside their place: whoever writes one may put more there.
PART = ".part"


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file under another name, then give it its own.

    Killed at any moment, `path` holds what it held before, or all of the new.

    Raises:
        TrainingError: it cannot be written; what was there before stays.
    """
    part = path.parent / PART / path.name
    with _named(path):
        try:
            part.parent.mkdir(exist_ok=True)
            write(part)
            _flush(part)
            part.replace(path)
            _flush(path.parent)
        finally:
            remove_parts(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_whole` for text."""
    write_whole(path, lambda part: _write(part, text))


def remove_parts(folder: Path) -> None:
    """Remove what a killed process left half written."""
    shutil.rmtree(folder / PART, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise TrainingError(
            f"{path} could not be written ({reason}): make room or allow writing there, then go on "
            "with --resume; what was written before is whole"
        ) from error
