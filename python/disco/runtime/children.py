"""The launcher's side: child processes that answer commands and never outlive the block."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from disco.errors import InputError
from disco.runtime.messages import Message, read_message, write_message

_GRACE_S = 0.5  # after the first failure, for the one that caused it to show
_STDERR_LINES = 40


class WorkerError(RuntimeError):
    """A child process failed, died or did not answer. The message is one line."""


@dataclass(frozen=True)
class ChildSpec:
    """A child to start.

    Attributes:
        name: for messages.
        module, args: what Python runs.
        threads: of its pools.
        popen: starts it instead of `subprocess.Popen`, and as that does, perhaps somewhere else.
    """

    name: str
    module: str
    args: tuple[str, ...]
    threads: int
    popen: Callable[..., subprocess.Popen[str]] | None = None


class Children:
    """Start children, ask them, end them. Use as a context manager.

    Raises:
        InputError: a child reported a mistake in what the user gave.
        WorkerError: a child failed otherwise; the one that failed first is named.
    """

    def __init__(self, specs: Sequence[ChildSpec], *, cwd: str, start_timeout_s: float) -> None:
        self._specs = list(specs)
        self._cwd = cwd
        self._start_timeout_s = start_timeout_s
        self._processes: list[subprocess.Popen[str]] = []
        self._stderr: list[deque[str]] = [deque(maxlen=_STDERR_LINES) for _ in specs]
        self._inbox: queue.Queue[tuple[int, int, Message | None]] = queue.Queue()
        self._given_up: set[int] = set()
        self._threads: list[threading.Thread] = []
        self.ready: list[Message] = []

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order of the specs."""
        return [process.pid for process in self._processes]

    def __enter__(self) -> Children:
        try:
            for index, spec in enumerate(self._specs):
                self._start(index, spec)
            self.ready = self._gather(range(len(self._specs)), self._start_timeout_s, "start")
        except BaseException:
            self._end(grace_s=0.0)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(grace_s=0.0 if kind is not None else 2.0)

    def ask(
        self, command: Message, *, timeout_s: float, members: Sequence[int] | None = None
    ) -> list[Message]:
        """Send one command to all children, or to some by index, and collect their replies.

        Args:
            timeout_s: until the last reply must be there.
        """
        members = range(len(self._specs)) if members is None else members
        for index in members:
            if not self._tell(index, command):
                break  # it died; its end is in the inbox, with the reason
        return self._gather(members, timeout_s, "answer")

    def ask_those_left(
        self, command: Message, members: Sequence[int], *, timeout_s: float
    ) -> tuple[dict[int, Message], set[int]]:
        """As `ask`, but children may be gone.

        A reply with ``lost`` (indices) says which of the others a child has lost. A child that all
        others answer without is not waited for.

        Returns:
            replies by index, and those that are gone: dead, or lost by others and silent; of two
            that have lost each other the one with the higher index. They have been ended.
        """
        gone = {index for index in members if not self._tell(index, command)}
        replies: dict[int, Message] = {}
        suspects: set[int] = set()
        end = time.monotonic() + timeout_s
        while not set(members) <= gone | suspects | replies.keys():
            found = self._next(end)
            if found is None:
                late = ", ".join(self._specs[i].name for i in members if i not in replies)
                raise WorkerError(f"{late} did not answer within {timeout_s:g} s")
            index, message = found
            if message is None or message.get("kind") == "transport":
                gone.add(index)
            elif message.get("event") == "error":
                raise self._failure(index, message)
            else:
                replies[index] = message
                suspects.update(message.get("lost", ()))
        gone |= suspects - replies.keys()
        for index, reply in sorted(replies.items()):
            for other in set(reply.get("lost", ())) - gone:
                mutual = index in replies[other].get("lost", ())
                gone.add(max(index, other) if mutual else other)
        for index in gone:
            self._give_up(index)
        return {i: reply for i, reply in replies.items() if i not in gone}, gone

    def restart(self, index: int, command: Message, *, members: Sequence[int]) -> None:
        """Start a child again that is gone, while these others are at a command.

        Raises:
            InputError, WorkerError: it failed, or one of the others did.
        """
        self._give_up(index)
        self._given_up.discard(index)
        for other in members:
            self._tell(other, command)
        self._start(index, self._specs[index])
        self._gather([*members, index], self._start_timeout_s, "start")

    def _tell(self, index: int, command: Message) -> bool:
        """Send one command; False if the child is gone."""
        stdin = self._processes[index].stdin
        assert stdin is not None
        try:
            write_message(stdin, command)
        except BrokenPipeError:
            return False
        return True

    def _give_up(self, index: int) -> None:
        """End a child, and listen to it no more."""
        self._given_up.add(index)
        self._processes[index].kill()
        self._processes[index].wait()

    def _next(self, end: float) -> tuple[int, Message | None] | None:
        """What a child says next, None for its end; None if nothing comes until `end`."""
        while True:
            try:
                timeout = max(0.0, end - time.monotonic())
                index, pid, message = self._inbox.get(timeout=timeout)
            except queue.Empty:
                return None
            if index not in self._given_up and pid == self._processes[index].pid:
                return index, message

    def tell(self, command: Message) -> None:
        """Send one command to all children, and do not wait for replies."""
        for index in range(len(self._processes)):
            if not self._tell(index, command):
                return  # as in `ask`

    def next_reply(self, timeout_s: float) -> tuple[int, Message]:
        """The next reply of any child, and its index; raises as soon as any child fails."""
        found = self._next(time.monotonic() + timeout_s)
        if found is None:
            raise WorkerError(f"nobody answered within {timeout_s:g} s")
        index, message = found
        if message is None or message.get("event") == "error":
            raise self._failure(index, message)
        return index, message

    def _start(self, index: int, spec: ChildSpec) -> None:
        env = dict(os.environ)
        # The child runs the code that the launcher runs, wherever that was imported from.
        env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            env[name] = str(spec.threads)
        process = (spec.popen or subprocess.Popen)(
            [sys.executable, "-m", spec.module, *spec.args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=env,
            # Not the user's folder: `-m` searches there first, and a file of theirs may be named
            # as a module is.
            cwd=self._cwd,
        )
        if index == len(self._processes):
            self._processes.append(process)
        else:
            _close(self._processes[index])
            self._processes[index] = process
        for target in (self._read_stdout, self._read_stderr):
            thread = threading.Thread(target=target, args=(index, process), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _read_stdout(self, index: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                self._inbox.put((index, process.pid, read_message(line)))
            except ValueError:
                self._stderr[index].append(line.rstrip())
        self._inbox.put((index, process.pid, None))

    def _read_stderr(self, index: int, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip():
                self._stderr[index].append(line.rstrip())

    def _gather(self, members: Sequence[int], timeout_s: float, doing: str) -> list[Message]:
        """One reply of each member; raises as soon as any child fails."""
        end = time.monotonic() + timeout_s
        replies: dict[int, Message] = {}
        while len(replies) < len(members):
            found = self._next(end)
            if found is None:
                late = ", ".join(self._specs[i].name for i in members if i not in replies)
                raise WorkerError(f"{late} did not {doing} within {timeout_s:g} s")
            index, message = found
            if message is None or message.get("event") == "error":
                raise self._failure(index, message)
            replies[index] = message
        return [replies[index] for index in members]

    def _failure(self, index: int, message: Message | None) -> Exception:
        """The error to raise: of all failures that show within a moment, the cause."""
        failures = [(index, message)]
        end = time.monotonic() + _GRACE_S
        while (other := self._next(end)) is not None:
            if other[1] is None or other[1].get("event") == "error":
                failures.append(other)
        told = {i for i, m in failures if m is not None}
        # A rank that died without a word explains the others' lost connections.
        order = {"input": 0, "died": 1, "internal": 2, "transport": 3}

        def kind(failure: tuple[int, Message | None]) -> str:
            return "died" if failure[1] is None else str(failure[1].get("kind", "internal"))

        causes = [f for f in failures if f[1] is not None or f[0] not in told]
        index, message = min(causes, key=lambda failure: order[kind(failure)])
        if message is None:
            return WorkerError(self._epitaph(index))
        if message.get("kind") == "input":
            return InputError(str(message["message"]))
        return WorkerError(f"{self._specs[index].name} failed: {message['message']}")

    def _epitaph(self, index: int) -> str:
        process, name = self._processes[index], self._specs[index].name
        try:
            code = process.wait(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            return f"{name} closed its output but still runs"
        if code < 0:
            try:
                how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
            except ValueError:
                how = f"was ended by signal {-code}"
        else:
            how = f"ended with exit code {code}"
        last = f"; its last line: {self._stderr[index][-1]}" if self._stderr[index] else ""
        return f"{name} {how}{last}"

    def _end(self, grace_s: float) -> None:
        """End all children: closing stdin asks them to, then they are killed."""
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.close()
            except BrokenPipeError:
                continue  # it is gone already
        end = time.monotonic() + grace_s
        for process in self._processes:
            try:
                process.wait(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join(timeout=1.0)
        for process in self._processes:
            _close(process)


def _close(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
