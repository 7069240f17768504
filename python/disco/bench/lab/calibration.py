"""What the wires do: latency and bandwidth of each pair of nodes, fitted to measured messages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from disco.bench.lab.rates import largest_harmless_burst_ms
from disco.bench.tables import table
from disco.runtime.ping import RoundTrips

SMALL_BYTES = 16384  # the size of a typical exchange of selected channels
MEDIUM_BYTES = 65536
_LARGE_FACTOR = 3.0  # bandwidth, not latency, is then most of a message's time
_SLOWER = 0.9  # of the bandwidth that the rate allows: below, something else is the limit
# A message's last frame, of any size, and jitter count as free bytes, too.
_FREE_TOLERANCE, _JITTER_MS = 1.5, 0.05


@dataclass(frozen=True)
class Point:
    """A message size, measured.

    Attributes:
        bytes: of the message.
        median_ms, lowest_ms, highest_ms: of its round trips; the answer is one byte.
        repeats: how many.
    """

    bytes: int
    median_ms: float
    lowest_ms: float
    highest_ms: float
    repeats: int


@dataclass(frozen=True)
class Skipped:
    """A size that was left out, because a message would have taken `expected_s`."""

    bytes: int
    expected_s: float


@dataclass(frozen=True)
class LinkFit:
    """The way from one node to another: round trip = 2 latencies + bytes / bandwidth.

    Attributes:
        source, target: ranks.
        latency_ms: of a small message, one way (half of the smallest one's round trip).
        bandwidth_mbit_s: of payload, in 10^6 bits a second.
        residual: median deviation of the points from the fit, relative to the fit.
        worst_residual: the largest one.
        small_mbit_s: bandwidth that messages of up to 16 KB seem to have, judged by what the
            largest of them takes more than the smallest; None if it takes no longer.
        free_bytes: of messages of up to 64 KB, that pass after a pause without taking time. A token
            bucket's burst shows here. None where there is no rate.
        warning: what is wrong with this link's measurement; empty if nothing is.
        points: what was measured.
        skipped: what was not, because it would have taken too long.
    """

    source: int
    target: int
    latency_ms: float
    bandwidth_mbit_s: float
    residual: float
    worst_residual: float
    small_mbit_s: float | None
    free_bytes: int | None
    warning: str
    points: tuple[Point, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Calibration:
    """The links of a lab, and how they were made.

    Attributes:
        shapes: of each node's cable, in words.
        cores: which each node had, in words.
        gap_ms: pause before each message.
        links: of each directed pair.
    """

    shapes: tuple[str, ...]
    cores: str
    gap_ms: float
    links: tuple[LinkFit, ...]

    @property
    def warnings(self) -> list[str]:
        """Of all links."""
        return [link.warning for link in self.links if link.warning]

    def link(self, source: int, target: int) -> LinkFit:
        """The way from `source` to `target`.

        Raises:
            KeyError: it was not measured.
        """
        for link in self.links:
            if (link.source, link.target) == (source, target):
                return link
        raise KeyError(f"no link from {source} to {target} was measured")

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return {**asdict(self), "warnings": self.warnings}

    def __str__(self) -> str:
        rows = [("link", "latency ms", "Mbit/s", "up to 16 KB", "residual", "worst", "free bytes")]
        rows += [
            (
                f"{link.source} -> {link.target}",
                f"{link.latency_ms:.3f}",
                f"{link.bandwidth_mbit_s:.1f}",
                "-" if link.small_mbit_s is None else f"{link.small_mbit_s:.1f}",
                f"{link.residual:.1%}",
                f"{link.worst_residual:.1%}",
                "-" if link.free_bytes is None else str(link.free_bytes),
            )
            for link in self.links
        ]
        lines = [f"node {rank}: {text}" for rank, text in enumerate(self.shapes)]
        lines += [self.cores, f"a pause of {self.gap_ms:g} ms before each message", table(rows)]
        left_out = sorted({(s.bytes, round(s.expected_s)) for k in self.links for s in k.skipped})
        lines += [f"left out: {size} bytes, some {seconds} s each" for size, seconds in left_out]
        return "\n".join([*lines, *(f"WARNING: {text}" for text in self.warnings)])


def fit_link(
    source: int, target: int, trips: Sequence[RoundTrips], limit_mbit_s: float | None
) -> LinkFit:
    """Fit latency and bandwidth to round trips.

    Latency is half of the smallest message's round trip. Bandwidth is the median of the slopes
    between all pairs of large messages (Theil and Sen's estimate): those that took at least three
    times as long as the smallest. So neither a few disturbed sizes nor a bucket's burst shift it,
    and the residuals show what a line cannot describe.

    Args:
        trips: of ascending sizes.
        limit_mbit_s: payload that the way's rate allows (`Shape.payload_mbit_s`), for the warning;
            None for no limit.

    Raises:
        ValueError: no size took much longer than the smallest: there is no bandwidth to tell.
    """
    points = tuple(_point(trip) for trip in trips if trip.seconds)
    ms_per_byte = _ms_per_byte(points)
    smallest = points[0]
    fitted = [smallest.median_ms + ms_per_byte * (p.bytes - smallest.bytes) for p in points]
    deviations = [abs(point.median_ms - ms) / ms for point, ms in zip(points, fitted, strict=True)]
    bandwidth_mbit_s = 8e-3 / ms_per_byte
    free_bytes = _free_bytes(points, limit_mbit_s)
    return LinkFit(
        source=source,
        target=target,
        latency_ms=smallest.median_ms / 2,
        bandwidth_mbit_s=bandwidth_mbit_s,
        residual=statistics.median(deviations),
        worst_residual=max(deviations),
        small_mbit_s=_small_mbit_s(points),
        free_bytes=free_bytes,
        warning=_warning(f"{source} -> {target}", bandwidth_mbit_s, free_bytes, limit_mbit_s),
        points=points,
        skipped=tuple(Skipped(t.bytes, t.expected_s) for t in trips if not t.seconds),
    )


def _point(trip: RoundTrips) -> Point:
    times = [1e3 * second for second in trip.seconds]
    return Point(trip.bytes, statistics.median(times), min(times), max(times), len(times))


def _ms_per_byte(points: Sequence[Point]) -> float:
    large = [p for p in points[1:] if p.median_ms >= _LARGE_FACTOR * points[0].median_ms]
    if len(large) == 1:
        large.insert(0, points[0])
    slopes = [(b.median_ms - a.median_ms) / (b.bytes - a.bytes) for a, b in combinations(large, 2)]
    slope = statistics.median(slopes) if slopes else 0.0
    if slope <= 0:
        raise ValueError(
            "larger messages took no longer than smaller ones: "
            f"{[(point.bytes, round(point.median_ms, 3)) for point in points]} (bytes, ms); "
            "measure larger sizes"
        )
    return slope


def _small_mbit_s(points: Sequence[Point]) -> float | None:
    smallest = points[0]
    largest = max((p for p in points if p.bytes <= SMALL_BYTES), key=lambda p: p.bytes)
    more_ms = largest.median_ms - smallest.median_ms
    return (largest.bytes - smallest.bytes) * 8e-3 / more_ms if more_ms > 0 else None


def _free_bytes(points: Sequence[Point], limit_mbit_s: float | None) -> int | None:
    """Compares what was fastest of each size: whatever else runs here only makes it slower."""
    if limit_mbit_s is None:
        return None
    bytes_per_ms = limit_mbit_s * 1e3 / 8
    smallest = points[0]
    free = [
        (point.bytes - smallest.bytes) - (point.lowest_ms - smallest.lowest_ms) * bytes_per_ms
        for point in points
        if point.bytes <= MEDIUM_BYTES
    ]
    return round(max([0.0, *free]))


def _warning(
    way: str, bandwidth_mbit_s: float, free_bytes: int | None, limit_mbit_s: float | None
) -> str:
    if limit_mbit_s is None or free_bytes is None:
        return ""
    problems = []
    hidden_ms = free_bytes * 8e-3 / limit_mbit_s
    harmless_ms = _FREE_TOLERANCE * largest_harmless_burst_ms(limit_mbit_s * 1e6) + _JITTER_MS
    if hidden_ms > harmless_ms:
        problems.append(
            f"the first {free_bytes} bytes of each message pass for nothing, which hides "
            f"{hidden_ms:.2f} ms a message: the token bucket is too large for this rate; leave "
            "burst_bytes out, and where it is, take a machine that is less busy"
        )
    if bandwidth_mbit_s < _SLOWER * limit_mbit_s:
        problems.append(
            f"{bandwidth_mbit_s:.1f} of the {limit_mbit_s:.1f} Mbit/s that the rate allows: this "
            "machine cannot send that fast, or is busy; take a lower rate, or leave it alone"
        )
    return f"{way}: {'; '.join(problems)}" if problems else ""
