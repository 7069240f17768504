"""The transport over torch's gloo, point to point, on one address (loopback unless told)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, Work

from disco.errors import DeadlineError, TransportError
from disco.executor.transport import Handle, Transport

# gloo's tag is 32 bits: 15 for the request, which may wrap because only neighbouring requests are
# ever under way together, and 16 for the exchange.
_EXCHANGE_BITS = 16
_REQUEST_MASK = (1 << 15) - 1
_LONGEST_S = 1e6  # gloo counts milliseconds


class GlooHandle(Handle):
    """One gloo operation. Holds its buffer and its Work: gloo may crash if they go too early."""

    __slots__ = ("_finished_ns", "buffer", "is_receive", "peer", "work")

    def __init__(self, work: Work | None, buffer: Tensor, peer: int, is_receive: bool) -> None:
        self.work = work
        self.buffer = buffer
        self.peer = peer
        self.is_receive = is_receive
        self._finished_ns = 0 if work is not None else 1  # nothing to wait for

    @property
    def done(self) -> bool:
        """True once `GlooTransport.wait` has seen the end: gloo cannot be asked without waiting."""
        return self._finished_ns != 0

    @property
    def finished_ns(self) -> int:
        """When that was."""
        return self._finished_ns

    def finish(self) -> None:
        """Record the end and let the Work go."""
        self._finished_ns = time.perf_counter_ns()
        self.work = None


class GlooTransport(Transport):
    """Payloads over gloo. Any failure, a deadline too, ends the connection for good.

    Args:
        rank, world_size: this member and how many there are.
        store: the rendezvous, shared by all members.
        address: local address that gloo listens on.
        timeout_s: for connecting and for any operation without a deadline of its own.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store,
        *,
        address: str = "127.0.0.1",
        timeout_s: float = 30.0,
    ) -> None:
        super().__init__(rank, world_size)
        self._store = store
        self._address = address
        self._timeout_s = timeout_s
        self._group: Any = None
        self._failure: str | None = None
        # A Work that is dropped before its end is undefined behaviour, whatever the caller keeps.
        self._sends: set[GlooHandle] = set()

    def connect(self) -> None:
        """Reach all peers. Raises TransportError if gloo cannot."""
        if self._group is not None or self.world_size == 1:
            return
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs know only part of it
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._address)]
        options._timeout = timedelta(seconds=self._timeout_s)
        # One thread for collectives, which are not used; point to point has none of its own.
        options._threads = 1
        try:
            self._group = gloo(
                PrefixStore("gloo", self._store), self.rank, self.world_size, options
            )
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.rank} could not reach the other {self.world_size - 1} rank(s) over "
                f"gloo on {self._address} within {self._timeout_s:g} s: {_brief(error)}"
            ) from error

    def post_receive(self, buffer: Tensor, source: int, exchange: int, request: int) -> GlooHandle:
        """Announce that a payload of `source` goes into `buffer` (contiguous, any dtype)."""
        if buffer.numel() == 0:
            return GlooHandle(None, buffer, source, is_receive=True)
        group = self._connected(buffer, source)
        try:
            work = group.recv([buffer], source, _tag(exchange, request))
        except RuntimeError as error:
            raise self._failed(f"receiving from rank {source}", error) from error
        return GlooHandle(work, buffer, source, is_receive=True)

    def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> GlooHandle:
        """Start sending `buffer` (contiguous, any dtype) to `destination`."""
        if buffer.numel() == 0:
            return GlooHandle(None, buffer, destination, is_receive=False)
        group = self._connected(buffer, destination)
        try:
            work = group.send([buffer], destination, _tag(exchange, request))
        except RuntimeError as error:
            raise self._failed(f"sending to rank {destination}", error) from error
        handle = GlooHandle(work, buffer, destination, is_receive=False)
        self._sends.add(handle)
        self.bytes_sent += buffer.nbytes
        return handle

    def progress(self) -> None:
        """Nothing to do: gloo's own thread moves the data."""

    def wait(self, handle: Handle, deadline_s: float) -> None:
        """Block until `handle` is done; DeadlineError after `deadline_s` seconds."""
        assert isinstance(handle, GlooHandle), "a handle of another transport"
        if handle.work is None:
            return
        if self._failure is not None:
            raise TransportError(self._failure)
        verb = "receiving from" if handle.is_receive else "sending to"
        try:
            handle.work.wait(timedelta(seconds=min(max(1e-3, deadline_s), _LONGEST_S)))
        except RuntimeError as error:
            raise self._failed(f"{verb} rank {handle.peer}", error) from error
        handle.finish()
        if handle.is_receive:
            self.bytes_received += handle.buffer.nbytes
        else:
            self._sends.discard(handle)

    def wait_any(self, handles: Sequence[Handle], deadline_s: float) -> None:
        """Block until the first one is done: gloo cannot be asked, nor wait for several."""
        self.wait(handles[0], deadline_s)

    def close(self) -> None:
        """Close all connections. May be called more than once."""
        self._sends.clear()
        self._group = None
        if self._failure is None:
            self._failure = f"the transport of rank {self.rank} is closed"

    def _connected(self, buffer: Tensor, peer: int) -> Any:
        assert buffer.is_contiguous(), "a payload is contiguous"
        assert 0 <= peer < self.world_size and peer != self.rank, f"no peer {peer}"
        if self._failure is not None:
            raise TransportError(self._failure)
        assert self._group is not None, "connect() comes first"
        return self._group

    def _failed(self, doing: str, error: RuntimeError) -> TransportError:
        # gloo closes every pair of the context after a timeout or a lost peer.
        kind = DeadlineError if "timed out" in str(error).lower() else TransportError
        self._failure = f"rank {self.rank} failed {doing}: {_brief(error)}"
        return kind(self._failure)


def _tag(exchange: int, request: int) -> int:
    assert 0 <= exchange < 1 << _EXCHANGE_BITS, f"exchange {exchange} does not fit the tag"
    return (request & _REQUEST_MASK) << _EXCHANGE_BITS | exchange


def _brief(error: RuntimeError) -> str:
    """gloo's message without its source path and its advice."""
    text = str(error).split("\n")[0]
    if text.startswith("[") and "] " in text:
        text = text.split("] ", 1)[1]
    return text.split(". This is typically")[0]
