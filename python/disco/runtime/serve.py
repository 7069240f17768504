"""The child's side of a launched process: obey commands on stdin until it ends.

stdout belongs to the replies; whatever else prints goes to stderr. A child never outlives its
launcher: when stdin ends, which the kernel sees to however the launcher died, the child ends too.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import IO

from disco.errors import InputError, TransportError
from disco.runtime.messages import Message, read_message, write_message

Handler = Callable[[Message], Message]
Handlers = dict[str, Handler]


class LauncherGone(Exception):
    """Nobody is left to ask for anything, or to be told."""


class Dialogue:
    """What a handler needs that takes further commands while it works, and replies several times.

    Args:
        commands: lines as they come, None at their end.
        replies: where lines go.
    """

    def __init__(self, commands: queue.Queue[str | None], replies: IO[str]) -> None:
        self._commands = commands
        self._replies = replies

    def next(self) -> Message:
        """The next command. Raises LauncherGone if there will be none any more."""
        return self._read(self._commands.get())

    def poll(self) -> Message | None:
        """The same, or None if there is none now."""
        try:
            return self._read(self._commands.get_nowait())
        except queue.Empty:
            return None

    @staticmethod
    def _read(line: str | None) -> Message:
        if line is None:
            raise LauncherGone
        return read_message(line)

    def reply(self, message: Message) -> None:
        """Tell the launcher."""
        write_message(self._replies, {"event": "done", **message})


_GRACE_S = 2.0  # for what is under way when stdin ends


def serve(prepare: Callable[[Dialogue], tuple[Message, Handlers]]) -> int:
    """Prepare, say that it is done, then answer commands. Returns the process's exit code.

    Args:
        prepare: makes everything ready and returns what to tell the launcher, and per command a
            function from the command to its reply; it is given what a handler needs that wants
            more than one of each.

    A failure of `prepare` or of a command is told to the launcher, and ends the process: after it
    the ranks may disagree about which exchange comes next.
    """
    replies = _reserve_stdout()
    # Ctrl-C reaches the whole terminal group; only the launcher decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dialogue = Dialogue(_watch_stdin(), replies)
    try:
        ready, handlers = prepare(dialogue)
        write_message(replies, {"event": "ready", **ready})
        while True:
            command = dialogue.next()
            dialogue.reply(handlers[command["command"]](command))
    except LauncherGone:
        return 0
    except InputError as error:
        return _report(replies, "input", str(error), 2)
    except TransportError as error:
        return _report(replies, "transport", str(error), 1)
    except BrokenPipeError:
        return 1  # the launcher is gone, nobody is left to tell
    except Exception as error:  # noqa: BLE001 - the launcher is told, whatever it is
        traceback.print_exc()
        return _report(replies, "internal", f"{type(error).__name__}: {error}", 1)


def _report(replies: IO[str], kind: str, message: str, code: int) -> int:
    one_line = " ".join(message.split())
    try:
        write_message(replies, {"event": "error", "kind": kind, "message": one_line})
    except BrokenPipeError:
        print(one_line, file=sys.stderr)
    return code


def _reserve_stdout() -> IO[str]:
    """Keep stdout for replies; a library that prints to descriptor 1 reaches stderr."""
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _watch_stdin() -> queue.Queue[str | None]:
    """Lines of stdin as they come, then None, then the end of the process."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        time.sleep(_GRACE_S)
        os._exit(1)  # the main thread hangs in an exchange or computes for nobody

    threading.Thread(target=read, name="stdin", daemon=True).start()
    return lines
