"""`gather_conv2d` against the unfused composition, layer by layer.

Both sides compute the same layer for two virtual nodes at density 0.2. The composition is what
plain torch offers: per node ``index_select`` and ``conv2d``, then ``cat``; ReLU apart.
Run with ``make bench``; the rows of one shape are a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import disco_kernels as dk
from benchmarks.shapes import ConvShape, resnet50_shapes

NODES = 2
DENSITY = 0.2


def _pattern(shape: ConvShape) -> dk.LayerPattern:
    inputs = dk.Ownership.contiguous(shape.in_channels, NODES)
    outputs = dk.Ownership.contiguous(shape.out_channels, NODES)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(NODES):
        row = []
        for j, owned in enumerate(inputs.channels):
            order = torch.randperm(len(owned), generator=generator)[: int(DENSITY * len(owned))]
            row.append(() if i == j else tuple(owned[k] for k in sorted(order.tolist())))
        rows.append(tuple(row))
    return dk.LayerPattern(outputs, inputs, tuple(rows))


def _fused(shape: ConvShape, pattern: dk.LayerPattern, weight: Tensor, bias: Tensor) -> Callable:
    spec = dk.ConvSpec(
        (shape.kernel, shape.kernel),
        (shape.stride, shape.stride),
        (shape.padding, shape.padding),
        (1, 1),
        "relu",
    )
    return dk.GatherConv2d(
        weight,
        pattern.out_ownership,
        pattern.in_ownership,
        pattern.selected,
        spec,
        bias=bias,
        backend="cpu",
    )


def _unfused(shape: ConvShape, pattern: dk.LayerPattern, weight: Tensor, bias: Tensor) -> Callable:
    nodes = []
    for rank, outputs in enumerate(pattern.out_ownership.channels):
        index = torch.tensor(pattern.input_channels(rank))
        part = weight[list(outputs)][:, index].contiguous(memory_format=torch.channels_last)
        nodes.append((index, part, bias[list(outputs)]))

    def run(x: Tensor) -> Tensor:
        parts = [
            F.conv2d(x.index_select(1, index), part, b, shape.stride, shape.padding)
            for index, part, b in nodes
        ]
        return F.relu_(torch.cat(parts, dim=1))

    return run


@pytest.mark.parametrize("side", ["fused", "unfused"])
@pytest.mark.parametrize("shape", resnet50_shapes(), ids=str)
def test_gather_conv2d(benchmark: Any, shape: ConvShape, side: str) -> None:
    benchmark.group = f"gather_conv2d {shape}"
    torch.manual_seed(0)
    pattern = _pattern(shape)
    weight = torch.randn(shape.out_channels, shape.in_channels, shape.kernel, shape.kernel)
    for i, outputs in enumerate(pattern.out_ownership.channels):
        unread = sorted(set(range(shape.in_channels)) - set(pattern.input_channels(i)))
        weight[outputs[0] : outputs[-1] + 1, unread] = 0
    bias = torch.randn(shape.out_channels)
    x = torch.randn(1, shape.in_channels, shape.size, shape.size)
    x = x.to(memory_format=torch.channels_last)
    run = (_fused if side == "fused" else _unfused)(shape, pattern, weight, bias)
    expected = F.relu(
        F.conv2d(x.double(), weight.double(), bias.double(), shape.stride, shape.padding)
    )
    with torch.inference_mode():
        error = float((run(x).double() - expected).abs().max() / expected.abs().max())
        benchmark(run, x)
    assert error < 1e-5
    multiply_adds = sum(
        len(outputs) * len(pattern.input_channels(i))
        for i, outputs in enumerate(pattern.out_ownership.channels)
    )
    flops = 2 * multiply_adds * shape.kernel**2 * shape.out_size**2
    if benchmark.stats is not None:
        benchmark.extra_info["gflop_per_s"] = round(flops / benchmark.stats["median"] / 1e9, 1)
    benchmark.extra_info["max_relative_error"] = error
    benchmark.extra_info["threads"] = torch.get_num_threads()
