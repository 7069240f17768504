"""What a profiled run leaves: a trace for Perfetto and chrome://tracing, or a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disco.errors import InputError
from disco.executor import Timeline, Transfer
from disco.partition.plan import Plan
from disco.whole_file import check_can_be_written, write_whole_file

FORMATS = (".json", ".png")


@dataclass(frozen=True)
class Profiled:
    """One request: what it was, and per rank its timeline, all on one clock."""

    name: str
    timelines: tuple[Timeline, ...]

    @property
    def begin_ns(self) -> int:
        """Of the first span of any rank."""
        return min((t.spans[0].begin_ns for t in self.timelines if t.spans), default=0)

    @property
    def end_ns(self) -> int:
        """Of the last span of any rank."""
        return max((t.spans[-1].end_ns for t in self.timelines if t.spans), default=0)

    def payloads(self) -> Iterator[tuple[int, Transfer, Transfer]]:
        """Each message: its receiver, how the sender saw it, how the receiver did."""
        sends = {
            (rank, t.peer, t.exchange): t
            for rank, timeline in enumerate(self.timelines)
            for t in timeline.transfers
            if t.sent
        }
        for receiver, timeline in enumerate(self.timelines):
            for arrival in timeline.transfers:
                if not arrival.sent:
                    yield receiver, sends[arrival.peer, receiver, arrival.exchange], arrival


@dataclass
class Profile:
    """Requests of one run.

    Attributes:
        plan: that was run.
        transport: its name.
        in_flight: requests under way at a time.
        clock_error_ns: per rank, how far its times may be off the leader's.
        requests: in order.
    """

    plan: Plan
    transport: str
    in_flight: int
    clock_error_ns: tuple[int, ...] = ()
    requests: list[Profiled] = field(default_factory=list)

    @property
    def begin_ns(self) -> int:
        """Of the first span of any rank."""
        return min((request.begin_ns for request in self.requests), default=0)

    def lanes(self, rank: int) -> list[int]:
        """Per request a track of that rank on which no other one is at the same time."""
        free_at: list[int] = []
        lanes = []
        for request in self.requests:
            spans = request.timelines[rank].spans
            begin, end = (spans[0].begin_ns, spans[-1].end_ns) if spans else (0, 0)
            lane = next((i for i, at in enumerate(free_at) if at <= begin), len(free_at))
            free_at[lane : lane + 1] = [end]
            lanes.append(lane)
        return lanes

    def names(self) -> dict[int, str]:
        """Per exchange what is exchanged."""
        return {exchange.number: exchange.value for exchange in self.plan.exchanges}


def check_profile(path: Path | None) -> None:
    """Refuse what `write_profile` could not write. Raises InputError."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"--profile {path} was given; a profile ends in {' or '.join(FORMATS)}: .json for "
            f"Perfetto (ui.perfetto.dev) and chrome://tracing, .png for a picture"
        )
    check_can_be_written(path, f"--profile {path}")
    if path.suffix.lower() == ".png":
        from disco.runtime.profile_drawing import load_matplotlib

        load_matplotlib()


def write_profile(profile: Profile, path: Path) -> None:
    """Write it in the format of the file's ending; `check_profile` says what can be."""
    check_profile(path)
    if path.suffix.lower() == ".json":
        text = json.dumps(chrome_trace(profile)) + "\n"
        write_whole_file(path, lambda part: part.write_text(text, encoding="utf-8"))
    else:
        from disco.runtime.profile_drawing import draw_profile

        write_whole_file(path, lambda part: draw_profile(profile, part))


def chrome_trace(profile: Profile) -> dict[str, Any]:
    """The trace as JSON in the Trace Event Format.

    A process a rank, with tracks for its steps, its work for messages, and its waits (one track a
    request in flight). Payloads on the way to a rank are asynchronous slices of it, and an arrow
    leads from the sender's packing to the wait that it ended.

    Times are in microseconds since the first span, on the leader's clock. ``otherData`` says how
    far other ranks' may be off.
    """
    from disco.runtime.trace_events import events

    ranks = range(profile.plan.world_size)
    errors: Sequence[int] = profile.clock_error_ns or [0] * len(ranks)
    return {
        "traceEvents": events(profile),
        "displayTimeUnit": "ms",
        "otherData": {
            "plan": profile.plan.digest,
            "transport": profile.transport,
            "in_flight": profile.in_flight,
            "requests": [request.name for request in profile.requests],
            "clock": "the leader's; others are aligned by round trips, or are the same clock",
            "clock_uncertainty_us": {f"rank {r}": errors[r] / 1e3 for r in ranks},
        },
    }
