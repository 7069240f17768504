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
from benchmarks.rates import record, relative_error
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


def _fused(
    shape: ConvShape,
    pattern: dk.LayerPattern,
    weight: Tensor,
    bias: Tensor,
    winograd: str = "off",
    input_bytes: dk.InputBytes | None = None,
) -> dk.GatherConv2d:
    pair = (shape.kernel, shape.kernel)
    stride, padding = (shape.stride, shape.stride), (shape.padding, shape.padding)
    return dk.GatherConv2d(
        weight,
        pattern.out_ownership,
        pattern.in_ownership,
        pattern.selected,
        dk.ConvSpec(pair, stride, padding, (1, 1), "relu", winograd, input_bytes),
        bias=bias,
        backend="cpu",
    )


def layer(
    shape: ConvShape, dtype: torch.dtype = torch.float32
) -> tuple[dk.LayerPattern, Tensor, Tensor, Tensor, Tensor]:
    """Pattern, weight (zero outside of it), bias, input in channels-last, exact output."""
    torch.manual_seed(0)
    pattern = _pattern(shape)
    weight = torch.randn(shape.out_channels, shape.in_channels, shape.kernel, shape.kernel)
    for i, outputs in enumerate(pattern.out_ownership.channels):
        unread = sorted(set(range(shape.in_channels)) - set(pattern.input_channels(i)))
        weight[outputs[0] : outputs[-1] + 1, unread] = 0
    bias = torch.randn(shape.out_channels)
    x = torch.randn(1, shape.in_channels, shape.size, shape.size)
    weight, bias, x = weight.to(dtype), bias.to(dtype), x.to(dtype)
    x = x.to(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), shape.stride, shape.padding)
    return pattern, weight, bias, x, F.relu(exact)


def flops_of(shape: ConvShape, pattern: dk.LayerPattern) -> int:
    """Of the layer with its zeros left out, in direct convolution."""
    multiply_adds = sum(
        len(outputs) * len(pattern.input_channels(i))
        for i, outputs in enumerate(pattern.out_ownership.channels)
    )
    return 2 * multiply_adds * shape.kernel**2 * shape.out_size**2


def bound(kernel: dk.GatherConv2d, x: Tensor) -> tuple[Callable[[], None], Tensor]:
    """The call as a compiled model makes it, and where it writes."""
    out = kernel(x)
    return kernel.bind(x, None, out), out


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
    pattern, weight, bias, x, exact = layer(shape)
    with torch.inference_mode():
        if side == "fused":
            run, out = bound(_fused(shape, pattern, weight, bias), x)
            benchmark(run)
        else:
            out = benchmark(_unfused(shape, pattern, weight, bias), x)
    error = relative_error(out, exact)
    assert error < 1e-5
    record(benchmark, flops_of(shape, pattern), error)


@pytest.mark.parametrize("shape", resnet50_shapes(), ids=str)
def test_gather_conv2d_bfloat16(benchmark: Any, shape: ConvShape) -> None:
    benchmark.group = f"gather_conv2d {shape}"
    pattern, weight, bias, x, exact = layer(shape, torch.bfloat16)
    with torch.inference_mode():
        run, out = bound(_fused(shape, pattern, weight, bias), x)
        benchmark(run)
    error = relative_error(out, exact)
    assert error < 2**-7
    record(benchmark, flops_of(shape, pattern), error, torch.bfloat16)


@pytest.mark.parametrize("shape", resnet50_shapes(), ids=str)
def test_gather_conv2d_int8(benchmark: Any, shape: ConvShape) -> None:
    """Bfloat16 in and out; making the inputs bytes is part of the time."""
    benchmark.group = f"gather_conv2d {shape}"
    pattern, weight, bias, x, exact = layer(shape, torch.bfloat16)
    given = dk.InputBytes.of_range(float(x.min()), float(x.max()))
    with torch.inference_mode():
        run, out = bound(_fused(shape, pattern, weight, bias, input_bytes=given), x)
        benchmark(run)
    error = relative_error(out, exact)
    assert error < 2**-5
    record(benchmark, flops_of(shape, pattern), error, torch.int8)
