"""The cache of compiled kernels: races, damage, and folders that cannot be written."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from disco_kernels.cuda import cubin_cache
from disco_kernels.cuda.cubin_cache import CACHE_VARIABLE, cache_folder, cached
from tests.kernels.process import ROOT

# Compiles slowly and tells so in a file of its own.
_SLOW = """
import os, sys, time
from disco_kernels.cuda.cubin_cache import cached
def make():
    open(f"{sys.argv[1]}/compiled-{os.getpid()}", "w").close()
    time.sleep(float(sys.argv[2]))
    return b"kernels" * 1000
print(len(cached("key", make)))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(seen: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _SLOW, str(seen), str(seconds)],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_compiler(seen: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(seen.glob("compiled-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_of_many_processes_compiles(tmp_path: Path) -> None:
    processes = [start(tmp_path, 1.0) for _ in range(3)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [out.strip() for out, _ in results] == ["7000"] * 3, results
    assert len(list(tmp_path.glob("compiled-*"))) == 1


def test_a_killed_compiler_gives_its_place_to_the_next(tmp_path: Path, folder: Path) -> None:
    first = start(tmp_path, 600.0)
    wait_for_compiler(tmp_path, first)
    second = start(tmp_path, 0.0)
    time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=120)
    out, err = second.communicate(timeout=120)
    assert out.strip() == "7000", err
    assert len(list(tmp_path.glob("compiled-*"))) == 2
    assert not list(folder.glob("*.part"))


def test_what_was_compiled_is_read_again(folder: Path) -> None:
    assert cached("key", lambda: b"kernels") == b"kernels"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cached("key", pytest.fail) == b"kernels"
    assert cached("other", lambda: b"others") == b"others"
    assert {path.name for path in folder.glob("*.cubin")} == {"key.cubin", "other.cubin"}


def _damage(stored: bytes) -> list[bytes]:
    flipped = bytearray(stored)
    flipped[-1] ^= 1
    return [b"", stored[:20], stored[:32], stored[:-1], bytes(flipped), stored + b"\0"]


def test_a_damaged_file_is_named_and_made_again(folder: Path) -> None:
    cached("key", lambda: b"kernels")
    path = folder / "key.cubin"
    stored = path.read_bytes()
    assert stored == hashlib.sha256(b"kernels").digest() + b"kernels"
    for damaged in _damage(stored):
        path.write_bytes(damaged)
        with pytest.warns(RuntimeWarning, match=r"key\.cubin is damaged") as said:
            assert cached("key", lambda: b"kernels") == b"kernels"
        assert len(said) == 1
        assert path.read_bytes() == stored


def test_a_folder_that_cannot_be_is_survived_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match=f"cannot be kept in .*{CACHE_VARIABLE}") as said:
        assert cached("key", lambda: b"kernels") == b"kernels"
    assert len(said) == 1


def test_a_full_disk_is_survived(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cubin_cache.os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert cached("key", lambda: b"kernels") == b"kernels"
    assert not list(folder.glob("*.part"))


def test_a_compiler_that_fails_leaves_nothing(folder: Path) -> None:
    def fails() -> bytes:
        raise RuntimeError("does not compile")

    with pytest.raises(RuntimeError, match="does not compile"):
        cached("key", fails)
    assert not list(folder.glob("*.cubin"))
    assert cached("key", lambda: b"kernels") == b"kernels"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/disco_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/disco_kernels")
