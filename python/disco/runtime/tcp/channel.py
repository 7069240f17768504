"""One connection to one peer: frames go out in order, and come in where they are awaited."""

from __future__ import annotations

import mmap
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from disco.errors import PeerLostError, TransportError
from disco.executor.transport import Handle
from disco.runtime.tcp.frames import (
    DATA,
    FIRST_CALL_EXCHANGE,
    GOODBYE,
    HEADER_BYTES,
    KINDS,
    LOST,
    MOST_EXCHANGES,
    READY,
    key_of,
    pack_header,
    unpack_header,
)
from disco.runtime.tcp.memory import bytes_of

# Of payloads that came before anybody asked for them. Ranks are at most a few requests apart.
_MOST_EARLY_BYTES = 1 << 30
_EARLY_COST = 256  # of what holds one, at least: payloads of a byte may be many
_AT_ONCE = 1 << 16  # larger ones take memory as they come, not on their header's word
# Of one read: a peer that sends without end must not keep this rank from looking at its deadlines.
_MOST_PARTS = 10_000

_Early = bytearray | mmap.mmap


class Stream(Protocol):
    """What a channel needs of a connected, non-blocking socket, encrypted or not."""

    def sendmsg(self, buffers: list[memoryview], /) -> int: ...
    def recv_into(self, buffer: memoryview, /) -> int: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


class Counts(Protocol):
    """Where payload bytes are counted: the transport."""

    bytes_sent: int
    bytes_received: int


class TcpHandle(Handle):
    """One send or receive. Keeps its buffer alive until it is done."""

    __slots__ = ("buffer", "channel", "exchange", "finished_ns", "num_bytes", "view")
    finished_ns: int

    def __init__(self, channel: Channel, buffer: Tensor, exchange: int) -> None:
        self.channel = channel
        self.buffer = buffer
        self.exchange = exchange
        self.num_bytes = buffer.nbytes
        self.view = bytes_of(buffer)
        self.finished_ns = 0

    @property
    def done(self) -> bool:
        return self.finished_ns != 0


