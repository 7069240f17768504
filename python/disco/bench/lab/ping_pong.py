"""Measures the lab's wires, one directed pair of nodes at a time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from disco.bench.lab.calibration import Calibration, LinkFit, fit_link
from disco.bench.lab.processes import BARE_PYTHON
from disco.errors import InputError, TransportError
from disco.runtime import ping

if TYPE_CHECKING:
    from disco.bench.lab.lab import Lab

SIZES = (64, 256, 1024, 4096, 16384, 65536, 1 << 18, 1 << 20, 1 << 22, 1 << 23)
LONGEST_S = 1.0
_LEAST_GAP_S = 0.01  # of computing between exchanges; below TCP's shortest timeout (0.2 s)
_REFILLS = 4.0
_ALWAYS_BYTES = 65536  # well above any bucket: without, there would be no bandwidth to see


def calibrate(
    lab: Lab, *, sizes: Sequence[int] = SIZES, pairs: Iterable[tuple[int, int]] | None = None
) -> Calibration:
    """Measure and fit pairs of an open lab, one after the other."""
    chosen = sorted(set(sizes))
    if len(chosen) < 2 or chosen[0] < ping.HEADER_BYTES or chosen[-1] > ping.LARGEST_BYTES:
        raise InputError(
            f"a calibration takes two or more sizes of {ping.HEADER_BYTES} to {ping.LARGEST_BYTES} "
            f"bytes, not {list(sizes)}"
        )
    if pairs is None and lab.nodes < 2:
        raise InputError("a calibration takes two nodes or more: this lab has one")
    if pairs is None:
        pairs = [(a, b) for a in range(lab.nodes) for b in range(lab.nodes) if a != b]
    gap_s = max([_LEAST_GAP_S, *(_REFILLS * shape.refill_s for shape in lab.shapes)])
    links = tuple(_measure(lab, a, b, chosen, gap_s) for a, b in pairs)
    return Calibration(tuple(map(str, lab.shapes)), lab.cores_note, gap_s * 1e3, links)


def _measure(lab: Lab, source: int, target: int, sizes: list[int], gap_s: float) -> LinkFit:
    if source == target:
        raise InputError(f"a link is between two nodes, not from {source} to itself")
    limits = [lab.shapes[rank].payload_mbit_s for rank in (source, target)]
    limit = min((mbit_s for mbit_s in limits if mbit_s is not None), default=None)
    expected_s = {size: 0.0 if limit is None else size * 8e-6 / limit for size in sizes}
    short = [size for size in sizes if size <= _ALWAYS_BYTES or expected_s[size] <= LONGEST_S]
    longest_s = 2 * max([LONGEST_S, *(expected_s[size] for size in short)])
    repeats = {size: _repeats(expected_s[size]) for size in short}
    trips = _trips(lab, source, target, repeats, gap_s, longest_s)
    trips += [ping.RoundTrips(size, (), expected_s[size]) for size in sizes if size not in short]
    try:
        return fit_link(source, target, trips, limit)
    except ValueError as error:
        raise TransportError(f"calibration of {source} -> {target} failed: {error}") from error


def _trips(
    lab: Lab, source: int, target: int, repeats: dict[int, int], gap_s: float, longest_s: float
) -> list[ping.RoundTrips]:
    program = [*BARE_PYTHON, str(ping.__file__)]
    words = lab.address(target)
    with lab.popen(
        target,
        [*program, "listen", words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as listener:
        try:
            assert listener.stdout is not None
            port = listener.stdout.readline().strip()
            command = [*program, "connect", words, port]
            command += ["--sizes", ",".join(map(str, repeats))]
            command += ["--repeats", ",".join(map(str, repeats.values()))]
            command += ["--gap-s", str(gap_s), "--longest-s", str(longest_s)]
            done = lab.run(source, command)
        finally:
            listener.kill()
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TransportError(f"calibration of {source} -> {target} failed: {last}")
    return [
        ping.RoundTrips(row["bytes"], tuple(row["seconds"]), row["expected_s"])
        for row in json.loads(done.stdout)
    ]


def _repeats(expected_s: float) -> int:
    """Fewer of what takes long, which varies little."""
    return max(3, min(15, int(1.0 / max(expected_s, 1e-3))))
