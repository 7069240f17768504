"""A transport around another one: what both have in common is the inner one's."""

from __future__ import annotations

from disco.executor.transport import Transport


class WrappedTransport(Transport):
    """Counts, lost ranks, connecting and closing are those of the inner transport.

    Args:
        inner: carries CPU memory; this one closes it.
    """

    def __init__(self, inner: Transport) -> None:
        # Not the base's: it would set the inner one's counts to zero.
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.inner = inner

    @property
    def bytes_sent(self) -> int:
        return self.inner.bytes_sent

    @bytes_sent.setter
    def bytes_sent(self, value: int) -> None:
        self.inner.bytes_sent = value

    @property
    def bytes_received(self) -> int:
        return self.inner.bytes_received

    @bytes_received.setter
    def bytes_received(self, value: int) -> None:
        self.inner.bytes_received = value

    @property
    def lost(self) -> frozenset[int]:
        return self.inner.lost

    @lost.setter
    def lost(self, value: frozenset[int]) -> None:
        self.inner.lost = value

    def connect(self) -> None:
        """As of the inner one."""
        self.inner.connect()

    def close(self) -> None:
        """Close the inner one."""
        self.inner.close()


def engine_of(transport: Transport | None) -> Transport | None:
    """The transport inside, if there is one inside."""
    return transport.inner if isinstance(transport, WrappedTransport) else transport
