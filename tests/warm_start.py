"""Processes that begin with torch imported, for tests that start ranks by the hundred.

Importing torch takes a process two to three seconds of a core, which is most of what such a test
takes. `install` has `subprocess` take Python processes from one that has imported it
(warm_python.py) and forks: with process ids, signals, exit codes, pipes, environment and working
directory as always, and this process for a parent. What differs: modules are imported, hashes are
seeded alike, numpy has one thread, and /proc shows the command line of the one that was forked.

Whatever is not a plain `python -m MODULE`, `python -c CODE` or `python FILE.py` starts as always,
and so does everything in tests that are marked as slow or cold.
"""

from __future__ import annotations

import atexit
import ctypes
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

_SERVER = Path(__file__).with_name("warm_python.py")
_SET_CHILD_SUBREAPER = 36  # of Linux' prctl
# What is read while a process starts, or torch is imported: one server for every combination.
_READ_AT_START = (
    *("DISCO_KERNELS_", "GOMP_", "KMP_", "LD_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_"),
    *("PYTHON", "TORCH_", "TRITON_"),
)
_MOST_SERVERS = 4
_cold = subprocess.Popen


class _Server:
    """A Python that is forked, or why it is not: `refused`."""

    def __init__(self, env: dict[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs, tempfile.TemporaryFile() as errors:
            self._process = _cold(
                [sys.executable, str(_SERVER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={"OPENBLAS_NUM_THREADS": "1", **env},  # without threads of its own
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            theirs.close()
            said = self._control.recv(100).decode()
            self.refused = "" if said == "ready" else said or "it ended"
            if self.refused:
                self._process.kill()
                self._process.wait()
                errors.seek(0)
                self.refused += errors.read().decode()[-3000:]
                self._control.close()
                return
        atexit.register(self.close)

    def start(self, asked: dict[str, Any], fds: list[int]) -> int:
        """The process id of a new child of this process."""
        libc = ctypes.CDLL(None)
        with self._lock:
            # Whose parent ends becomes the child of the nearest ancestor that asks for it.
            libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._control, [json.dumps(asked).encode()], fds)
                return int(self._control.recv(32))
            finally:
                libc.prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


_servers: dict[tuple[tuple[str, str], ...], _Server | None] = {}
_making = threading.Lock()


def _server(env: dict[str, str]) -> _Server | None:
    """The one for this environment; None for too many of them, and what cannot be forked."""
    key = tuple(sorted(i for i in env.items() if i[0].startswith(_READ_AT_START)))
    with _making:
        if key not in _servers:
            if len(_servers) == _MOST_SERVERS:
                return None
            made = _Server(env)
            if made.refused:
                warnings.warn(
                    f"no warm Python, so processes start cold: {made.refused}", stacklevel=1
                )
            _servers[key] = None if made.refused else made
        return _servers[key]


class WarmPopen(_cold):  # type: ignore[type-arg, misc]
    """`subprocess.Popen` that takes Python processes from a warm one."""

    def _execute_child(self, *given: Any) -> None:
        names = inspect.signature(_cold._execute_child).parameters  # type: ignore[attr-defined]
        how = dict(zip(list(names)[1:], given, strict=True))
        words = _words(how)
        env = {k: str(v) for k, v in (os.environ if how["env"] is None else how["env"]).items()}
        server = None if words is None else _server(env)
        if server is None:
            super()._execute_child(*given)
            return
        asked = {
            "words": words,
            "env": env,
            "cwd": os.path.abspath(how["cwd"] or os.getcwd()),
            "new_session": how["start_new_session"],
        }
        theirs = (how["p2cread"], how["c2pwrite"], how["errwrite"])
        self.pid = server.start(asked, [n if fd == -1 else fd for n, fd in enumerate(theirs)])
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(how[name] for name in pipes))


def _words(how: dict[str, Any]) -> list[str] | None:
    """The arguments of a plain Python process, or None for any other."""
    if isinstance(how["args"], (str, bytes, os.PathLike)):
        return None
    words = [os.fsdecode(word) for word in how["args"]]
    plain = how["umask"] < 0 and how.get("process_group", -1) == -1
    for name in ("executable", "preexec_fn", "pass_fds", "shell", "gid", "gids", "uid"):
        plain = plain and not how[name]
    if not plain or len(words) < 2 or words[0] != sys.executable:
        return None
    known = words[1] in ("-m", "-c") or (words[1].endswith(".py") and words[1][0] != "-")
    return words[1:] if known else None


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test."""
    if sys.platform == "linux":
        monkeypatch.setattr(subprocess, "Popen", WarmPopen)
