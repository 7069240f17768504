"""A stream of requests over `RankProcesses`: the launcher's side."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from torch import Tensor

from disco.errors import InputError
from disco.runtime.children import Children
from disco.runtime.messages import Message, flatten, save_tensors
from disco.runtime.streams import Call

Result = TypeVar("Result")


class ProcessRanks(Generic[Result]):
    """Feeds the children, and collects their replies.

    Args:
        children: idle, one a rank.
        folder: private to them and this process.
        command: that begins the stream.
        timeout_s: for any one reply.
        result: of a request, from the ranks' replies.
        failed: is told why the children cannot be used any more.
        alive: whether they have not been ended.
    """

    def __init__(
        self,
        children: Children,
        folder: str,
        command: Message,
        timeout_s: float,
        result: Callable[[list[Message]], Result],
        failed: Callable[[str], None],
        alive: Callable[[], bool],
    ) -> None:
        self._children = children
        self._folder = folder
        self._command = command
        self._timeout_s = timeout_s
        self._result = result
        self._failed = failed
        self._alive = alive
        self._replies: defaultdict[int, dict[int, Message]] = defaultdict(dict)
        self._slot_of: dict[int, int] = {}  # of requests under way, whose files have its number
        self._free: list[int] = []

    def __enter__(self) -> ProcessRanks[Result]:
        self._children.tell({"command": "requests", **self._command})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the children end what is under way; its results are dropped. Not when this process is
        to end (Ctrl-C): then they are not waited for, and have to be started again."""
        if kind is not None and not issubclass(kind, (Exception, GeneratorExit)):
            self._failed(f"a stream was broken off by {kind.__name__}")
        if not self._alive():
            return
        self._children.tell({"command": "end"})
        ended: set[int] = set()
        while len(ended) < len(self._children.pids):
            index, reply = self._next_reply()
            if "ended" in reply:
                ended.add(index)

    def feed(self, number: int, call: Call) -> None:
        """See `disco.runtime.streams.Ranks`."""
        tensors: list[Tensor] = []
        try:
            structure = flatten([list(call.args), dict(call.kwargs)], tensors)
        except TypeError as error:
            raise InputError(str(error)) from error
        slot = self._free.pop() if self._free else len(self._slot_of)
        self._slot_of[number] = slot
        inputs = os.path.join(self._folder, f"inputs-{slot}.safetensors")
        save_tensors(inputs, tensors)
        outputs = os.path.join(self._folder, f"outputs-{slot}-")
        self._children.tell(
            {
                "command": "next",
                "number": number,
                "inputs": inputs,
                "structure": structure,
                "outputs": outputs,
            }
        )

    def collect(self) -> tuple[int, Result | InputError]:
        """See `disco.runtime.streams.Ranks`."""
        while True:
            index, reply = self._next_reply()
            number = reply["number"]
            self._replies[number][index] = reply
            if len(self._replies[number]) == len(self._children.pids):
                break
        replies = [reply for _, reply in sorted(self._replies.pop(number).items())]
        refused = next((str(r["refused"]) for r in replies if "refused" in r), None)
        result = InputError(refused) if refused is not None else self._result(replies)
        self._free.append(self._slot_of.pop(number))
        return number, result

    def _next_reply(self) -> tuple[int, Message]:
        try:
            return self._children.next_reply(self._timeout_s)
        except Exception as error:
            self._failed(str(error))
            raise
