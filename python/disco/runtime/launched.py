"""Child processes that serve one model together, and the files through which tensors reach them."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
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
        assert self._children is not None and self._folder is not None, "use it in a with block"
        self._check_usable()
        path = os.path.join(self._folder.name, "inputs.safetensors")
        tensors: list[Tensor] = []
        try:
            structure = flatten([list(args), dict(kwargs or {})], tensors)
        except TypeError as error:
            raise InputError(str(error)) from error
        save_tensors(path, tensors)
        command = {**command, "inputs": path, "structure": structure}
        # One more than the passes: the children's own waits should end first and say why.
        timeout_s = self.timeout_s * (passes + 1)
        try:
            return self._children.ask(command, timeout_s=timeout_s)
        except Exception as error:
            self._failure = str(error)
            raise
