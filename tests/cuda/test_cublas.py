"""Layers as one dense product by cuBLASLt on a GPU, against float64; see test_dense_product.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from disco_kernels.cuda import choice, cublas_lt
from disco_kernels.cuda.tuned import TUNED
from disco_kernels.triton.launch import TritonConv2d
from tests.cuda.conv2d_cases import NODES, make
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
LAST = torch.channels_last
MAPS = ((3, 7, 7), (1, 1, 1), (16, 28, 28))  # images, height, width


def maps(channels: int, size: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    x = in_dtype(image("w", size[0], channels, *size[1:]), dtype)
    return x.cuda().to(memory_format=LAST)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had been measured to be faster for every layer of one pixel."""
    assert cublas_lt.library() is not None, "torch's own cuBLASLt was not found"
    for nodes in range(len(NODES)):
        prepared = make(nodes, 0, torch.bfloat16, "cuda")[0]._prepared
        assert isinstance(prepared, TritonConv2d)
        monkeypatch.setitem(TUNED, tuple(prepared.key), {1: choice.CUBLAS})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nodes", range(len(NODES)))
def test_every_node_at_once(nodes: int, dtype: torch.dtype) -> None:
    for number, size in enumerate(MAPS):
        for activation in ("none", "relu"):
            seed(nodes)
            layer, weight, bias, spec = make(nodes, 0, dtype, "cuda", activation)
            x = maps(weight.shape[1], size, dtype)
            residual = maps(weight.shape[0], size, dtype) if number != 1 else None
            expected = oracle.conv2d(
                x.cpu(), weight, spec, bias, None if residual is None else residual.cpu()
            )
            y = layer(x, residual)
            assert layer.last_kernel == "cublas"
            check(y, expected, dtype, (size, activation))
            if residual is not None:
                assert layer(x, residual, residual) is residual, "in place"
                check(residual, expected, dtype, (size, activation))


def test_on_streams_and_in_a_graph() -> None:
    seed(0)
    layer, weight, bias, spec = make(1, 0, torch.bfloat16, "cuda")
    x, y = maps(weight.shape[1], MAPS[0], torch.bfloat16), None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    check(y, oracle.conv2d(x.cpu(), weight, spec, bias), torch.bfloat16, "")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, None, y)
    y.fill_(float("nan"))
    x.copy_(maps(weight.shape[1], MAPS[0], torch.bfloat16))
    graph.replay()
    assert layer.last_kernel == "cublas"
    check(y, oracle.conv2d(x.cpu(), weight, spec, bias), torch.bfloat16, "")
