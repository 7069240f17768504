"""Convolutions on Hopper's tensor cores against float64, every tile of the kernel."""

from __future__ import annotations

import pytest
import torch

import disco_kernels as dk
from disco_kernels.cuda.tuned import TUNED
from tests.cuda.conv2d_cases import NODES, WINDOWS, check_tiles, kernel_of, owned
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

MAPS = ((3, 7, 7), (1, 56, 56), (5, 14, 14), (2, 9, 30))  # images, height, width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", range(len(WINDOWS)))
def test_every_tile(window: int, dtype: torch.dtype) -> None:
    covered = 0
    for number, size in enumerate(MAPS):
        nodes, activation = (
            (number + window) % (len(NODES) - 1),
            ("relu", "none", "gelu")[number % 3],
        )
        covered += check_tiles(window, nodes, size, dtype, activation, number != 1, "cuda")
    assert covered >= 3 * len(MAPS)


def test_many_runs() -> None:
    """Single groups of 8 channels, 22 of them, beside what the node owns itself."""
    assert check_tiles(0, len(NODES) - 1, (2, 5, 9), torch.bfloat16, "gelu", True, "cuda") >= 3


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


def test_a_layer_of_the_table_takes_it_also_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
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
    y = torch.empty_like(x)
    sizes = {x[:1, 0].numel(): None, x[:, 0].numel(): "256x64/1"}
    monkeypatch.setitem(TUNED, tuple(layer._prepared.key), sizes)  # type: ignore[attr-defined]
    layer(x[:1], None, y[:1])
    assert layer.last_kernel == "triton"
    layer(x, None, y)
    assert layer.last_kernel == "sm90 256x64/1"
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, None, y)
    y.fill_(float("nan"))
    x.copy_(torch.randn_like(x))
    graph.replay()
    check(y[:2], oracle.conv2d(x[:2].cpu(), weight, spec, bias.bfloat16()), torch.bfloat16, "")
    assert bool(y.isfinite().all())
