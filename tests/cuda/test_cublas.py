"""Layers as one dense product by cuBLASLt on a GPU, against float64; see test_dense_product.py."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import disco_kernels as dk
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
SIZES: dict[int, str | None] = {4**power: choice.CUBLAS for power in range(10)}


def maps(channels: int, size: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = in_dtype(image("w", size[0], channels, *size[1:]), dtype)
    return x.cuda().to(memory_format=LAST)


def listed(monkeypatch: pytest.MonkeyPatch, layer: dk.GatherConv2d | dk.PartialConv2d) -> None:
    """As if cuBLASLt had been measured to be faster for layers like this one."""
    assert isinstance(layer._prepared, TritonConv2d)
    monkeypatch.setitem(TUNED, tuple(layer._prepared.key), SIZES)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cublas_lt.library() is not None, "torch's own cuBLASLt was not found"
    for nodes in range(len(NODES)):
        listed(monkeypatch, make(nodes, 0, torch.bfloat16, "cuda")[0])


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


@pytest.mark.parametrize("outputs", [20, 60])
def test_without_bias_and_in_parts_of_maps(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that are multiples of 16 bytes and of no more."""
    seed(0)
    weight, spec = torch.randn(outputs, 40, 1, 1).bfloat16(), dk.ConvSpec(activation="relu")
    listed(monkeypatch, dk.PartialConv2d(weight.cuda(), (40,), spec, backend="triton"))
    layer = dk.PartialConv2d(weight.cuda(), (40,), spec, backend="triton")
    x, y, residual = (maps(n, MAPS[0])[:, 8:-8] for n in (56, outputs + 20, outputs + 28))
    y, residual = y[:, :outputs], residual[:, :outputs]
    expected = oracle.conv2d(x.cpu(), weight, spec, None, residual.cpu())
    layer([x], residual, y)
    assert layer.last_kernel == "cublas"
    check(y, expected, torch.bfloat16, outputs)


def test_on_streams_and_in_a_graph() -> None:
    seed(0)
    layer, weight, bias, spec = make(1, 0, torch.bfloat16, "cuda")
    inputs = [maps(weight.shape[1], MAPS[2]) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in inputs]
    outputs = []
    for x, stream in zip(inputs, streams, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs.append(layer(x))
    torch.cuda.synchronize()
    for x, y in zip(inputs, outputs, strict=True):
        check(y, oracle.conv2d(x.cpu(), weight, spec, bias), torch.bfloat16, "")
    (x, _), (y, _) = inputs, outputs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, None, y)
        layer(x, y, y)
    assert layer.last_kernel == "cublas"
    x.copy_(inputs[1])
    y.fill_(float("nan"))
    graph.replay()
    first = oracle.conv2d(x.cpu(), weight, spec, bias).value.bfloat16()
    second = oracle.conv2d(x.cpu(), weight, spec, bias, first).value
    assert float((y.cpu().double() - second).abs().max()) <= 2**-7 * float(second.abs().max())


def test_a_size_that_a_graph_is_the_first_to_see() -> None:
    """The library is not asked while a graph is captured: Triton's kernel computes it."""
    seed(0)
    layer, weight, bias, spec = make(1, 0, torch.bfloat16, "cuda")
    x, y = maps(weight.shape[1], (1, 7, 9)), maps(weight.shape[0], (1, 7, 9))
    prepared = layer._prepared
    assert isinstance(prepared, TritonConv2d)
    prepared.tile = prepared.choose(63, x.device)
    layer(x, None, y)  # what it needs on the device is there
    prepared.tile = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, None, y)
    assert layer.last_kernel == "triton"
    y.fill_(float("nan"))
    graph.replay()
    check(y, oracle.conv2d(x.cpu(), weight, spec, bias), torch.bfloat16, "")
    layer(x, None, y)
    assert layer.last_kernel == "cublas"


def test_a_thread_whose_first_work_this_is() -> None:
    seed(0)
    layer, weight, bias, spec = make(1, 0, torch.bfloat16, "cuda")
    x, y = maps(weight.shape[1], MAPS[0]), maps(weight.shape[0], MAPS[0])
    torch.cuda.synchronize()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            layer(x, None, y)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not failed and layer.last_kernel == "cublas"
    check(y, oracle.conv2d(x.cpu(), weight, spec, bias), torch.bfloat16, "")


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_not_a_number_stays(activation: str) -> None:
    layer, weight, _, _ = make(0, 0, torch.bfloat16, "cuda", activation)
    x = maps(weight.shape[1], MAPS[0])
    x[1, 0, 2, 3] = float("nan")
    y = layer(x)
    assert layer.last_kernel == "cublas"
    assert bool(y[1, :, 2, 3].isnan().all()) and int(y.isnan().sum()) == weight.shape[0]
