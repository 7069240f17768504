"""Convolutions on Hopper's tensor cores against float64, every tile of the kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import disco_kernels as dk
from disco_kernels.cuda.conv2d_sm90 import Conv2dSm90
from tests.kernels import oracle
from tests.kernels.cases import image, in_dtype, seed
from tests.triton.device import DEVICE
from tests.triton.test_kernels import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE != "cuda" or torch.cuda.get_device_capability() != (9, 0),
        reason="no GPU of compute capability 9.0",
    ),
]

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
# images, height, width
MAPS = ((3, 7, 7), (1, 56, 56), (5, 14, 14), (2, 9, 30))
# owned outputs, owned inputs, and what each node reads of the others'
NODES = (
    (((64,), (128,)), {}),
    (((136, 72), (64, 64)), {(0, 1): (72, 80), (1, 0): (8, 24)}),
    (((32, 40), (40, 8)), {(1, 0): (0, 40)}),
    (((8, 64, 24), (72, 16, 8)), {(0, 1): (72, 80), (2, 0): (24, 32), (2, 1): (80, 88)}),
)


def owned(sizes: tuple[int, ...]) -> dk.Ownership:
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    runs = zip(begins, sizes, strict=True)
    return dk.Ownership(tuple(tuple(range(b, b + n)) for b, n in runs))


def make(
    nodes: int, window: int, dtype: torch.dtype, activation: str = "relu"
) -> tuple[dk.GatherConv2d, Tensor, Tensor, dk.ConvSpec]:
    """A layer, its dense weight and its bias."""
    (outputs, inputs), read = NODES[nodes]
    out, own = owned(outputs), owned(inputs)
    selected = tuple(
        tuple(tuple(range(*read.get((i, j), (0, 0)))) for j in range(len(inputs)))
        for i in range(len(outputs))
    )
    mask = oracle.on_pattern(torch.empty(sum(outputs), sum(inputs)), out, own, selected)
    kernel, stride, padding, dilation = WINDOWS[window]
    spec = dk.ConvSpec(kernel, stride, padding, dilation, activation=activation)
    weight = torch.randn(sum(outputs), sum(inputs), *kernel).to(dtype) * mask[:, :, None, None]
    bias = torch.randn(sum(outputs)).to(dtype)
    layer = dk.GatherConv2d(weight.cuda(), out, own, selected, spec, bias=bias.cuda())
    return layer, weight, bias, spec


def kernel_of(layer: dk.GatherConv2d) -> Conv2dSm90:
    found = layer._prepared.sm90  # type: ignore[attr-defined]
    assert isinstance(found, Conv2dSm90), "the extension was built without nvcc"
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", range(len(WINDOWS)))
def test_every_tile(window: int, dtype: torch.dtype) -> None:
    covered = 0
    for number, (images, height, width) in enumerate(MAPS):
        nodes = (number + window) % len(NODES)
        seed(number)
        layer, weight, bias, spec = make(nodes, window, dtype, ("relu", "none", "gelu")[number % 3])
        x = in_dtype(image("w", images, weight.shape[1], height, width), dtype)
        shape = (images, weight.shape[0], *spec.output_size(height, width))
        residual = in_dtype(image("w", *shape), dtype) if number != 1 else None
        expected = oracle.conv2d(x, weight, spec, bias, residual)
        kernel = kernel_of(layer)
        given = x.cuda().to(memory_format=torch.channels_last)
        added = None if residual is None else residual.cuda()
        added = None if added is None else added.to(memory_format=torch.channels_last)
        for tile, name in enumerate(kernel.tiles()):
            out = torch.full(shape, float("nan"), device="cuda", dtype=dtype)
            out = out.to(memory_format=torch.channels_last)
            assert kernel.takes([given], layer.packed_weight, None, (out, added)), (
                WINDOWS[window],
                MAPS[number],
            )
            try:
                kernel.run([given], layer.packed_weight, bias.cuda(), added, out, tile)
            except ValueError as error:
                assert "shared memory" in str(error)  # of the largest tiles
                continue
            check(out, expected, dtype, (name, WINDOWS[window], MAPS[number], nodes))
            covered += 1
    assert covered >= 3 * len(MAPS)


def test_what_is_not_read_does_not_show() -> None:
    seed(0)
    x = in_dtype(image("w", 2, 64, 9, 9), torch.bfloat16)
    weight = torch.randn(32, 40, 3, 3).bfloat16()
    spec = dk.ConvSpec((3, 3), padding=(1, 1))
    layer = dk.PartialConv2d(
        weight.cuda(), (40,), spec, index=[torch.arange(8, 48)], backend="triton"
    )
    expected = oracle.conv2d(x[:, 8:48], weight, spec)
    given = x.cuda().to(memory_format=torch.channels_last)
    given[:, :8] = float("nan")
    given[:, 48:] = float("inf")
    kernel = kernel_of(layer)  # type: ignore[arg-type]
    out = torch.empty(2, 32, 9, 9, device="cuda", dtype=torch.bfloat16)
    out = out.to(memory_format=torch.channels_last)
    assert kernel.takes([given], layer.packed_weight, None, (out,))
    kernel.run([given], layer.packed_weight, None, None, out)
    check(out, expected, torch.bfloat16, "")


def test_a_layer_of_the_table_takes_it_also_in_a_graph() -> None:
    seed(0)
    own = owned((32, 32))
    spec = dk.ConvSpec((3, 3), padding=(1, 1), activation="relu")
    mask = oracle.on_pattern(torch.empty(64, 64), own, own, (((), ()), ((), ())))
    weight, bias = torch.randn(64, 64, 3, 3).bfloat16() * mask[:, :, None, None], torch.randn(64)
    layer = dk.GatherConv2d(
        weight.cuda(), own, own, (((), ()), ((), ())), spec, bias=bias.bfloat16().cuda()
    )
    x = torch.randn(128, 64, 56, 56, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    prepared, y = layer._prepared, torch.empty_like(x)
    given = (layer.packed_weight, None, None, None)
    assert prepared._sm90_tile([x], *given, y, False, None) is not None  # type: ignore[attr-defined]
    few = prepared._sm90_tile([x[:1]], *given, y[:1], False, None)  # type: ignore[attr-defined]
    assert few is None
    layer(x, None, y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, None, y)
    y.fill_(float("nan"))
    x.copy_(torch.randn_like(x))
    graph.replay()
    check(y[:2], oracle.conv2d(x[:2].cpu(), weight, spec, bias.bfloat16()), torch.bfloat16, "")
    assert bool(y.isfinite().all())
