"""Compiled kernels on disk: compiled by one process, then read by all.

A file begins with a digest of the rest, so that one which was cut off or changed is noticed, and is
put in its place by a rename, so that nobody sees it half written. Processes that want the same file
wait for the first one's lock, which the system takes back from a process that dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

CACHE_VARIABLE = "DISCO_KERNELS_CACHE"
_DIGEST_BYTES = 32


def cache_folder() -> Path:
    """DISCO_KERNELS_CACHE, else a folder in XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    # A user without a home directory gets a relative path, which fails and is warned of.
    return Path(base or os.path.expanduser("~/.cache")) / "disco_kernels"


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """The bytes stored under ``key``, or those of ``make``, stored for the next one.

    Where they cannot be stored it warns and returns them all the same.
    """
    folder = cache_folder()
    path = folder / f"{key}.cubin"
    if (found := _read(path, False)) is not None:
        return found
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(folder / f"{key}.lock"))
        except OSError as error:
            _warn_unwritable(folder, error)
            return make()
        if (found := _read(path, True)) is not None:
            return found
        made = make()
        try:
            _write(path, made)
        except OSError as error:
            _warn_unwritable(folder, error)
        return made


def _read(path: Path, warn: bool) -> bytes | None:
    try:
        stored = path.read_bytes()
    except OSError:  # not there yet; if it cannot be written either, that is said
        return None
    content = stored[_DIGEST_BYTES:]
    if content and hashlib.sha256(content).digest() == stored[:_DIGEST_BYTES]:
        return content
    if warn:
        warnings.warn(
            f"disco_kernels: {path} is damaged; its kernels are compiled again",
            RuntimeWarning,
            stacklevel=4,
        )
    return None


def _write(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def _warn_unwritable(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"disco_kernels: compiled CUDA kernels cannot be kept in {folder} ({error}), so every "
        f"process compiles them; name another folder with {CACHE_VARIABLE}",
        RuntimeWarning,
        stacklevel=4,
    )
