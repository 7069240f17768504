"""Ranks that go on without a lost one."""

from __future__ import annotations

from dataclasses import dataclass

from disco.errors import InputError, PeerLostError
from disco.executor import Executor, Transport
from disco.partition import Plan
from disco.runtime.messages import Message
from disco.runtime.serve import Handler, Handlers
from disco.runtime.tcp import TcpTransport

ON_PEER_LOSS = ("fail", "degrade")


def check_on_peer_loss(name: str) -> None:
    """Raise InputError for another word than "fail" and "degrade"."""
    if name not in ON_PEER_LOSS:
        raise InputError(f"on_peer_loss {name!r} was given; there are {', '.join(ON_PEER_LOSS)}")


def check_in_cpu_memory(on_peer_loss: str, device: str) -> None:
    """Raise InputError where ranks on GPUs would have to survive losses."""
    if on_peer_loss != "fail" and device != "cpu":
        raise InputError(
            f"on_peer_loss {on_peer_loss!r} was given with device {device!r}: ranks go on without "
            f"lost ones on the CPU only; leave one of the two out"
        )


def check_streams(on_peer_loss: str) -> None:
    """Raise InputError where a stream would have to survive losses."""
    if on_peer_loss != "fail":
        raise InputError(
            f"a stream was asked for with on_peer_loss {on_peer_loss!r}: a request that loses a "
            f"rank is begun again by itself, so give one at a time to `run`"
        )


def check_survivable(plan: Plan, transport: str) -> None:
    """Raise InputError unless ranks of this plan can go on without others over this transport."""
    if not plan.survivable:
        raise InputError(
            "going on without a lost node needs a plan in which every node has a part of every "
            "output, and this one splits the outputs: partition the model with survivable=True "
            "(`disco partition --survivable`)"
        )
    if transport != "tcp":
        raise InputError(
            f"going on without a lost node is for tcp, and the transport is {transport}: start the "
            f"ranks with a list of peers, or with `--transport tcp`"
        )


@dataclass
class Survivor:
    """(A launched rank.) Lets the launcher say who is left, and tells it who is lost.

    Args:
        executor, transport: of this rank.
        timeout_s: for ranks that come back.
    """

    executor: Executor
    transport: Transport
    timeout_s: float

    def around(self, handlers: Handlers) -> Handlers:
        """The same commands, which carry the number of their first ``request`` and the ranks that
        it does without (``lost``); a loss is replied, and ends nothing. And ``rejoin``, which waits
        until ``ranks`` are back."""
        there = {name: self._surviving(handler) for name, handler in handlers.items()}
        return {**there, "rejoin": self._rejoin}

    def _surviving(self, handler: Handler) -> Handler:
        def handle(command: Message) -> Message:
            try:
                self._tcp.agree(frozenset(command["lost"]), command["request"], self.timeout_s)
                self.executor.skip_to(command["request"])
                return handler(command)
            except PeerLostError as error:
                return {"lost": sorted((self._tcp.losses() | {error.rank}) - self._tcp.lost)}

        return handle

    def _rejoin(self, command: Message) -> Message:
        self._tcp.await_return(command["ranks"], self.timeout_s)
        return {}

    @property
    def _tcp(self) -> TcpTransport:
        assert isinstance(self.transport, TcpTransport)
        return self.transport
