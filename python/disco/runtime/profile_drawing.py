"""A profile as a picture: a row for each rank and kind of work, and a line for each payload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disco.errors import InputError
from disco.executor.timeline import COMPUTE, PACK, PROGRESS, WAIT

if TYPE_CHECKING:
    from disco.runtime.profile import Profile, Profiled

_ROWS = (COMPUTE, PACK, WAIT)
_COLOURS = {COMPUTE: "tab:blue", PACK: "tab:orange", WAIT: "lightgrey"}
_INCHES_WIDE = 16.0
_INCHES_A_ROW = 0.35
_DPI = 120
_MOST_PANELS = 6


def draw_profile(profile: Profile, path: Path) -> None:
    """Draw requests over time, as a PNG: a panel for every stretch in which some were under way.

    Payloads are lines from where their sender began to hand them over to where their receiver had
    all of them.

    Raises:
        InputError: matplotlib is not installed.
    """
    load_matplotlib()
    from matplotlib.figure import Figure

    stretches = _stretches(profile)
    shown = stretches[:_MOST_PANELS]
    height = (0.8 + _INCHES_A_ROW * len(_ROWS) * profile.plan.world_size) * len(shown) + 0.4
    figure = Figure(figsize=(_INCHES_WIDE, height), dpi=_DPI, layout="constrained")
    figure.suptitle(_title(profile, sum(len(stretch) for stretch in shown)), fontsize=9)
    if shown:
        panels = figure.subplots(len(shown), squeeze=False)[:, 0]
        for axes, requests in zip(panels, shown, strict=True):
            _panel(axes, requests, profile.plan.world_size)
    figure.savefig(path, format="png", metadata={"Software": None})


def _stretches(profile: Profile) -> list[list[Profiled]]:
    """The requests, in groups that were under way at the same time."""
    found: list[list[Profiled]] = []
    reached = 0
    for request in profile.requests:
        if not found or request.begin_ns > reached:
            found.append([])
        found[-1].append(request)
        reached = max(reached, request.end_ns)
    return found


def _panel(axes: Any, requests: Sequence[Profiled], world_size: int) -> None:
    from matplotlib.collections import LineCollection

    origin = requests[0].begin_ns
    labels = []
    for rank in range(world_size):
        for kind in _ROWS:
            row = _row(rank, kind)
            labels.append((row, f"rank {rank} {kind}" if kind == _ROWS[0] else kind))
            bars = [
                ((s.begin_ns - origin) / 1e6, (s.end_ns - s.begin_ns) / 1e6)
                for request in requests
                for s in request.timelines[rank].spans
                if (PACK if s.kind == PROGRESS else s.kind) == kind
            ]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=_COLOURS[kind])
    axes.add_collection(LineCollection(_lines(requests, origin), colors="tab:red", linewidths=0.4))
    axes.set_yticks([row for row, _ in labels], [label for _, label in labels])
    axes.invert_yaxis()
    axes.set_xlim(0, (max(request.end_ns for request in requests) - origin) / 1e6)
    axes.set_xlabel("ms")
    axes.set_title(", ".join(request.name for request in requests), fontsize=8)


def _row(rank: int, kind: str) -> float:
    return rank * (len(_ROWS) + 0.5) + _ROWS.index(kind)


def _lines(requests: Sequence[Profiled], origin: int) -> list[Any]:
    lines = []
    for request in requests:
        for receiver, send, arrival in request.payloads():
            begin, end = ((at - origin) / 1e6 for at in (send.begin_ns, arrival.end_ns))
            lines.append([(begin, _row(arrival.peer, PACK)), (end, _row(receiver, PACK))])
    return lines


def _title(profile: Profile, shown: int) -> str:
    error_us = max(profile.clock_error_ns, default=0) / 1e3
    clocks = f", clocks aligned to {error_us:.1f} us" if error_us else ""
    return (
        f"the first {shown} requests, {profile.in_flight} in flight, {profile.transport}{clocks}; "
        f"red lines are payloads, from their sender to their receiver"
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
