"""Where the time of a request goes: its steps, its waits, its messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from disco.executor.transport import Handle

COMPUTE, PACK, PROGRESS, WAIT = "compute", "pack", "progress", "wait"


@dataclass(frozen=True)
class Span:
    """One stretch of a request's time, in nanoseconds of `time.perf_counter_ns`.

    Attributes:
        name: of the step; of a wait, the step that could not begin, or "end" for messages that
            other ranks had still to take when all was computed.
        kind: "compute"; "pack", which is an exchange's own work: receives, packing, handing over to
            the transport; "progress", which is moving messages along after a step; or "wait".
        bytes: of a pack, those sent; of a wait, those waited for; else 0.
        exchange: of a pack, its number in the plan; of a wait, that of what was waited for.
        peer: of a wait, the rank at the message's other end.
    """

    name: str
    kind: str
    begin_ns: int
    end_ns: int
    bytes: int = 0
    exchange: int | None = None
    peer: int | None = None


@dataclass(frozen=True)
class Transfer:
    """One message of a request as one of its two ranks saw it, in nanoseconds as of a `Span`.

    Attributes:
        sent: True on the rank that sent it.
        exchange: number in the plan.
        peer: the rank at the other end.
        bytes: of the payload.
        begin_ns: sent: when it began to be handed to the transport; received: when the receive was
            posted, which may be long before anybody sends.
        end_ns: sent: when its buffer was free again, which says nothing about the receiver;
            received: when this rank had all of it. A transport without a thread looks between
            steps and while it waits, so the bytes may have come earlier.
    """

    sent: bool
    exchange: int
    peer: int
    bytes: int
    begin_ns: int
    end_ns: int


@dataclass
class Timeline:
    """A request's spans in order, which do not overlap, and its messages.

    Between spans lie the executor's own steps. Where several requests are in flight, the others run
    between them, too, and while this one could not go on they count as its waiting.
    """

    spans: list[Span] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def compute_ms(self) -> float:
        """Sum over the spans of that kind; so the others."""
        return self._ms(COMPUTE)

    @property
    def pack_ms(self) -> float:
        """Of "pack" and "progress": all that this rank's processor did for its messages."""
        return self._ms(PACK, PROGRESS)

    @property
    def wait_ms(self) -> float:
        return self._ms(WAIT)

    @property
    def total_ms(self) -> float:
        """From the first span's begin to the last one's end."""
        return (self.spans[-1].end_ns - self.spans[0].begin_ns) / 1e6 if self.spans else 0.0

    def _ms(self, *kinds: str) -> float:
        return sum(s.end_ns - s.begin_ns for s in self.spans if s.kind in kinds) / 1e6

    def shifted(self, by_ns: int) -> Timeline:
        """The same on another clock, which shows `by_ns` more."""
        return Timeline(
            [_shifted(span, by_ns) for span in self.spans],
            [_shifted(transfer, by_ns) for transfer in self.transfers],
        )

    def to_plain(self) -> dict[str, Any]:
        """As lists of numbers and strings, for JSON."""
        return {
            "spans": [list(astuple(span)) for span in self.spans],
            "transfers": [list(astuple(transfer)) for transfer in self.transfers],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Timeline:
        """The inverse. Raises TypeError or KeyError for what is none."""
        return cls(
            [Span(*span) for span in plain["spans"]],
            [Transfer(*transfer) for transfer in plain["transfers"]],
        )


def _shifted(what: Any, by_ns: int) -> Any:
    return replace(what, begin_ns=what.begin_ns + by_ns, end_ns=what.end_ns + by_ns)


class Recorder:
    """Takes down a request while it runs, as cheaply as can be; `timeline` makes sense of it later.

    Attributes:
        marks: (name, kind, begin_ns, end_ns, exchange, handle that was waited for).
        messages: (sent, exchange, peer, bytes, begin_ns, handle).
    """

    __slots__ = ("marks", "messages")

    def __init__(self) -> None:
        self.marks: list[tuple[str, str, int, int, int | None, Handle | None]] = []
        self.messages: list[tuple[bool, int, int, int, int, Handle]] = []

    def transfers(self) -> list[Transfer]:
        """All messages that have bytes. Only when the request has ended."""
        return [
            Transfer(sent, exchange, peer, num_bytes, begin, max(begin, handle.finished_ns))
            for sent, exchange, peer, num_bytes, begin, handle in self.messages
            if num_bytes
        ]

    def timeline(self) -> Timeline:
        """Only when the request has ended."""
        of_handle = {id(message[-1]): message for message in self.messages}
        sent = _bytes_sent(self.messages)
        spans = []
        for name, kind, begin, end, exchange, handle in self.marks:
            if handle is not None:
                _, exchange, peer, num_bytes, _, _ = of_handle[id(handle)]
                spans.append(Span(name, kind, begin, end, num_bytes, exchange, peer))
            else:
                num_bytes = sent.get(exchange, 0) if kind == PACK else 0
                spans.append(Span(name, kind, begin, end, num_bytes, exchange))
        return Timeline(spans, self.transfers())

    def sums_ms(self) -> dict[str, float]:
        """Milliseconds by kind, without making spans."""
        sums = dict.fromkeys((COMPUTE, PACK, PROGRESS, WAIT), 0)
        for _, kind, begin, end, _, _ in self.marks:
            sums[kind] += end - begin
        return {kind: ns / 1e6 for kind, ns in sums.items()}


def _bytes_sent(messages: Sequence[tuple[bool, int, int, int, int, Handle]]) -> dict[Any, int]:
    """By exchange."""
    found: dict[Any, int] = {}
    for sent, exchange, _, num_bytes, _, _ in messages:
        if sent:
            found[exchange] = found.get(exchange, 0) + num_bytes
    return found
