"""Times of work on a CUDA device, without the time that the CPU takes to launch it."""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from disco.bench.machine import describe_machine

_WARM_UP = 3


def as_graph(run: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """So many calls, captured after a warm-up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph


def replay_ms(
    graphs: Sequence[torch.cuda.CUDAGraph], rounds: int, calls: int = 1
) -> list[list[float]]:
    """Milliseconds a call: per graph, of every round. The graphs take turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for graph in graphs:
        graph.replay()
    for _ in range(rounds):
        for graph, measured in zip(graphs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            measured.append(begin.elapsed_time(end) / calls)
    return times


def median_ms(run: Callable[[], object], calls: int = 10, rounds: int = 5) -> float:
    """Median milliseconds a call of ``run``, by replays of a graph of ``calls`` of them."""
    return statistics.median(replay_ms([as_graph(run, calls)], rounds, calls)[0])


def copy_gb_s() -> float:
    """Bytes read and written a second by a large copy."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_ms(lambda: y.copy_(x), calls=3) / 1e6


def describe_gpu() -> dict[str, Any]:
    """`describe_machine` with the GPU, its driver and the command as it was given."""
    machine = describe_machine("triton", "cupy-cuda13x", "timm")
    properties = torch.cuda.get_device_properties(0)
    machine["gpu"] = properties.name
    machine["multiprocessors"] = properties.multi_processor_count
    machine["cuda"] = torch.version.cuda
    module = Path(sys.argv[0]).stem
    arguments = ["FILE" if before == "--json" else word for before, word in pairwise(sys.argv)]
    machine["command"] = shlex.join(["python", "-m", f"benchmarks.{module}", *arguments])
    return machine
