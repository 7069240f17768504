"""How ranks exchange payloads: the interface that every transport implements.

A payload is addressed by (request, exchange, source, destination): `request` counts the forward
passes, `exchange` is the number that the plan gave to an exchanged tensor. Both sides know all
four, so a message needs no header beyond them and receives can be posted before sends.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from disco.errors import DeadlineError

# Between two looks at messages that nothing else is left to do for: short against a millisecond of
# a layer, long against the look.
_POLL_S = 50e-6


class Handle(ABC):
    """One receive or one send under way. Its buffer must be left alone until it is done."""

    __slots__ = ()

    @property
    @abstractmethod
    def done(self) -> bool:
        """True once the payload is in the buffer (receive) or the buffer is free (send).

        Never blocks. May raise TransportError if the exchange failed.
        """

    @property
    @abstractmethod
    def finished_ns(self) -> int:
        """When this rank saw that it was done (`time.perf_counter_ns`); 0 as long as it is not."""


class _Nothing(Handle):
    """Of a message that is none."""

    __slots__ = ()

    @property
    def done(self) -> bool:
        return True

    @property
    def finished_ns(self) -> int:
        return 1  # before anything began


NOTHING = _Nothing()


class Transport(ABC):
    """Point-to-point, non-blocking exchange of contiguous buffers between `world_size` ranks.

    Attributes:
        rank: this member, 0 <= rank < world_size.
        world_size: number of members.
        bytes_sent: payload bytes really handed over since construction (no headers).
        bytes_received: payload bytes really received since construction (no headers).
        lost: ranks that requests do without from the next one on: nothing is sent to them, and what
            they would have sent counts as zeros.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.bytes_sent = 0
        self.bytes_received = 0
        self.lost: frozenset[int] = frozenset()

    @abstractmethod
    def connect(self) -> None:
        """Reach all peers. Raises TransportError naming the rank that cannot be reached."""

    @abstractmethod
    def post_receive(self, buffer: Tensor, source: int, exchange: int, request: int) -> Handle:
        """Announce that a payload of `source` goes into `buffer` (contiguous, any dtype)."""

    @abstractmethod
    def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> Handle:
        """Start sending `buffer` (contiguous, any dtype) to `destination`."""

    def flush(self, exchange: int) -> None:  # noqa: B027 - most begin at once with what they get
        """All messages of this exchange have been posted and sent. Called in the same order of
        exchanges on all ranks, for transports that begin them together."""

    @abstractmethod
    def progress(self) -> None:
        """Move pending data along without blocking. Called between kernels."""

    @abstractmethod
    def wait(self, handle: Handle, deadline_s: float) -> None:
        """Block until `handle` is done; DeadlineError after `deadline_s` seconds (inf: never)."""

    def wait_any(self, handles: Sequence[Handle], deadline_s: float) -> None:
        """Block until one of `handles`, the most urgent one first, is done.

        This one asks them in turns. A transport whose handles cannot be asked waits for the first.

        Raises:
            DeadlineError: after `deadline_s` seconds.
        """
        until = time.monotonic() + deadline_s
        while not any(handle.done for handle in handles):
            self.progress()
            if time.monotonic() > until:
                raise DeadlineError(
                    f"rank {self.rank} waited {deadline_s:g} s for any of {len(handles)} messages; "
                    f"see that the other ranks run, or allow more with deadline_s"
                )
            time.sleep(_POLL_S)

    @abstractmethod
    def close(self) -> None:
        """Release everything. May be called more than once."""
