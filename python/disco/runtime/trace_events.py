"""The events of a trace, in Chrome's Trace Event Format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from disco.executor.timeline import COMPUTE, PACK, PROGRESS, WAIT, Span, Timeline, Transfer

if TYPE_CHECKING:
    from disco.runtime.profile import Profile

Event = dict[str, Any]

# Tracks of a rank; waits of the requests in flight have the following ones.
_TRACKS = {COMPUTE: 0, PACK: 1, PROGRESS: 1, WAIT: 2}


def events(profile: Profile) -> list[Event]:
    """All of them, those that name tracks first."""
    return [
        *_names(profile),
        *_slices(profile),
        *_payloads(profile),
    ]


def _names(profile: Profile) -> Iterator[Event]:
    for rank in range(profile.plan.world_size):
        yield _meta(rank, 0, "process_name", name=f"rank {rank}")
        yield _meta(rank, 0, "process_sort_index", sort_index=rank)
        tracks = {0: "compute", 1: "pack and send"}
        lanes = max(profile.lanes(rank), default=0) + 1
        for lane in range(lanes):
            tracks[_TRACKS[WAIT] + lane] = "wait" if lanes == 1 else f"wait (in flight {lane})"
        for track, name in tracks.items():
            yield _meta(rank, track, "thread_name", name=name)
            yield _meta(rank, track, "thread_sort_index", sort_index=track)


def _meta(rank: int, track: int, what: str, **args: Any) -> Event:
    return {"ph": "M", "pid": rank, "tid": track, "name": what, "args": args}


def _slices(profile: Profile) -> Iterator[Event]:
    origin, titles = profile.begin_ns, profile.names()
    for rank in range(profile.plan.world_size):
        lanes = profile.lanes(rank)
        for number, request in enumerate(profile.requests):
            for span in request.timelines[rank].spans:
                track = _TRACKS[span.kind] + (lanes[number] if span.kind == WAIT else 0)
                args: Event = {"request": number, "image": request.name, "step": span.name}
                if span.exchange is not None:
                    args |= {"exchange": span.exchange, "bytes": span.bytes}
                if span.peer is not None:
                    args["peer"] = span.peer
                yield {
                    "ph": "X",
                    "pid": rank,
                    "tid": track,
                    "cat": span.kind,
                    "name": _title(span, titles),
                    "ts": (span.begin_ns - origin) / 1e3,
                    "dur": (span.end_ns - span.begin_ns) / 1e3,
                    "args": args,
                }


def _title(span: Span, titles: dict[int, str]) -> str:
    if span.kind == PROGRESS:
        return f"progress after {span.name}"
    if span.exchange is None:
        return span.name
    what = f"exchange {span.exchange} ({titles.get(span.exchange, '?')})"
    if span.kind == WAIT:
        where = "with" if span.name == "end" else "from"
        return f"wait for {what} {where} rank {span.peer}"
    return f"pack {what}"


def _payloads(profile: Profile) -> Iterator[Event]:
    """Per message a slice at its receiver while it is on the way, and an arrow to who waited."""
    titles = profile.names()
    for number, request in enumerate(profile.requests):
        for receiver, send, arrival in request.payloads():
            title = titles.get(arrival.exchange, "?")
            key = f"{number}.{arrival.exchange}.{arrival.peer}.{receiver}"
            yield from _payload(profile, receiver, send, arrival, key, title)
            yield from _arrow(profile, receiver, number, send, arrival, key)


def _payload(
    profile: Profile, receiver: int, send: Transfer, arrival: Transfer, key: str, title: str
) -> Iterator[Event]:
    begin = send.begin_ns - profile.begin_ns
    # What the clocks' uncertainty turns around has no length.
    end = max(begin, arrival.end_ns - profile.begin_ns)
    common: Event = {
        "pid": receiver,
        "tid": 0,
        "cat": "wire",
        "id": key,
        "name": f"exchange {arrival.exchange} ({title}) from rank {arrival.peer}",
    }
    args = {"exchange": arrival.exchange, "peer": arrival.peer, "bytes": arrival.bytes}
    yield {**common, "ph": "b", "ts": begin / 1e3, "args": args}
    yield {**common, "ph": "e", "ts": end / 1e3}


def _arrow(
    profile: Profile, receiver: int, number: int, send: Transfer, arrival: Transfer, key: str
) -> Iterator[Event]:
    wait = _wait_for(profile.requests[number].timelines[receiver], arrival)
    if wait is None:
        return
    begin, end = (at - profile.begin_ns for at in (send.begin_ns, wait.end_ns))
    track = _TRACKS[WAIT] + profile.lanes(receiver)[number]
    common: Event = {"cat": "wire", "id": key, "name": "payload"}
    yield {**common, "ph": "s", "pid": arrival.peer, "tid": 1, "ts": begin / 1e3}
    yield {
        **common,
        "ph": "f",
        "bp": "e",
        "pid": receiver,
        "tid": track,
        "ts": max(begin, end) / 1e3,
    }


def _wait_for(timeline: Timeline, arrival: Transfer) -> Span | None:
    return next(
        (
            span
            for span in timeline.spans
            if span.kind == WAIT
            and (span.exchange, span.peer) == (arrival.exchange, arrival.peer)
            and span.name != "end"
        ),
        None,
    )
