"""A profile as a picture: a row a rank and kind of work, and a line a payload."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from disco.errors import InputError
from disco.executor.timeline import COMPUTE, PACK, PROGRESS, WAIT

if TYPE_CHECKING:
    from disco.runtime.profile import Profile

_ROWS = (COMPUTE, PACK, WAIT)
_COLOURS = {COMPUTE: "tab:blue", PACK: "tab:orange", WAIT: "lightgrey"}
_INCHES_WIDE = 16.0
_INCHES_A_ROW = 0.35
_DPI = 120


def draw_profile(profile: Profile, path: Path) -> None:
    """Draw all requests over one time axis, as a PNG.

    Payloads are lines from where their sender began to hand them over to where their receiver had
    all of them.

    Raises:
        InputError: matplotlib is not installed.
    """
    load_matplotlib()
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    world_size, origin = profile.plan.world_size, profile.begin_ns
    height = 1.2 + _INCHES_A_ROW * len(_ROWS) * world_size
    figure = Figure(figsize=(_INCHES_WIDE, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    labels = []
    for rank in range(world_size):
        for kind in _ROWS:
            row = _row(rank, kind)
            labels.append((row, f"rank {rank} {kind}" if kind == _ROWS[0] else kind))
            bars = [
                ((s.begin_ns - origin) / 1e6, (s.end_ns - s.begin_ns) / 1e6)
                for request in profile.requests
                for s in request.timelines[rank].spans
                if (PACK if s.kind == PROGRESS else s.kind) == kind
            ]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=_COLOURS[kind])
    axes.add_collection(LineCollection(_lines(profile), colors="tab:red", linewidths=0.5))
    axes.set_yticks([row for row, _ in labels], [label for _, label in labels])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("ms")
    axes.set_title(_title(profile), fontsize=9)
    figure.savefig(path, format="png", metadata={"Software": None})


def _row(rank: int, kind: str) -> float:
    return rank * (len(_ROWS) + 0.5) + _ROWS.index(kind)


def _lines(profile: Profile) -> list[Any]:
    lines = []
    for request in profile.requests:
        arrivals = {
            (t.peer, rank, t.exchange): t.end_ns
            for rank, timeline in enumerate(request.timelines)
            for t in timeline.transfers
            if not t.sent
        }
        for rank, timeline in enumerate(request.timelines):
            for t in timeline.transfers:
                if t.sent:
                    end_ns = arrivals[rank, t.peer, t.exchange]
                    begin, end = ((at - profile.begin_ns) / 1e6 for at in (t.begin_ns, end_ns))
                    lines.append([(begin, _row(rank, PACK)), (end, _row(t.peer, PACK))])
    return lines


def _title(profile: Profile) -> str:
    error_us = max(profile.clock_error_ns, default=0) / 1e3
    clocks = f", clocks aligned to {error_us:.1f} us" if error_us else ""
    return (
        f"{len(profile.requests)} requests, {profile.in_flight} in flight, over "
        f"{profile.transport}{clocks}; lines are payloads, from their sender to their receiver"
    )


def load_matplotlib() -> Any:
    """matplotlib. Raises InputError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "a picture of a profile needs matplotlib, which is not installed: install the extra "
            "with `pip install 'disco-kernels[plot]'`, or give a file that ends in .json"
        ) from None
    return matplotlib
