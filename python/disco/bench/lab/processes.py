"""Holders of namespaces, and processes in them, neither of which outlives the lab."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from disco.bench.lab.requirements import LabUnavailable
from disco.errors import InputError, TransportError

_SCRIPT = str(Path(__file__).with_name("namespaces.py"))
# Isolated and without site: milliseconds to start, and no variable of the user's interferes.
BARE_PYTHON = (sys.executable, "-I", "-S")
_END_TIMEOUT_S = 10.0

NODE = "ipc,pid,net,mnt"
NETWORK_ONLY = "net"


class Holder:
    """A process that holds namespaces: the network's alone, or all of a node's.

    Raises:
        LabUnavailable: the kernel refuses, with its reason.
    """

    def __init__(self, watch_fd: int, *, node: bool) -> None:
        with _naming_interpreter():
            self._process = subprocess.Popen(
                [*BARE_PYTHON, _SCRIPT, "hold", *(["--node"] if node else []), str(watch_fd)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[watch_fd],
                start_new_session=True,  # Ctrl-C is for the lab, which then ends its nodes
                text=True,
            )
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline() or '{"error": "the holder died"}')
        if "error" in answer:
            self.close()
            raise LabUnavailable(
                f"no network lab here: the kernel refuses namespaces ({answer['error']}); a "
                "container or a policy of the system forbids them, or the kernel is built without"
            )
        self._pid = int(answer["pid"])

    @property
    def pid(self) -> int:
        """Of the holder, as long as it lives: later, the number may be another process's.

        Raises:
            TransportError: it was killed.
        """
        if self._process.poll() is not None:
            raise TransportError("a node of the lab has ended: somebody killed its holder")
        return self._pid

    def close(self) -> None:
        """End the holder, and all processes of a node with it. Returns when they are gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.poll() is None:
            try:
                self._process.stdin.write("end")
                self._process.stdin.close()
            except BrokenPipeError:
                pass  # it is gone already
        self._process.wait(_END_TIMEOUT_S)
        self._process.stdout.close()


class NodeProcess(subprocess.Popen[Any]):
    """A command on a node: a `subprocess.Popen` whose signals go to the command itself.

    Attributes:
        node_pid: of the command, as this process sees it. (`pid` is that of a small process
            between the two, which ends as the command ends.)
    """

    node_pid: int

    def send_signal(self, sig: int) -> None:
        """Send a signal to the command, unless it has ended. `terminate` and `kill` do the same."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended a moment ago
                os.kill(self.node_pid, sig)

    def terminate(self) -> None:
        """Ask the command to end (SIGTERM)."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the command (SIGKILL)."""
        self.send_signal(signal.SIGKILL)

    def kill_group(self) -> None:
        """End the command, if it still runs, and all that it started within its process group."""
        # The group is led by the process in between. While that is not waited for, its number is
        # not given to another.
        if self.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


def start(
    command: Sequence[str],
    watch_fd: int,
    *,
    holder: int | None = None,
    kinds: str = "",
    cores: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    **popen: Any,
) -> NodeProcess:
    """Start a command in namespaces.

    Args:
        holder: pid of the process that holds them; None to stay in this process's.
        kinds: which of the holder's namespaces.
        cores: to pin to; none for all that this process may use.
        env: the command's whole environment.
        popen: further arguments of `subprocess.Popen`.

    Raises:
        InputError: the command cannot be started: no such program, no right to run it.
    """
    told, tell = os.pipe()
    script = [*BARE_PYTHON, _SCRIPT, "enter", "--watch-fd", str(watch_fd), "--report-fd", str(tell)]
    if holder is not None:
        script += ["--pid", str(holder), "--kinds", kinds]
    if cores:
        script += ["--cores", ",".join(map(str, cores))]
    try:
        with _naming_interpreter():
            process = NodeProcess(
                [*script, "--", *command],
                env=env,
                pass_fds=[watch_fd, tell],
                start_new_session=True,
                **popen,
            )
    except BaseException:
        os.close(told)
        raise
    finally:
        os.close(tell)
    with os.fdopen(told, encoding="utf-8") as file:
        report = file.read()
    _check_report(process, report, command[0])
    return process


@contextlib.contextmanager
def _naming_interpreter() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot start Python to enter a node: {error}") from error


def _check_report(process: NodeProcess, report: str, program: str) -> None:
    for line in report.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "pid":
            process.node_pid = int(rest)
        elif kind == "error":
            _abandon(process)
            number, _, reason = rest.partition(" ")
            raise InputError(f"cannot start {program!r}: {reason} (error {number})")
    if not hasattr(process, "node_pid"):
        _abandon(process)
        raise InputError(f"cannot start {program!r}: the node or its lab has ended")


def _abandon(process: NodeProcess) -> None:
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
