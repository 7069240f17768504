"""Messages of tensors in GPU memory over a transport that carries CPU memory.

Each message has one pinned buffer of the host, made when it is first seen and used again by every
later request:

    sender: kernel packs -> copy to the host -> event -> inner transport sends
    receiver: inner transport receives -> copy to the GPU -> kernel reads in place

Copies are enqueued on the current stream, behind the kernel that packed and before the one that
reads, so nothing waits on the host but for one thing: a message is given to the inner transport
only when the event behind its copy has passed. That is looked at whenever the transport is used.
Kernels and copies of one rank are expected on one stream.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from disco.errors import DeadlineError
from disco.executor.transport import Handle, Transport
from disco.runtime.wrapped import WrappedTransport


class Event(Protocol):
    """A place in the order of what a device does; `torch.cuda.Event` is one."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Copies(Protocol):
    """What moves messages between a device and the host: `CudaCopies`."""

    def serves(self, buffer: Tensor) -> bool:
        """Whether it is in the device's memory."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """Memory of the host, uint8 ``[num_bytes]``, that copies reach without waiting."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Enqueue a copy of bytes behind what the device was given so far."""

    def mark(self, event: Event | None) -> Event:
        """An event behind all that the device was given so far: this one again, or a new one."""


class CudaCopies:
    """`Copies` of one GPU, on its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def serves(self, buffer: Tensor) -> bool:
        return buffer.is_cuda

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self, event: Event | None) -> Event:
        marked = event if isinstance(event, torch.cuda.Event) else torch.cuda.Event()
        marked.record(torch.cuda.current_stream(self._device))
        return marked


class _Slot:
    """One message's bytes on the device and on the host, and the event behind the last copy."""

    __slots__ = ("device", "event", "host", "of")

    def __init__(self, buffer: Tensor, host: Tensor, of: weakref.ref[Tensor]) -> None:
        self.device = _bytes_of(buffer)
        self.host = host
        self.of = of
        self.event: Event | None = None


class _Sending(Handle):
    __slots__ = ("address", "inner", "slot", "transport")

    def __init__(
        self, transport: StagedTransport, slot: _Slot, address: tuple[int, int, int]
    ) -> None:
        self.transport = transport
        self.slot = slot
        self.address = address
        self.inner: Handle | None = None  # once the inner transport has it

    @property
    def done(self) -> bool:
        self.transport.push()
        return self.inner is not None and self.inner.done

    @property
    def finished_ns(self) -> int:
        return 0 if self.inner is None else self.inner.finished_ns


class _Receiving(Handle):
    __slots__ = ("_landed", "inner", "slot", "transport")

    def __init__(self, transport: StagedTransport, slot: _Slot, inner: Handle) -> None:
        self.transport = transport
        self.slot = slot
        self.inner = inner
        self._landed = False

    @property
    def done(self) -> bool:
        """True once it is on the host and the copy to the device is enqueued: what is launched
        from now on reads the payload."""
        if not self._landed:
            self.transport.push()
            if self.inner.done:
                self._landed = True
                self.transport.land(self.slot)
        return self._landed

    @property
    def finished_ns(self) -> int:
        return self.inner.finished_ns if self._landed else 0


class StagedTransport(WrappedTransport):
    """A transport of CPU memory that takes messages in a device's memory, too.

    Args:
        inner: connected; this one closes it.
        copies: between the device and the host.
    """

    def __init__(self, inner: Transport, copies: Copies) -> None:
        super().__init__(inner)
        self._copies = copies
        self._slots: dict[int, _Slot] = {}
        self._leaving: deque[_Sending] = deque()  # in the order of their events

    def post_receive(self, buffer: Tensor, source: int, exchange: int, request: int) -> Handle:
        """Announce that a payload of `source` goes into `buffer` (contiguous, any dtype)."""
        if buffer.numel() == 0 or not self._copies.serves(buffer):
            return self.inner.post_receive(buffer, source, exchange, request)
        slot = self._slot(buffer)
        if slot.event is not None:
            slot.event.synchronize()  # an earlier request's copy, mostly long over
        inner = self.inner.post_receive(slot.host, source, exchange, request)
        return _Receiving(self, slot, inner)

    def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> Handle:
        """Start sending `buffer` (contiguous, any dtype) to `destination`."""
        if buffer.numel() == 0 or not self._copies.serves(buffer):
            return self.inner.send(buffer, destination, exchange, request)
        slot = self._slot(buffer)
        self._copies.copy(slot.device, slot.host)
        slot.event = self._copies.mark(slot.event)
        handle = _Sending(self, slot, (destination, exchange, request))
        self._leaving.append(handle)
        self.push()
        return handle

    def progress(self) -> None:
        """Hand over what has reached the host, and let the inner one move it along."""
        self.push()
        self.inner.progress()

    def wait(self, handle: Handle, deadline_s: float) -> None:
        """Block until `handle` is done; errors as of the inner one."""
        self.wait_any((handle,), deadline_s)

    def wait_any(self, handles: Sequence[Handle], deadline_s: float) -> None:
        """Block until one of `handles` is done; errors as of the inner one."""
        until = time.monotonic() + deadline_s
        # A peer may wait for what is still on its way to the host before it sends anything.
        while self._leaving:
            self.progress()
            if any(handle.done for handle in handles):
                return
            if time.monotonic() > until:
                raise DeadlineError(
                    f"rank {self.rank} waited {deadline_s:g} s for its own device, which has not "
                    f"packed exchange {self._leaving[0].address[1]}: allow more time"
                )
            os.sched_yield()  # to the other ranks' threads, where cores are few
        while not any(handle.done for handle in handles):
            left_s = until - time.monotonic()
            self.inner.wait_any([_inner_of(handle) for handle in handles], max(0.0, left_s))

    def close(self) -> None:
        """Close the inner one, and drop what has not been handed to it."""
        self._leaving.clear()
        self.inner.close()

    def push(self) -> None:
        """Give the inner transport what has reached the host."""
        leaving = self._leaving
        while leaving:
            handle = leaving[0]
            assert handle.slot.event is not None
            if not handle.slot.event.query():
                return
            leaving.popleft()
            handle.inner = self.inner.send(handle.slot.host, *handle.address)

    def land(self, slot: _Slot) -> None:
        """Enqueue the copy of what has arrived."""
        self._copies.copy(slot.host, slot.device)
        slot.event = self._copies.mark(slot.event)

    def _slot(self, buffer: Tensor) -> _Slot:
        key = id(buffer)
        slot = self._slots.get(key)
        if slot is None or slot.of() is not buffer:
            slots = self._slots
            of = weakref.ref(buffer, lambda _: slots.pop(key, None))
            slot = slots[key] = _Slot(buffer, self._copies.host_memory(buffer.nbytes), of)
        return slot


def _inner_of(handle: Handle) -> Handle:
    if isinstance(handle, (_Sending, _Receiving)):
        assert handle.inner is not None, "what is leaving has been handed over"
        return handle.inner
    return handle


def _bytes_of(buffer: Tensor) -> Tensor:
    """The bytes of a contiguous tensor. No view of it, which would keep the tensor alive."""
    assert buffer.is_contiguous(), "a payload is contiguous"
    offset = buffer.storage_offset() * buffer.element_size()
    raw = torch.empty(0, dtype=torch.uint8, device=buffer.device)
    return raw.set_(buffer.untyped_storage(), offset, (buffer.nbytes,), (1,))
