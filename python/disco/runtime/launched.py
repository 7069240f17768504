"""Child processes that serve one model together, and the files through which tensors reach them."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from disco.errors import InputError
from disco.runtime.children import Children, ChildSpec, WorkerError
from disco.runtime.messages import Message, flatten, save_tensors
from disco.runtime.streams import check_idle

START_TIMEOUT_S = 180.0  # importing torch and packing weights, on slow storage

Self = TypeVar("Self", bound="Launched")


class Launched(ABC):
    """Base of `RankProcesses` and of a benchmark's engines. Use as a context manager.

    The children end with the block, with an exception in it, and when this process dies.

    Attributes:
        timeout_s: how long one pass may take.
        start_timeout_s: how long the children may take to be ready.
    """

    def __init__(self, timeout_s: float, start_timeout_s: float = START_TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self.start_timeout_s = start_timeout_s
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._children: Children | None = None
        self._failure: str | None = None
        self._stream: Generator[Any, None, None] | None = None

    @abstractmethod
    def specs(self, folder: str) -> list[ChildSpec]:
        """The children to start; `folder` is private to them and this process."""

    @property
    def pids(self) -> list[int]:
        """Process ids of the children."""
        return [] if self._children is None else self._children.pids

    @property
    def ready(self) -> list[Message]:
        """What each child said when it was ready."""
        return [] if self._children is None else self._children.ready

    def __enter__(self: Self) -> Self:
        # mkdtemp makes it for this user only: inputs, outputs and the rendezvous lie in it.
        folder = tempfile.TemporaryDirectory(prefix="disco-")
        try:
            children = Children(
                self.specs(folder.name), cwd=folder.name, start_timeout_s=self.start_timeout_s
            )
            children.__enter__()
        except BaseException:
            folder.cleanup()
            raise
        self._folder, self._children, self._failure = folder, children, None
        self._stream = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._children is not None and self._folder is not None
        try:
            self._children.__exit__(kind, value, trace)
        finally:
            self._folder.cleanup()
            self._children = None

    def measure(self, *inputs: Any, warmup: int, repeats: int) -> list[float]:
        """Latencies in ms of `repeats` passes after `warmup` untimed ones, of the slowest child."""
        replies = self._ask(
            inputs,
            {"command": "measure", "warmup": warmup, "repeats": repeats},
            warmup + repeats,
        )
        return [max(times) for times in zip(*(r["latency_ms"] for r in replies), strict=True)]

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise WorkerError(
                "the processes ended with an earlier error and have to be started again (in a new "
                f"with block); it was: {self._failure}"
            )
        check_idle(self._stream)

    def _ask(
        self,
        args: Sequence[Any],
        command: Message,
        passes: int,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Message]:
        assert self._children is not None, "use it in a with block"
        command = self._numbered(self._with_inputs(args, command, kwargs or {}), passes)
        # One more than the passes: the children's own waits should end first and say why.
        timeout_s = self.timeout_s * (passes + 1)
        with self._failing():
            return self._children.ask(command, timeout_s=timeout_s, members=self._left())

    def _left(self) -> list[int]:
        """The children that are there."""
        return list(range(len(self.pids)))

    def _numbered(self, command: Message, passes: int) -> Message:
        """What children are told beside the command."""
        return command

    def _with_inputs(
        self, args: Sequence[Any], command: Message, kwargs: Mapping[str, Any]
    ) -> Message:
        """The command, with inputs in a file beside it.

        Raises:
            InputError: inputs that no model takes.
        """
        assert self._folder is not None, "use it in a with block"
        self._check_usable()
        path = os.path.join(self._folder.name, "inputs.safetensors")
        tensors: list[Tensor] = []
        try:
            structure = flatten([list(args), dict(kwargs)], tensors)
        except TypeError as error:
            raise InputError(str(error)) from error
        save_tensors(path, tensors)
        return {**command, "inputs": path, "structure": structure}

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """After an exception in the block the children are of no use any more."""
        try:
            yield
        except Exception as error:
            self._failure = str(error)
            raise
