"""Layers for the convolution on Hopper's tensor cores, and their check against float64."""

from __future__ import annotations

import torch
from torch import Tensor

import disco_kernels as dk
from disco_kernels.cuda.conv2d_sm90 import Conv2dSm90
from tests.kernels import oracle
from tests.kernels.cases import image, in_dtype, seed
from tests.triton.test_kernels import check

# kernel, stride, padding, dilation
WINDOWS = (
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((3, 3), (2, 2), (0, 1), (2, 1)),
    ((5, 3), (1, 1), (2, 0), (1, 1)),
    ((2, 4), (2, 2), (1, 2), (1, 1)),
    ((3, 3), (1, 1), (0, 0), (1, 1)),
)
# Owned outputs, owned inputs, and per pair of nodes what the first reads of the second's, as runs.
Runs = tuple[tuple[int, int], ...]
NODES: tuple[tuple[tuple[tuple[int, ...], ...], dict[tuple[int, int], Runs]], ...] = (
    (((64,), (128,)), {}),
    (((136, 72), (64, 64)), {(0, 1): ((72, 80),), (1, 0): ((8, 24),)}),
    (((32, 40), (40, 8)), {(1, 0): ((0, 40),)}),
    (
        ((8, 64, 24), (72, 16, 8)),
        {(0, 1): ((72, 80),), (2, 0): ((24, 32),), (2, 1): ((80, 88),)},
    ),
    (((64, 40), (24, 376)), {(0, 1): tuple((c, c + 8) for c in range(32, 384, 16))}),
)
Map = tuple[int, int, int]  # images, height, width


def owned(sizes: tuple[int, ...]) -> dk.Ownership:
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    runs = zip(begins, sizes, strict=True)
    return dk.Ownership(tuple(tuple(range(b, b + n)) for b, n in runs))


def make(
    nodes: int, window: int, dtype: torch.dtype, device: str, activation: str = "relu"
) -> tuple[dk.GatherConv2d, Tensor, Tensor, dk.ConvSpec]:
    """A layer, its dense weight and its bias."""
    (outputs, inputs), read = NODES[nodes]
    out, own = owned(outputs), owned(inputs)
    selected = tuple(
        tuple(
            tuple(c for run in read.get((i, j), ()) for c in range(*run))
            for j in range(len(inputs))
        )
        for i in range(len(outputs))
    )
    mask = oracle.on_pattern(torch.empty(sum(outputs), sum(inputs)), out, own, selected)
    kernel, stride, padding, dilation = WINDOWS[window]
    spec = dk.ConvSpec(kernel, stride, padding, dilation, activation=activation)
    weight = torch.randn(sum(outputs), sum(inputs), *kernel).to(dtype) * mask[:, :, None, None]
    bias = torch.randn(sum(outputs)).to(dtype)
    layer = dk.GatherConv2d(
        weight.to(device), out, own, selected, spec, bias=bias.to(device), backend="triton"
    )
    return layer, weight, bias, spec


def kernel_of(layer: dk.GatherConv2d) -> Conv2dSm90:
    found = layer._prepared.sm90  # type: ignore[attr-defined]
    assert isinstance(found, Conv2dSm90), "the extension was built without nvcc"
    return found


def check_tiles(
    window: int,
    nodes: int,
    size: Map,
    dtype: torch.dtype,
    activation: str,
    with_residual: bool,
    device: str,
) -> int:
    """Every tile that fits the layer, and how many these were."""
    seed(window)
    layer, weight, bias, spec = make(nodes, window, dtype, device, activation)
    images, height, width = size
    x = in_dtype(image("w", images, weight.shape[1], height, width), dtype)
    shape = (images, weight.shape[0], *spec.output_size(height, width))
    residual = in_dtype(image("w", *shape), dtype) if with_residual else None
    expected = oracle.conv2d(x, weight, spec, bias, residual)
    kernel = kernel_of(layer)
    last = torch.channels_last
    given = x.to(device).to(memory_format=last)
    added = None if residual is None else residual.to(device).to(memory_format=last)
    covered = 0
    for tile, name in enumerate(kernel.tiles()):
        out = torch.full(shape, float("nan"), device=device, dtype=dtype).to(memory_format=last)
        used = ([given], layer.packed_weight, None, (out, added))
        assert kernel.takes(*used), (WINDOWS[window], size)
        fits = kernel.takes(*used, tile)
        try:
            kernel.run([given], layer.packed_weight, bias.to(device), added, out, tile)
        except ValueError as error:
            assert "shared memory" in str(error) and not fits  # of the largest tiles
            continue
        assert fits
        check(out, expected, dtype, (name, WINDOWS[window], size, nodes))
        covered += 1
    return covered
