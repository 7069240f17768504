"""Errors of the framework. Messages say what was given, what is allowed and what to do."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in what the user gave: a model, a file, an argument. The command exits with 2."""


class TrainingError(RuntimeError):
    """Training stopped: the loss is no number, or a file could not be written. Exit code 1.

    The last checkpoint stays.
    """


class TransportError(RuntimeError):
    """The exchange with another rank failed: a peer is gone, a link is cut, a message is wrong."""


class DeadlineError(TransportError, TimeoutError):
    """A message did not arrive, or was not taken, before the deadline."""


class PeerLostError(TransportError):
    """A peer died, was stopped, or its link was cut while a request needed it.

    Attributes:
        rank: of the peer.
        host: where it was reached, ``address:port``.
        exchange: number of the exchange that waited for it, None if none did.
    """

    def __init__(self, rank: int, host: str, why: str, exchange: int | None = None) -> None:
        at = "" if exchange is None else f", while exchange {exchange} waited for it"
        super().__init__(f"rank {rank} ({host}) is lost: {why}{at}")
        self.rank = rank
        self.host = host
        self.exchange = exchange
