"""A rank's convolution that writes its messages itself, against `GatherPack` over its output.

ResNet-50's layers as one of two ranks has them, a fifth of the outputs sent to the other rank. One
row a layer and wire dtype: the three ways take turns, and the row's columns are their medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import disco_kernels as dk
from benchmarks.shapes import ConvShape, resnet50_shapes

DENSITY, ROUNDS, CALLS = 0.2, 60, 5


def _turns(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of every way in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, call in ways.items():
            call()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - begin) / CALLS)
    return {name: round(1e6 * statistics.median(found), 2) for name, found in times.items()}


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", resnet50_shapes(), ids=str)
def test_fused_pack(benchmark: Any, shape: ConvShape, wire: torch.dtype) -> None:
    benchmark.group = f"fused_pack {shape}"
    torch.manual_seed(0)
    outputs = shape.out_channels // 2
    read = int(shape.in_channels * (1 + DENSITY) / 2)
    weight = torch.randn(outputs, read, shape.kernel, shape.kernel) / read**0.5
    x = torch.randn(1, read, shape.size, shape.size).to(memory_format=torch.channels_last)
    sent = torch.randperm(outputs)[: int(DENSITY * outputs)].sort().values
    pack = dk.GatherPack([sent], "cpu", wire_dtype=wire)
    pair = (shape.kernel, shape.kernel)
    spec = dk.ConvSpec(
        pair, (shape.stride,) * 2, (shape.padding,) * 2, activation="relu", winograd="off"
    )
    kernel = dk.PartialConv2d(weight, (read,), spec, backend="cpu", pack=pack)
    with torch.inference_mode():
        out = kernel([x])
        leading = (1, *out.shape[2:])
        fused, separate = (pack.empty_messages(leading, torch.float32) for _ in range(2))
        alone = kernel.bind([x], None, out)
        packing = kernel.bind([x], None, out, fused)
        pack(out, separate)
        assert all(torch.equal(a, b) for a, b in zip(fused, separate, strict=True))

        def one_after_the_other() -> None:
            alone()
            pack(out, separate)

        found = _turns({"convolution": alone, "fused": packing, "separate": one_after_the_other})
        benchmark.pedantic(packing, rounds=20, iterations=CALLS)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["median_us"] = found
    for way in ("fused", "separate"):
        benchmark.extra_info[f"{way}_adds"] = round(found[way] / found["convolution"] - 1, 3)
