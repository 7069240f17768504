"""All ranks in one process: payloads are copied from the sender's buffer into the receiver's."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from disco.errors import DeadlineError, TransportError
from disco.executor.transport import Handle, Transport

# (request, exchange, source, destination)
_Address = tuple[int, int, int, int]


class _InProcessHandle(Handle):
    __slots__ = ("_finished_ns",)

    def __init__(self) -> None:
        self._finished_ns = 0

    @property
    def done(self) -> bool:
        return self._finished_ns != 0

    @property
    def finished_ns(self) -> int:
        return self._finished_ns

    def finish(self) -> None:
        self._finished_ns = time.perf_counter_ns()


@dataclass
class _Pending:
    """One side of a message whose other side is not there yet."""

    buffer: Tensor
    handle: _InProcessHandle
    transport: Transport


@dataclass
class InProcessHub:
    """Where the transports of `world_size` ranks meet. Safe to use from several threads."""

    world_size: int
    _receives: dict[_Address, _Pending] = field(default_factory=dict)
    _sends: dict[_Address, _Pending] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def transports(self) -> list[InProcessTransport]:
        """One transport per rank."""
        return [InProcessTransport(self, rank) for rank in range(self.world_size)]

    def meet(self, address: _Address, side: _Pending, is_send: bool) -> None:
        """Bring one side of a message; with both sides there, copy it."""
        mine, others = (self._sends, self._receives) if is_send else (self._receives, self._sends)
        with self.changed:
            if address in mine:
                raise TransportError(
                    f"message {address} is {'sent' if is_send else 'awaited'} twice"
                )
            other = others.pop(address, None)
            if other is None:
                mine[address] = side
                return
            source, destination = (side, other) if is_send else (other, side)
            _copy(source.buffer, destination.buffer, address)
            num_bytes = source.buffer.numel() * source.buffer.element_size()
            source.transport.bytes_sent += num_bytes
            destination.transport.bytes_received += num_bytes
            source.handle.finish()
            destination.handle.finish()
            self.changed.notify_all()


class InProcessTransport(Transport):
    """One rank's end of an `InProcessHub`."""

    def __init__(self, hub: InProcessHub, rank: int) -> None:
        super().__init__(rank, hub.world_size)
        self._hub = hub

    def connect(self) -> None:
        """Nothing to do: the hub is there."""

    def post_receive(self, buffer: Tensor, source: int, exchange: int, request: int) -> Handle:
        handle = _InProcessHandle()
        address = (request, exchange, source, self.rank)
        self._hub.meet(address, _Pending(buffer, handle, self), is_send=False)
        return handle

    def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> Handle:
        handle = _InProcessHandle()
        address = (request, exchange, self.rank, destination)
        self._hub.meet(address, _Pending(buffer, handle, self), is_send=True)
        return handle

    def progress(self) -> None:
        """Nothing to do: messages move when both sides are there."""

    def wait(self, handle: Handle, deadline_s: float) -> None:
        self.wait_any((handle,), deadline_s)

    def wait_any(self, handles: Sequence[Handle], deadline_s: float) -> None:
        def some_done() -> bool:
            return any(handle.done for handle in handles)

        with self._hub.changed:
            if not self._hub.changed.wait_for(some_done, timeout=deadline_s):
                raise DeadlineError(
                    f"rank {self.rank} waited {deadline_s:g} s for a message of another rank in "
                    f"this process; run all ranks together"
                )

    def close(self) -> None:
        """Nothing to release."""


def _copy(source: Tensor, destination: Tensor, address: _Address) -> None:
    if source.dtype != destination.dtype or source.numel() != destination.numel():
        raise TransportError(
            f"message {address} has {source.numel()} x {source.dtype}, the receiver expects "
            f"{destination.numel()} x {destination.dtype}; both ranks must run the same plan"
        )
    with torch.no_grad():
        destination.view(-1).copy_(source.view(-1))
