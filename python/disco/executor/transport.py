"""How ranks exchange payloads: the interface that every transport implements.

A payload is addressed by (request, exchange, source, destination): `request` counts the forward
passes, `exchange` is the number that the plan gave to an exchanged tensor. Both sides know all
four, so a message needs no header beyond them and receives can be posted before sends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Handle(ABC):
    """One receive or one send under way. Its buffer must be left alone until it is done."""

    __slots__ = ()

    @property
    @abstractmethod
    def done(self) -> bool:
        """True once the payload is in the buffer (receive) or the buffer is free (send).

        Never blocks. May raise TransportError if the exchange failed.
        """


class Transport(ABC):
    """Point-to-point, non-blocking exchange of contiguous buffers between `world_size` ranks.

    Attributes:
        rank: this member, 0 <= rank < world_size.
        world_size: number of members.
        bytes_sent: payload bytes really handed over since construction (no headers).
        bytes_received: payload bytes really received since construction (no headers).
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.bytes_sent = 0
        self.bytes_received = 0

    @abstractmethod
    def connect(self) -> None:
        """Reach all peers. Raises TransportError naming the rank that cannot be reached."""

    @abstractmethod
    def post_receive(self, buffer: Tensor, source: int, exchange: int, request: int) -> Handle:
        """Announce that a payload of `source` goes into `buffer` (contiguous, any dtype)."""

    @abstractmethod
    def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> Handle:
        """Start sending `buffer` (contiguous, any dtype) to `destination`."""

    @abstractmethod
    def progress(self) -> None:
        """Move pending data along without blocking. Called between kernels."""

    @abstractmethod
    def wait(self, handle: Handle, deadline_s: float) -> None:
        """Block until `handle` is done; DeadlineError after `deadline_s` seconds (inf: never)."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. May be called more than once."""
