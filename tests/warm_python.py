"""A Python that has imported torch and is forked for every process that asks: the other side of
warm_start.py. Its argument is a socket's number."""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import socket
import sys
import time
import types
from typing import Any

MODULES = ("torch", "disco.api", "disco.runtime.worker", "disco.cli", "safetensors.torch")
MOST_BYTES = 1 << 17
MOST_S = 5.0  # to wait for threads that imports have started


def serve(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Forks until the other side is gone. Returns in the processes, with what was asked."""
    while True:
        message, fds, _, _ = socket.recv_fds(control, MOST_BYTES, 3)
        if not message:
            os._exit(0)
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            between = os.getpid()
            pid = os.fork()
            if pid:
                # The process between ends, so that who asked becomes the parent (warm_start.py).
                os.write(writing, b"%d" % pid)
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.0005)
            for fd in (reading, writing, control.detach()):
                os.close(fd)
            return json.loads(message), fds
        os.waitpid(between, 0)
        control.send(os.read(reading, 32))
        for fd in (reading, writing, *fds):
            os.close(fd)


def become(asked: dict[str, Any], fds: list[int]) -> None:
    """What `subprocess` and a starting Python do."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    if asked["new_session"]:
        os.setsid()
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.orig_argv = [sys.executable, *asked["words"]]


def run(words: list[str]) -> None:
    """As `python WORDS`."""
    first, *rest = words
    if first == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *rest[1:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(first))
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


def others() -> list[str]:
    """Names of the threads beside this one."""
    found = []
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/comm") as file:
                found.append(file.read().strip())
        except OSError:  # it has ended
            continue
    return found[1:]


if __name__ == "__main__":
    control = socket.socket(fileno=int(sys.argv[1]))
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()  # a collection would write to every page that is shared
    # A lock that another thread holds would be held for ever after the fork.
    until = time.monotonic() + MOST_S
    while (running := others()) and time.monotonic() < until:
        time.sleep(0.01)
    control.send(f"threads beside it: {running}".encode()[:100] if running else b"ready")
    become(*(asked := serve(control)))
    run(asked[0]["words"])
