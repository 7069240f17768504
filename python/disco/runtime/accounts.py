"""What each rank says of one request, and what all of it says about the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

from disco.errors import TransportError
from disco.executor.timeline import Recorder, Span, Timeline, Transfer
from disco.runtime.messages import Message


@dataclass(frozen=True)
class RankReport:
    """Where one rank's time of one request went.

    compute + pack + wait is at most the latency: what is missing is the executor's own work between
    the steps. `wire_ms` is no part of that sum, since a rank computes while payloads travel.

    Attributes:
        latency_ms: from the inputs on this rank to its outputs. In a stream with several requests
            in flight this one stood behind others meanwhile.
        compute_ms: in the layers.
        pack_ms: this rank's processor at work for its messages: selecting channels, handing over to
            the transport, moving messages along between layers.
        wait_ms: unable to go on for a message that was not there, or (at the end) not yet taken. In
            a stream this is when other requests run.
        wire_ms: while at least one payload was on its way to this rank: from when its sender began
            to hand it to the transport until this rank had all of it. A rank looks between layers
            and while it waits, so a payload that came during a layer counts to the layer's end. The
            begin is on the sender's clock; on several machines it is as good as the alignment
            (`disco.runtime.clocks`), and what would be negative counts as 0.
        bytes_sent, bytes_received: of the payloads.
    """

    rank: int
    latency_ms: float
    compute_ms: float
    pack_ms: float
    wait_ms: float
    wire_ms: float
    bytes_sent: int
    bytes_received: int


@dataclass(frozen=True)
class Account:
    """What one rank says of one request; times in nanoseconds of its `time.perf_counter_ns`.

    Attributes:
        begin_ns, end_ns: from its inputs to its outputs.
        compute_ms, pack_ms, wait_ms: as of a `RankReport`.
        transfers: its messages.
        spans: its steps, if they were asked for; else empty.
    """

    begin_ns: int
    end_ns: int
    compute_ms: float
    pack_ms: float
    wait_ms: float
    transfers: tuple[Transfer, ...]
    spans: tuple[Span, ...] = ()

    @classmethod
    def of(cls, record: Recorder, begin_ns: int, end_ns: int, spans: bool) -> Account:
        """Of a request that has ended.

        Args:
            spans: whether to make its spans, which takes about 4 us each.
        """
        sums = record.sums_ms()
        return cls(
            begin_ns,
            end_ns,
            sums["compute"],
            sums["pack"] + sums["progress"],
            sums["wait"],
            tuple(record.transfers()),
            tuple(record.timeline().spans) if spans else (),
        )

    @property
    def timeline(self) -> Timeline:
        """Its spans and messages."""
        return Timeline(list(self.spans), list(self.transfers))

    def shifted(self, by_ns: int) -> Account:
        """The same on another clock, which shows `by_ns` more."""
        timeline = self.timeline.shifted(by_ns)
        return replace(
            self,
            begin_ns=self.begin_ns + by_ns,
            end_ns=self.end_ns + by_ns,
            transfers=tuple(timeline.transfers),
            spans=tuple(timeline.spans),
        )

    def to_plain(self) -> Message:
        """For JSON."""
        sums = [self.compute_ms, self.pack_ms, self.wait_ms]
        return {
            "numbers": [self.begin_ns, self.end_ns, *sums],
            "transfers": [astuple(transfer) for transfer in self.transfers],
            "spans": [astuple(span) for span in self.spans],
        }

    @classmethod
    def from_plain(cls, plain: Message) -> Account:
        """The inverse. Raises TransportError for what is none."""
        try:
            begin_ns, end_ns, compute_ms, pack_ms, wait_ms = plain["numbers"]
            return cls(
                begin_ns,
                end_ns,
                compute_ms,
                pack_ms,
                wait_ms,
                tuple(Transfer(*each) for each in plain["transfers"]),
                tuple(Span(*each) for each in plain["spans"]),
            )
        except (TypeError, KeyError, ValueError) as error:
            raise TransportError(f"a rank's account cannot be read: {error}") from None


def reports(accounts: Sequence[Account]) -> tuple[RankReport, ...]:
    """Of all ranks for one request, on one clock.

    Raises:
        TransportError: a rank received what no rank says it sent.
    """
    begins = {
        (rank, t.peer, t.exchange): t.begin_ns
        for rank, account in enumerate(accounts)
        for t in account.transfers
        if t.sent
    }
    found = []
    for rank, account in enumerate(accounts):
        arrivals = [t for t in account.transfers if not t.sent]
        try:
            stretches = [(begins[t.peer, rank, t.exchange], t.end_ns) for t in arrivals]
        except KeyError as error:
            sender, _, exchange = error.args[0]
            raise TransportError(
                f"rank {rank} received exchange {exchange} of rank {sender}, which does not say "
                f"that it sent it"
            ) from None
        found.append(
            RankReport(
                rank,
                (account.end_ns - account.begin_ns) / 1e6,
                account.compute_ms,
                account.pack_ms,
                account.wait_ms,
                covered_ns(stretches) / 1e6,
                sum(t.bytes for t in account.transfers if t.sent),
                sum(t.bytes for t in arrivals),
            )
        )
    return tuple(found)


def covered_ns(stretches: Iterable[tuple[int, int]]) -> int:
    """Length of what at least one of the stretches (begin, end) covers; backward ones are empty."""
    total = 0
    reached: int | None = None
    for begin, end in sorted(stretches):
        start = begin if reached is None else max(begin, reached)
        if end > start:
            total += end - start
            reached = end
    return total
