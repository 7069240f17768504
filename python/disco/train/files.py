"""Files that are whole or not there: written beside, flushed to the disk, renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors

from disco.errors import TrainingError

PART = ".part"  # suffix of a file that is being written


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file under another name, then give it its own.

    Killed at any moment, `path` holds what it held before, or all of the new.

    Raises:
        TrainingError: it cannot be written; what was there before stays.
    """
    part = path.with_name(path.name + PART)
    with _named(path):
        try:
            write(part)
            _flush(part)
            part.replace(path)
            _flush(path.parent)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """`write_whole` for text."""
    write_whole(path, lambda part: _write(part, text))


def remove_parts(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for part in folder.glob(f"*{PART}"):
        part.unlink(missing_ok=True)


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
