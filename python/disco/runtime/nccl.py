"""The transport over NCCL, for ranks that have a GPU each: payloads never touch the host.

NCCL knows no tags. It matches messages by the order in which they are begun, and a rank's groups of
messages run one after the other, so all messages of an exchange are begun as one group, at `flush`,
which executors call in one order of exchanges on all ranks. Requests one after the other for the
same reason. CPU tensors (calls, accounts) go over a second transport.

Waiting looks at the group's event until the deadline, so that a lost peer is an error and no hang.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroup, Store

from disco.errors import DeadlineError, TransportError
from disco.executor.transport import NOTHING, Handle, Transport
from disco.runtime.wrapped import WrappedTransport

# A buffer and the rank at the other end.
Message = tuple[Tensor, int]


class Started(Protocol):
    """A group of messages under way; torch's Work is one."""

    def is_completed(self) -> bool: ...


class Groups(Protocol):
    """What begins groups of messages: `NcclGroups`."""

    def connect(self) -> None:
        """Reach all ranks."""

    def begin(self, receives: Sequence[Message], sends: Sequence[Message]) -> Started:
        """Begin all of these at once, after what the device was given so far."""

    def close(self) -> None:
        """Give up what is under way."""


class NcclGroups:
    """`Groups` of ranks with a GPU each.

    Args:
        store: the rendezvous, shared by all ranks.
        device: of this rank, and of no other.
        timeout_s: of NCCL's own, after which it gives a group up.
    """

    def __init__(
        self, rank: int, world_size: int, store: Store, device: torch.device, timeout_s: float
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store = PrefixStore("nccl", store)
        self._device = device
        self._timeout_s = timeout_s
        self._group: Any = None

    def connect(self) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._timeout_s)
        backend = dist.ProcessGroupNCCL(self._store, self._rank, self._world_size, options)
        group: Any = ProcessGroup(self._store, self._rank, self._world_size)
        group._register_backend(self._device, ProcessGroup.BackendType.NCCL, backend)
        self._group = group
        # The first operation has to be one of all ranks.
        group.allreduce([torch.zeros(1, device=self._device)]).wait()
        torch.cuda.synchronize(self._device)

    def begin(self, receives: Sequence[Message], sends: Sequence[Message]) -> Started:
        self._group._start_coalescing(self._device)
        for buffer, source in receives:
            self._group.recv([buffer], source, 0)
        for buffer, destination in sends:
            self._group.send([buffer], destination, 0)
        started: Started = self._group._end_coalescing(self._device)
        return started

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None


class _Group:
    """The messages of one exchange, once they have been begun."""

    __slots__ = ("finished_ns", "started")

    def __init__(self, started: Started) -> None:
        self.started = started
        self.finished_ns = 0

    def look(self) -> bool:
        if not self.finished_ns and self.started.is_completed():
            self.finished_ns = time.perf_counter_ns()
        return self.finished_ns != 0


class _NcclHandle(Handle):
    __slots__ = ("buffer", "counted", "exchange", "group", "is_receive", "peer", "transport")

    def __init__(
        self,
        transport: NcclTransport,
        buffer: Tensor,
        peer: int,
        exchange: int,
        is_receive: bool,
    ) -> None:
        self.transport = transport
        self.buffer = buffer
        self.peer = peer
        self.exchange = exchange
        self.is_receive = is_receive
        self.group: _Group | None = None
        self.counted = False

    @property
    def done(self) -> bool:
        there = self.group is not None and self.group.look()
        if there and not self.counted:
            self.counted = True
            if self.is_receive:
                self.transport.bytes_received += self.buffer.nbytes
            else:
                self.transport.bytes_sent += self.buffer.nbytes
        return there

    @property
    def finished_ns(self) -> int:
        return 0 if self.group is None else self.group.finished_ns


class NcclTransport(WrappedTransport):
    """GPU tensors over NCCL, all others over another transport.

    Args:
        inner: for tensors in CPU memory, of the same ranks.
        groups: begin messages of GPU tensors.
    """

    def __init__(self, inner: Transport, groups: Groups) -> None:
        super().__init__(inner)
        self._groups = groups
        self._receives: dict[int, list[_NcclHandle]] = {}
        self._sends: dict[int, list[_NcclHandle]] = {}
        self._failure: str | None = None

    def connect(self) -> None:
        """Reach all peers, both ways. TransportError names the rank that could not."""
        super().connect()
        try:
            self._groups.connect()
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            raise TransportError(f"rank {self.rank}: NCCL failed: {reason}") from error

    def post_receive(self, buffer: Tensor, source: int, exchange: int, request: int) -> Handle:
        """Announce that a payload of `source` goes into `buffer` (contiguous, any dtype)."""
        if not self._serves(buffer):
            return self.inner.post_receive(buffer, source, exchange, request)
        return self._queue(self._receives, buffer, source, exchange, is_receive=True)

    def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> Handle:
        """Send `buffer` (contiguous, any dtype) to `destination`, from the next `flush` on."""
        if not self._serves(buffer):
            return self.inner.send(buffer, destination, exchange, request)
        return self._queue(self._sends, buffer, destination, exchange, is_receive=False)

    def flush(self, exchange: int) -> None:
        """Begin the messages of this exchange."""
        receives, sends = self._receives.pop(exchange, []), self._sends.pop(exchange, [])
        if not receives and not sends:
            return
        try:
            group = _Group(
                self._groups.begin(
                    [(handle.buffer, handle.peer) for handle in receives],
                    [(handle.buffer, handle.peer) for handle in sends],
                )
            )
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            self._failure = f"rank {self.rank}: NCCL failed in exchange {exchange}: {reason}"
            raise TransportError(self._failure) from error
        for handle in (*receives, *sends):
            handle.group = group

    def progress(self) -> None:
        """Let the other transport move its messages along; NCCL needs nobody."""
        self.inner.progress()

    def wait(self, handle: Handle, deadline_s: float) -> None:
        """Block until `handle` is done; DeadlineError after `deadline_s` seconds."""
        if not isinstance(handle, _NcclHandle):
            self.inner.wait(handle, deadline_s)
            return
        assert handle.group is not None, "a message is begun by flush"
        until = time.monotonic() + deadline_s
        while not handle.done:
            if time.monotonic() > until:
                verb = "receiving from" if handle.is_receive else "sending to"
                self._failure = (
                    f"rank {self.rank} waited {deadline_s:g} s {verb} rank {handle.peer} in "
                    f"exchange {handle.exchange}: see that it runs, or allow more time"
                )
                raise DeadlineError(self._failure)
            os.sched_yield()

    def wait_any(self, handles: Sequence[Handle], deadline_s: float) -> None:
        """Block until the first one is done: messages end in the order in which they began."""
        self.wait(handles[0], deadline_s)

    def close(self) -> None:
        """Close both. May be called more than once."""
        self._groups.close()
        super().close()

    def _serves(self, buffer: Tensor) -> bool:
        return buffer.device.type != "cpu"

    def _queue(
        self,
        queue: dict[int, list[_NcclHandle]],
        buffer: Tensor,
        peer: int,
        exchange: int,
        is_receive: bool,
    ) -> Handle:
        assert buffer.is_contiguous(), "a payload is contiguous"
        if self._failure is not None:
            raise TransportError(self._failure)
        if buffer.numel() == 0:
            return NOTHING
        handle = _NcclHandle(self, buffer, peer, exchange, is_receive)
        queue.setdefault(exchange, []).append(handle)
        return handle