@dataclass
class Channel:
    """Frames over one stream, without ever blocking.

    Attributes:
        rank, host: of the peer.
        heard, spoken: when bytes last came from it, and last went to it (`time.monotonic`).
        lost: why the peer is gone, or None.
        finished: the peer left on purpose, after all its payloads.
        blamed: the rank whose loss made the peer leave, or None.
        reported: ranks that the peer says it has lost.
        ready: the peer has said that it is back.
    """

    stream: Stream
    rank: int
    host: str
    counters: Counts
    heard: float = field(default_factory=time.monotonic)
    spoken: float = field(default_factory=time.monotonic)
    lost: str | None = None
    finished: bool = False
    blamed: int | None = None
    reported: set[int] = field(default_factory=set)
    ready: bool = False
    _first_request: int = 0
    _outbox: deque[tuple[list[memoryview], TcpHandle | None]] = field(default_factory=deque)
    _awaited: dict[int, TcpHandle] = field(default_factory=dict)
    _early: dict[int, _Early] = field(default_factory=dict)
    _early_bytes: int = 0
    _header: bytearray = field(default_factory=lambda: bytearray(HEADER_BYTES))
    _into: memoryview | None = None  # what is left of the frame's part that comes now
    _frame: tuple[int, TcpHandle | _Early] | None = None

    def __post_init__(self) -> None:
        self._into = memoryview(self._header)

    # Sending ------------------------------------------------------------------------------------

    @property
    def has_unsent(self) -> bool:
        return bool(self._outbox)

    def send(self, handle: TcpHandle, request: int) -> None:
        """Queue a payload and hand over what the socket takes now."""
        header = pack_header(DATA, handle.exchange, request, handle.num_bytes)
        self._outbox.append(([memoryview(header), handle.view], handle))
        self.flush()

    def say(self, kind: int, number: int = 0) -> None:
        """Queue a frame without payload; `number` goes where a payload has its exchange."""
        if self.lost is None:
            self._outbox.append(([memoryview(pack_header(kind, number))], None))
            self.flush()

    def flush(self) -> None:
        """Hand over what the socket takes now."""
        try:
            while self._outbox:
                views, handle = self._outbox[0]
                count = self.stream.sendmsg(views)
                self.spoken = time.monotonic()
                if not _drop(views, count):
                    continue  # the socket is full, or has taken the part it could
                self._outbox.popleft()
                if handle is not None:
                    handle.finished_ns = time.perf_counter_ns()
                    self.counters.bytes_sent += handle.num_bytes
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(error)

    # Receiving ----------------------------------------------------------------------------------

    def take_early(self, handle: TcpHandle, request: int) -> bool:
        """Finish the handle with a payload that came before it was asked for, if there is one."""
        early = self._early.pop(key_of(handle.exchange, request), None)
        if early is None:
            return False
        self._take(early, handle)
        return True

    def await_payload(self, handle: TcpHandle, request: int) -> None:
        """Let the payload of (request, exchange) go into the handle's buffer when it comes."""
        key = key_of(handle.exchange, request)
        if key in self._awaited:
            raise TransportError(
                f"exchange {handle.exchange} of request {request} is awaited from rank "
                f"{self.rank} twice"
            )
        # If it comes right now, it is completed in memory of its own, and then looks here.
        self._awaited[key] = handle

    def read(self) -> None:
        """Take what the socket has."""
        try:
            for _ in range(_MOST_PARTS):
                if self.lost is not None:
                    return
                assert self._into is not None
                count = self.stream.recv_into(self._into)
                if count == 0:
                    self.lose("it closed the connection")
                    return
                self.heard = time.monotonic()
                self._into = self._into[count:]
                if not len(self._into):
                    self._part_is_there()
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(error)

    def _part_is_there(self) -> None:
        """A header or a payload is complete: what comes next?"""
        if self._frame is None:
            kind, exchange, request, num_bytes = unpack_header(self._header)
            if kind == GOODBYE:
                self.blamed = exchange - 1 if exchange else None
                self.finished = not exchange
                because = f" because it lost rank {self.blamed}" if exchange else ""
                self.lose(f"it left{because}")
            elif kind not in KINDS or (num_bytes and kind != DATA):
                self.lose(f"it sent a frame that cannot be (kind {kind}, {num_bytes} bytes)")
            elif kind == DATA:
                self._begin_payload(key_of(exchange, request), num_bytes)
            else:
                if kind == LOST:
                    self.reported.add(exchange)
                self.ready |= kind == READY
                self._into = memoryview(self._header)
            return
        key, target = self._frame
        self._frame, self._into = None, memoryview(self._header)
        if isinstance(target, TcpHandle):
            self._finish(target)
            return
        handle = self._awaited.pop(key, None)
        if handle is not None:
            self._take(target, handle)
        elif self._given_up(key):
            self._early_bytes -= len(target) + _EARLY_COST
        else:
            self._early[key] = target

    def forget_before(self, request: int) -> None:
        """Give up the payloads of earlier requests, those that are still to come included.

        One that is coming in now goes to where it was to go: its buffer is not used again.
        """
        self._first_request = request
        for key in [key for key in self._awaited if self._given_up(key)]:
            del self._awaited[key]
        for key in [key for key in self._early if self._given_up(key)]:
            self._early_bytes -= len(self._early.pop(key)) + _EARLY_COST

    def _given_up(self, key: int) -> bool:
        request, exchange = divmod(key, MOST_EXCHANGES)
        return request < self._first_request and exchange < FIRST_CALL_EXCHANGE

    def _begin_payload(self, key: int, num_bytes: int) -> None:
        handle = self._awaited.pop(key, None)
        if handle is not None:
            self._check_size(num_bytes, handle)
            self._frame, self._into = (key, handle), handle.view
            return
        if self._early_bytes + num_bytes > _MOST_EARLY_BYTES:
            self.lose(f"it sent more than {_MOST_EARLY_BYTES} bytes that nobody asked for")
            return
        self._early_bytes += num_bytes + _EARLY_COST
        early = bytearray(num_bytes) if num_bytes < _AT_ONCE else mmap.mmap(-1, num_bytes)
        self._frame, self._into = (key, early), memoryview(early)

    def _take(self, early: _Early, handle: TcpHandle) -> None:
        self._early_bytes -= len(early) + _EARLY_COST
        self._check_size(len(early), handle)
        handle.view[:] = memoryview(early)
        self._finish(handle)

    def _check_size(self, num_bytes: int, handle: TcpHandle) -> None:
        if num_bytes != handle.num_bytes:
            self.lose(
                f"its payload of exchange {handle.exchange} has {num_bytes} bytes, and "
                f"{handle.num_bytes} were expected: both ranks need inputs of the same shapes"
            )
            raise self.error(handle.exchange)

    def _finish(self, handle: TcpHandle) -> None:
        handle.finished_ns = time.perf_counter_ns()
        self.counters.bytes_received += handle.num_bytes

    # Losing -------------------------------------------------------------------------------------

    def error(self, exchange: int | None = None) -> PeerLostError:
        """Why the peer is lost, to be raised."""
        assert self.lost is not None
        return PeerLostError(self.rank, self.host, self.lost, exchange)

    def lose(self, why: str | OSError) -> None:
        """Give the peer up."""
        if self.lost is None:
            self.lost = why if isinstance(why, str) else (why.strerror or type(why).__name__)
            self._outbox.clear()

    def close(self) -> None:
        """Close the connection. May be called more than once."""
        self._outbox.clear()
        self.stream.close()


def _drop(views: list[memoryview], count: int) -> bool:
    """Take `count` bytes off the front of `views`; True if nothing is left."""
    while views and count >= len(views[0]):
        count -= len(views.pop(0))
    if views:
        views[0] = views[0][count:]
    return not views
