"""How much of a rank's pass is neither a kernel's nor the transport's: the executor's own time.

    python -m benchmarks.executor_overhead --json FILE

One rank's program of ResNet-50 on two nodes, one thread, batch 1, with payloads that are there
before anybody asks (`benchmarks.no_network`). A pass's time less the time inside kernels
(convolutions, packing, pooling; the call from Python is the kernel's) is the executor's. Watching
the kernels takes two clock readings a call, which count as the executor's; what they cost is told
by passes that are not watched, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import disco
from benchmarks.no_network import NoNetwork
from disco.bench.machine import describe_machine
from disco.executor import Executor
from disco.zoo import build_model
from disco_kernels.backends import cpu

NODES = 2
_WARM_UP = 5


class Watch:
    """Time spent inside what it wrapped, while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.ns = 0
        self.calls = 0

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            begin = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.ns += time.perf_counter_ns() - begin
                self.calls += 1

        return watched

    def binding(self, bind: Callable[..., Callable[[], None]]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.over(bind(*args, **kwargs))


@contextmanager
def watching() -> Iterator[Watch]:
    """Kernels that are bound in here are watched."""
    watch = Watch()
    bound = ((cpu._CpuConv2d, "bind_part"), (cpu._CpuGatherPack, "bind"))
    bound += ((cpu.CpuBackend, "global_avg_pool2d_"),)
    called = ((cpu._CpuConv2d, "run"), (cpu._CpuGatherPack, "run"), (cpu.CpuBackend, "max_pool2d_"))
    patches = [mock.patch.object(o, n, watch.binding(getattr(o, n))) for o, n in bound]
    patches += [mock.patch.object(o, n, watch.over(getattr(o, n))) for o, n in called]
    for patch in patches:
        patch.start()
    try:
        yield watch
    finally:
        for patch in patches:
            patch.stop()


def measure(executor: Executor, x: Tensor, watch: Watch, passes: int) -> dict[str, Any]:
    """Medians over passes, watched and not in turns."""
    totals: dict[bool, list[float]] = {True: [], False: []}
    shares, kernels = [], []
    for number in range(2 * passes + _WARM_UP):
        watch.on, watch.ns, watch.calls = number % 2 == 0, 0, 0
        begin = time.perf_counter_ns()
        executor(x)
        total = time.perf_counter_ns() - begin
        if number < _WARM_UP:
            continue
        totals[watch.on].append(total / 1e6)
        if watch.on:
            shares.append(1 - watch.ns / total)
            kernels.append(watch.ns / 1e6)
            calls = watch.calls
    watch.on = False
    return {
        "pass_ms": statistics.median(totals[False]),
        "watched_pass_ms": statistics.median(totals[True]),
        "kernels_ms": statistics.median(kernels),
        "kernel_calls": calls,
        "overhead": statistics.median(shares),
        "overhead_most": max(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--passes", type=int, default=40)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model("torchvision", args.model)
    example = (torch.randn(2, 3, args.image_size, args.image_size),)
    disco.sparsify_(model, NODES, args.density, example)
    x = example[0][:1].clone()
    rows = []
    for wire in (None, torch.int8):
        parts = disco.partition(model, example, NODES, wire_dtype=wire)
        for overlap in (True, False):
            part, transport = parts.ranks[0], NoNetwork(0, NODES)
            with watching() as watch:
                executor = Executor(part.program, part.weights, transport, overlap=overlap)
                row = measure(executor, x, watch, args.passes)
            row = {"wire_dtype": str(wire or torch.float32), "overlap": overlap, **row}
            rows.append(row)
            print(
                f"{row['wire_dtype']}, overlap {overlap}: a pass {row['pass_ms']:.2f} ms, kernels "
                f"{row['kernels_ms']:.2f} ms in {row['kernel_calls']} calls, the executor "
                f"{100 * row['overhead']:.1f}% (at most {100 * row['overhead_most']:.1f}%)"
            )
    if args.json:
        machine = describe_machine()
        machine["command"] = "python -m benchmarks.executor_overhead --json FILE"
        content = {"machine": machine, "model": args.model, "rows": rows}
        with open(args.json, "w") as file:
            json.dump(content, file)


if __name__ == "__main__":
    main()
