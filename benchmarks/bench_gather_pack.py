"""`gather_pack` against the speed of memory, and against the unfused composition.

    python -m benchmarks.bench_gather_pack --threads 1 --json FILE

prints a row a case. A case's GB/s are the cache lines of the activation that hold a selected
channel plus the bytes of the messages, over the median time of `GatherPack`'s call from Python.
Beside it:

- *of copy*: that over the rate of a large ``memcpy`` (205 MB, bytes read plus bytes written) on as
  many threads, timed between the case's own calls.
- *read*: the rate at which a loop that does nothing else reads those lines. Where fewer than all
  lines of a pixel are touched, memory gives them more slowly than a copy, which reads in order.
- *unfused*: ``x.index_select(1, index)`` and ``contiguous`` for each destination, in float32.
- *rows*: the fastest that plain torch was found to offer for the same: ``index_select`` of the
  activation as a matrix ``[pixels, channels]``, for each destination, in float32.
- *exact*: whether every message is what its wire dtype says (bits; int8 within half a step).

*cached* cases repeat one image; *memory* cases are batches of 205 MB. Under pytest-benchmark
(``make bench``) the cached ones with one destination run, fused and unfused in a group.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import disco_kernels as dk
from disco.bench.machine import describe_machine
from disco_kernels.backends.cpu import extension_status

LARGE_BYTES = 205 << 20
MAPS = ((256, 56), (512, 28), (1024, 14), (2048, 7))
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
WIRES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class Case:
    """``destinations`` random selections of a channels-last activation, sorted."""

    batch: int
    channels: int
    size: int
    density: float
    destinations: int
    wire: str = "float32"

    def __str__(self) -> str:
        shape = f"[{self.batch},{self.channels},{self.size},{self.size}]"
        return f"{shape} d={self.density} x{self.destinations} {self.wire}"

    @property
    def pixels(self) -> int:
        return self.batch * self.size * self.size

    def activation(self) -> Tensor:
        x = torch.randn(self.batch, self.channels, self.size, self.size)
        return x.to(memory_format=torch.channels_last)

    def index(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        count = int(self.density * self.channels)
        return [
            torch.randperm(self.channels, generator=generator)[:count].sort().values
            for _ in range(self.destinations)
        ]

    def lines(self) -> list[int]:
        """Where the touched cache lines of a pixel begin, in floats."""
        return sorted({16 * (int(c) // 16) for listed in self.index() for c in listed})

    def num_bytes(self) -> int:
        shape = (self.batch, self.size, self.size)
        wire = WIRES[self.wire]
        elements = sum(dk.message_numel(wire, shape, len(listed)) for listed in self.index())
        return 64 * len(self.lines()) * self.pixels + elements * wire.itemsize


@dataclass(frozen=True)
class Row:
    """What was measured of one case; rates in GB/s, times in microseconds (medians)."""

    case: str
    memory: str
    threads: int
    lines: str
    gather_us: float
    gather_us_p10: float
    gather_us_p90: float
    gb_per_s: float
    copy_gb_per_s: float
    of_copy: float
    read_gb_per_s: float
    unfused_us: float
    rows_us: float
    exact: bool


def fused(case: Case, x: Tensor) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    pack = dk.GatherPack(case.index(), "cpu", wire_dtype=WIRES[case.wire])
    out = pack(x)
    return (lambda: pack(x, out)), out


def unfused(case: Case, x: Tensor) -> Callable[[], list[Tensor]]:
    index = case.index()
    return lambda: [x.index_select(1, one).permute(0, 2, 3, 1).contiguous() for one in index]


def from_rows(case: Case, x: Tensor) -> Callable[[], list[Tensor]]:
    index = case.index()
    rows = x.permute(0, 2, 3, 1).view(case.pixels, case.channels)
    return lambda: [rows.index_select(1, one) for one in index]


def is_exact(case: Case, x: Tensor, out: list[Tensor]) -> bool:
    for listed, message in zip(case.index(), out, strict=True):
        wanted = x[:, listed].permute(0, 2, 3, 1)
        values, scale = dk.message_views(message, wanted.shape[:-1], len(listed))
        if scale is None:
            good = torch.equal(values, wanted.to(values.dtype))
        else:
            step = scale[:, None, None]
            good = bool(((values * step - wanted).abs() <= 0.5001 * step).all())
        if not good:
            return False
    return True


class Copy:
    """A large memcpy on some threads."""

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads)
        self.source = torch.ones(LARGE_BYTES, dtype=torch.uint8)
        self.target = torch.ones(LARGE_BYTES, dtype=torch.uint8)
        self.threads = threads

    def __call__(self) -> None:
        part = LARGE_BYTES // self.threads
        to, start = self.target.data_ptr(), self.source.data_ptr()
        offsets = range(0, part * self.threads, part)
        list(self.pool.map(lambda at: ctypes.memmove(to + at, start + at, part), offsets))


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(case: Case, copy: Copy, rounds: int, calls: int) -> Row:
    """The sides take turns: in each round a copy, then every side, first untimed, then timed."""
    from disco_kernels import _C

    x = case.activation()
    gather, out = fused(case, x)
    compose, select = unfused(case, x), from_rows(case, x)
    lines, threads = case.lines(), copy.threads

    def read() -> float:
        return _C.read_lines(x.data_ptr(), case.channels, case.pixels, lines, threads)

    times: dict[str, list[float]] = {name: [] for name in ("copy", "gather", "read", "rows")}
    for _ in range(rounds):
        times["copy"].append(seconds(copy))
        for name, call in (("gather", gather), ("read", read), ("rows", select)):
            call()
            times[name] += [seconds(call) for _ in range(calls)]
    # Last, and seldom: it takes up to a hundred times as long.
    times["unfused"] = [seconds(compose) for _ in range(1 if case.batch > 1 else 5)]
    median = {name: statistics.median(values) for name, values in times.items()}
    low, *_, high = statistics.quantiles(times["gather"], n=10)
    rate = case.num_bytes() / median["gather"] / 1e9
    copy_rate = 2 * LARGE_BYTES / median["copy"] / 1e9
    return Row(
        str(case),
        "cached" if case.batch == 1 else "memory",
        threads,
        f"{len(lines)}/{math.ceil(case.channels / 16)}",
        round(1e6 * median["gather"], 1),
        round(1e6 * low, 1),
        round(1e6 * high, 1),
        round(rate, 1),
        round(copy_rate, 1),
        round(rate / copy_rate, 2),
        round(64 * len(lines) * case.pixels / median["read"] / 1e9, 1),
        round(1e6 * median["unfused"], 1),
        round(1e6 * median["rows"], 1),
        is_exact(case, x, out),
    )


def cases(wires: list[str], memory: list[str], destinations: list[int]) -> Iterator[Case]:
    for where, (channels, size), density, number, wire in itertools.product(
        memory, MAPS, DENSITIES, destinations, wires
    ):
        batch = 1 if where == "cached" else LARGE_BYTES // (4 * channels * size * size)
        yield Case(batch, channels, size, density, number, wire)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wires", nargs="+", choices=list(WIRES), default=["float32"])
    parser.add_argument(
        "--memory", nargs="+", choices=["cached", "memory"], default=["cached", "memory"]
    )
    parser.add_argument("--destinations", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command = shlex.join(["python", "-m", "benchmarks.bench_gather_pack", *sys.argv[1:]])
    machine = {**describe_machine(), "command": command, "isa": extension_status().isa}
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    print(
        f"\n{'case':36} {'lines':>8} {'us':>9} {'GB/s':>7} {'copy':>6} {'of copy':>8} "
        f"{'read':>6} {'unfused us':>11} {'rows us':>9}  exact"
    )
    copy, rows = Copy(options.threads), []
    with torch.inference_mode():
        for case in cases(options.wires, options.memory, options.destinations):
            row = measure(case, copy, options.rounds, 20 if case.batch == 1 else 2)
            rows.append(row)
            print(
                f"{row.case:36} {row.lines:>8} {row.gather_us:9.1f} {row.gb_per_s:7.1f} "
                f"{row.copy_gb_per_s:6.1f} {row.of_copy:8.2f} {row.read_gb_per_s:6.1f} "
                f"{row.unfused_us:11.1f} {row.rows_us:9.1f}  {'yes' if row.exact else 'NO'}",
                flush=True,
            )
    if options.json is not None:
        listed = ",\n".join(json.dumps(asdict(row)) for row in rows)
        text = f'{{"machine": {json.dumps(machine)},\n"rows": [\n{listed}\n]}}\n'
        options.json.write_text(text, encoding="utf-8")
    if not all(row.exact for row in rows):
        raise SystemExit("a message is not what its wire dtype says")


SIDES = {"fused": None, "unfused": unfused, "rows": from_rows}


@pytest.mark.parametrize("side", list(SIDES))
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("channels", "size"), MAPS)
def test_gather_pack(benchmark: Any, channels: int, size: int, density: float, side: str) -> None:
    case = Case(1, channels, size, density, 1)
    benchmark.group = f"gather_pack {case}"
    x = case.activation()
    with torch.inference_mode():
        run, out = fused(case, x)
        assert is_exact(case, x, out)
        other = SIDES[side]
        benchmark.pedantic(run if other is None else other(case, x), rounds=50, warmup_rounds=5)
    if benchmark.stats is not None:
        rate = case.num_bytes() / benchmark.stats["median"] / 1e9
        benchmark.extra_info["gb_per_s"] = round(rate, 1)
    benchmark.extra_info["threads"] = torch.get_num_threads()


if __name__ == "__main__":
    main()
