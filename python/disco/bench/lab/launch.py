"""One command on every node: outputs put together line by line, and one exit code."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from disco.bench.lab.lab import Lab
from disco.bench.lab.loopback import Loopback
from disco.bench.lab.processes import NodeProcess
from disco.errors import InputError

GRACE_S = 2.0  # after the first failure, and after SIGTERM


@dataclass(frozen=True)
class Outcome:
    """How the commands ended.

    Attributes:
        codes: exit code of each rank: 128 + n if a signal n ended it, None if it was ended here
            because another one had failed.
        failed: the rank that failed first; None if none did.
    """

    codes: tuple[int | None, ...]
    failed: int | None

    @property
    def code(self) -> int:
        """That of the rank that failed first, else 0."""
        return 0 if self.failed is None else self.codes[self.failed] or 0


def fill_in(command: Sequence[str], rank: int, addresses: Sequence[str]) -> list[str]:
    """The command for a rank: `{rank}` and `{address}` are replaced wherever they stand.

    Other braces stay as they are.
    """
    return [
        word.replace("{rank}", str(rank)).replace("{address}", addresses[rank]) for word in command
    ]


def launch(lab: Lab | Loopback, command: Sequence[str], *, keep_going: bool = False) -> Outcome:
    """Start a command once a node and wait for all.

    Lines of standard output and standard error go to this process's, after the rank: `[0] ready`.
    Standard input is empty.

    Args:
        keep_going: let the other nodes go on when one fails; otherwise they are asked to end
            (SIGTERM) two seconds later, and killed after two more.

    Raises:
        InputError: the command is empty or cannot be started.
        BrokenPipeError: nobody reads the output any more.
    """
    if not command:
        raise InputError("no command: give one after --, for example `-- hostname`")
    commands = [fill_in(command, rank, lab.addresses) for rank in range(lab.nodes)]
    with _Launched(lab) as launched:
        for rank, words in enumerate(commands):
            launched.start(rank, words)
        return launched.wait(keep_going=keep_going)


class _Launched:
    """Started commands, with threads that pass on what they print."""

    def __init__(self, lab: Lab | Loopback) -> None:
        self._lab = lab
        self._processes: list[NodeProcess] = []
        self._pumps: list[threading.Thread] = []
        self._events: queue.Queue[int | OSError] = queue.Queue()
        self._writing = threading.Lock()

    def __enter__(self) -> _Launched:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end(range(len(self._processes)))
        for pump in self._pumps:
            # A process that the command left behind may hold its pipes; the lab's end closes them.
            pump.join(timeout=0.2)

    def start(self, rank: int, command: Sequence[str]) -> None:
        process = self._lab.popen(
            rank,
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._processes.append(process)
        pumps = [
            threading.Thread(target=self._pump, args=(rank, source, sink), daemon=True)
            for source, sink in (
                (process.stdout, sys.stdout.buffer),
                (process.stderr, sys.stderr.buffer),
            )
        ]
        for pump in pumps:
            pump.start()
        self._pumps += pumps
        threading.Thread(target=self._watch, args=(rank, process, pumps), daemon=True).start()

    def wait(self, *, keep_going: bool) -> Outcome:
        running = set(range(len(self._processes)))
        codes: list[int | None] = [None] * len(self._processes)
        failed: int | None = None
        deadline: float | None = None
        while running:
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                event = self._events.get(timeout=left)
            except queue.Empty:
                self._end(running)
                break
            if isinstance(event, OSError):
                raise event
            running.discard(event)
            codes[event] = _shell_code(self._processes[event].returncode)
            if codes[event] and failed is None:
                failed = event
                if not keep_going:
                    deadline = time.monotonic() + GRACE_S
        return Outcome(tuple(codes), failed)

    def _pump(self, rank: int, source: IO[bytes], sink: Any) -> None:
        prefix = f"[{rank}] ".encode()
        try:
            for line in source:
                with self._writing:
                    sink.write(prefix + line + (b"" if line.endswith(b"\n") else b"\n"))
                    sink.flush()
        except OSError as error:  # of our own output: the command's only ends
            self._events.put(error)

    def _watch(self, rank: int, process: NodeProcess, pumps: Sequence[threading.Thread]) -> None:
        process.wait()
        for pump in pumps:  # so that a rank's last lines are out before its end is news
            pump.join(timeout=0.2)
        self._events.put(rank)

    def _end(self, ranks: Any) -> None:
        """SIGTERM, some time to obey, SIGKILL."""
        running = [self._processes[rank] for rank in ranks]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE_S
        for process in running:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _shell_code(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode
