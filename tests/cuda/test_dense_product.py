"""Layers as one dense product by cuBLASLt, whose part a library for the CPU takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import disco_kernels as dk
from disco_kernels.backends.triton import TritonBackend
from disco_kernels.cuda import choice, cublas_lt, dense_product
from disco_kernels.cuda import device as devices
from disco_kernels.cuda.tuned import TUNED
from disco_kernels.triton.launch import TritonConv2d
from tests.cuda.conv2d_cases import NODES, make, owned
from tests.cuda.cublas.library import (
    INTERNAL_ERROR,
    NOT_SUPPORTED,
    compile_library,
    products,
    refuse,
)
from tests.cuda.emulator import cpu_as_device, needs_compiler
from tests.kernels import oracle
from tests.kernels.cases import image, in_dtype, seed
from tests.triton.test_kernels import check

pytestmark = needs_compiler
LAST = torch.channels_last
ON_A_PIXEL = 0  # of the windows in conv2d_cases
SIZES: dict[int, str | None] = {1: choice.CUBLAS, 8: choice.CUBLAS, 64: choice.CUBLAS}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_library(tmp_path_factory.mktemp("cublas"))


@pytest.fixture(autouse=True)
def library(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    with cpu_as_device():
        monkeypatch.setattr(cublas_lt, "library", lambda: compiled)
        monkeypatch.setattr(choice, "is_hopper", lambda device: True)
        monkeypatch.setattr(TritonBackend, "refusal", lambda self, device, dtype: None)
        yield compiled
        refuse(compiled, 0)
        cublas_lt._handle.cache_clear()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had been measured to be faster for every layer of one pixel."""
    for nodes in range(len(NODES)):
        layer = make(nodes, ON_A_PIXEL, torch.bfloat16, "cpu")[0]
        monkeypatch.setitem(TUNED, tuple(prepared(layer).key), SIZES)


def prepared(layer: dk.GatherConv2d | dk.GatherLinear | dk.PartialConv2d) -> TritonConv2d:
    assert isinstance(layer._prepared, TritonConv2d)
    return layer._prepared


def maps(channels: int, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    batch, height, width = size
    x = in_dtype(image("w", batch, channels, height, width), dtype)
    return x.to(memory_format=LAST)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("nodes", range(len(NODES)))
def test_every_node_at_once(nodes: int, activation: str, library: ctypes.CDLL) -> None:
    for number, dtype in enumerate((torch.bfloat16, torch.float16)):
        seed(nodes + number)
        layer, weight, bias, spec = make(nodes, ON_A_PIXEL, dtype, "cpu", activation)
        x = maps(weight.shape[1], 2, 5, 3, dtype=dtype)
        residual = maps(weight.shape[0], 2, 5, 3, dtype=dtype) if number == nodes % 2 else None
        before = products(library)
        y = layer(x, residual)
        assert products(library) == before + 1 and layer.last_kernel == "cublas"
        check(y, oracle.conv2d(x, weight, spec, bias, residual), dtype, (nodes, activation))


@pytest.mark.usefixtures("table")
def test_onto_the_residual_and_bound(library: ctypes.CDLL) -> None:
    layer, weight, bias, spec = make(1, ON_A_PIXEL, torch.bfloat16, "cpu")
    x, out = maps(weight.shape[1], 2, 4, 4), maps(weight.shape[0], 2, 4, 4)
    run = layer.bind(x, out, out)
    for _ in range(2):
        added = out.clone(memory_format=torch.preserve_format)
        before = products(library)
        run()
        assert products(library) == before + 1
        check(out, oracle.conv2d(x, weight, spec, bias, added), torch.bfloat16, "")
    # In a part of wider maps, and with a residual that lies in another.
    wide, added = maps(weight.shape[0] + 16, 2, 4, 4), maps(weight.shape[0] + 8, 2, 4, 4)
    target, residual = wide[:, 8 : 8 + weight.shape[0]], added[:, : weight.shape[0]]
    around = [wide[:, :8].clone(), wide[:, 8 + weight.shape[0] :].clone()]
    layer(x, residual, target)
    assert layer.last_kernel == "cublas"
    check(target, oracle.conv2d(x, weight, spec, bias, residual), torch.bfloat16, "")
    assert torch.equal(wide[:, :8], around[0])
    assert torch.equal(wide[:, 8 + weight.shape[0] :], around[1])


def linear(
    monkeypatch: pytest.MonkeyPatch, activation: str = "none"
) -> tuple[dk.GatherLinear, Tensor]:
    """Two nodes, whose outputs are two runs each, as heads of attention are."""
    seed(0)
    runs = ((*range(64), *range(128, 144)), (*range(64, 128), *range(144, 160)))
    out, own = dk.Ownership(runs), owned((32, 40))
    reads = (((), (40, 41, 42, 43, 44, 45, 46, 47)), ((), ()))
    weight = torch.randn(160, 72).bfloat16()
    weight *= oracle.on_pattern(torch.empty(160, 72), out, own, reads)

    def made() -> dk.GatherLinear:
        return dk.GatherLinear(weight, out, own, reads, activation=activation, backend="triton")

    without = made()
    assert len(without.descriptor.nodes) == 4
    # Density is no part of the key but by the inputs of the node that reads most.
    monkeypatch.setitem(TUNED, tuple(prepared(without).key), {20: choice.CUBLAS, 200: None})
    layer = made()
    beside = 0 if activation == "gelu" else 160 * layer.in_channels * 2
    assert layer.packed_bytes - without.packed_bytes == beside
    assert layer._bytes_with("off") == layer.packed_bytes, "what budgets of bytes count with"
    return layer, weight


def test_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weight = linear(monkeypatch)
    x = in_dtype(torch.randn(3, 7, 72), torch.bfloat16)
    y = layer(x)
    assert layer.last_kernel == "cublas"
    check(y, oracle.linear(x, weight), torch.bfloat16, "")


def test_the_number_of_pixels_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = linear(monkeypatch)
    kernel, device = prepared(layer), torch.device("cpu")
    chosen = [kernel.chosen(n, device) for n in (4, 5, 20, 63, 64, 200, 10**7)]
    assert chosen == [None, "cublas", "cublas", "cublas", None, None, None]
    monkeypatch.setattr(choice, "is_hopper", lambda device: False)
    assert kernel.chosen(1, device) is None


def test_exact_gelu_is_not_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = linear(monkeypatch, activation="gelu")
    assert prepared(layer).dense is None


@pytest.mark.usefixtures("table")
def test_what_the_library_cannot_is_left_to_triton(library: ctypes.CDLL) -> None:
    layer, weight, bias, _ = make(1, ON_A_PIXEL, torch.bfloat16, "cpu")
    kernel = prepared(layer)
    packed, dense = layer.packed_weight, kernel.dense
    assert dense is not None
    beside = dense.of_packed(packed, kernel.num_weights)
    assert beside is not None and dense.of_packed(packed[: kernel.num_weights], 0) is None
    i, o = weight.shape[1], weight.shape[0]
    x, out = maps(i, 2, 5, 3), maps(o, 2, 5, 3)

    def takes(x: Tensor = x, out: Tensor = out, residual: Tensor | None = None) -> bool:
        return dense.bind([x], beside, bias, residual, out) is not None

    assert takes() and takes(residual=out)
    assert not takes(x.contiguous()) and not takes(out=out.contiguous())
    assert not takes(maps(i, 2, 5, 4)[..., :3]), "rows apart from each other"
    assert takes(maps(i + 8, 2, 5, 3)[:, 8:]) and not takes(maps(i + 8, 2, 5, 3)[:, 4:-4])
    assert not takes(residual=maps(o + 4, 2, 5, 3)[:, :o])
    assert not takes(x.float()) and not takes(maps(i, 0, 5, 3), maps(o, 0, 5, 3))
    assert not takes(maps(i - 8, 2, 5, 3)) and not takes(out=maps(o + 8, 2, 5, 3))
    assert dense.bind([x], beside[1:], bias, None, out) is None
    assert dense.bind([x], beside, torch.zeros(o + 1).bfloat16()[1:], None, out) is None
    halves = [t.half() for t in (x, beside, bias, out)]
    assert dense.bind([halves[0]], halves[1], halves[2], None, halves[3]) is not None
    assert not takes(x.half()) and not takes(out=out.half()), "two kinds of 16 bits"
    pixel = maps(i, 3, 1, 1).clone(memory_format=torch.contiguous_format)
    assert pixel.stride() == (i, 1, 1, 1) and takes(pixel, maps(o, 3, 1, 1))


@pytest.mark.usefixtures("table")
def test_what_the_library_refuses(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weight, bias, _ = make(1, ON_A_PIXEL, torch.bfloat16, "cpu")
    kernel = prepared(layer)
    beside, dense = kernel._dense_weight(layer.packed_weight), kernel.dense
    assert beside is not None and dense is not None
    x, out = ([maps(n, 1, 3, width) for width in range(1, 6)] for n in weight.shape[1::-1])

    def takes(width: int) -> bool:
        return dense.bind([x[width]], beside, bias, None, out[width]) is not None

    bound = dense.bind([x[0]], beside, bias, None, out[0])
    assert bound is not None
    refuse(library, NOT_SUPPORTED)
    assert takes(0) and not takes(1), "what it was asked before holds"
    with pytest.raises(RuntimeError, match="cublasLtMatmul: refused by the library"):
        bound()
    refuse(library, INTERNAL_ERROR)
    assert not takes(2)
    refuse(library, 0)
    assert not takes(1), "it has no algorithm for this product"
    assert takes(2), "it had had a difficulty"
    # While a graph is captured it is not asked.
    monkeypatch.setattr(devices, "capturing", lambda: True)
    assert takes(2) and not takes(3)
    monkeypatch.setattr(devices, "capturing", lambda: False)
    assert takes(3)


@pytest.mark.usefixtures("table")
def test_windows_parts_and_messages_are_left_to_triton() -> None:
    assert prepared(make(1, 1, torch.bfloat16, "cpu")[0]).dense is None, "3 x 3"
    assert prepared(make(1, 3, torch.bfloat16, "cpu")[0]).dense is None, "strides"
    layer, weight, _, _ = make(1, ON_A_PIXEL, torch.bfloat16, "cpu")
    x, out = maps(weight.shape[1], 2, 5, 3), maps(weight.shape[0], 2, 5, 3)
    kernel, packed = prepared(layer), layer.packed_weight

    def other(accumulate: bool = False, **given: object) -> object:
        options = {"scales": None, "outgoing": None, **given}
        return kernel._other_kernel([x], packed, None, None, out, accumulate, **options)  # type: ignore[arg-type]

    assert other() is not None
    assert other(accumulate=True) is None
    assert other(scales=[torch.ones(2, weight.shape[1])]) is None
    assert other(outgoing=object()) is None
    kernel.tile = kernel.choose(30, x.device)
    assert other() is None, "a tile of Triton's kernel was asked for"


def test_a_single_node_needs_no_second_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seed(0)
    weight = torch.randn(24, 40, 1, 1).bfloat16()
    spec = dk.ConvSpec(activation="relu")
    layer = dk.PartialConv2d(weight, (40,), spec, backend="triton")
    monkeypatch.setitem(TUNED, tuple(prepared(layer).key), SIZES)
    layer = dk.PartialConv2d(weight, (40,), spec, backend="triton")
    assert layer.packed_bytes == weight.nbytes
    x = maps(40, 2, 3, 3)
    check(layer([x]), oracle.conv2d(x, weight, spec), torch.bfloat16, "")
    assert layer.last_kernel == "cublas"
    # Outputs that are no whole vectors, in a map that is.
    odd = dk.PartialConv2d(weight[:20], (40,), spec, backend="triton")
    monkeypatch.setitem(TUNED, tuple(prepared(odd).key), SIZES)
    odd = dk.PartialConv2d(weight[:20], (40,), spec, backend="triton")
    y = maps(24, 2, 3, 3)[:, :20]
    check(odd([x], None, y), oracle.conv2d(x, weight[:20], spec), torch.bfloat16, "")
    assert odd.last_kernel == "cublas"
    # A list of channels is no dense weight, nor is a part whose channels are others'.
    listed = dk.PartialConv2d(weight, (40,), spec, index=[[*range(8, 48)]], backend="triton")
    kernel = prepared(listed)
    assert kernel.dense is not None and kernel._dense_weight(listed.packed_weight) is None


def test_layers_that_were_not_measured_have_no_second_weights() -> None:
    layer, _, _, _ = make(1, ON_A_PIXEL, torch.bfloat16, "cpu")
    assert layer.packed_weight.numel() == prepared(layer).num_weights


@pytest.mark.usefixtures("table")
def test_what_was_made_is_destroyed(library: ctypes.CDLL) -> None:
    layer, weight, _, _ = make(1, ON_A_PIXEL, torch.bfloat16, "cpu")
    kept = dense_product._PLANS_KEPT
    for height in range(1, 2 * kept):
        layer(maps(weight.shape[1], 1, height, 1))
        plans = (height - 1) % kept + 1
        # Of every plan a product and three layouts, and the handle.
        assert library.disco_live_objects() == 4 * plans + 1
    del layer
    cublas_lt._handle.cache_clear()
    gc.collect()
    assert library.disco_live_objects() == 0


def test_budgets_have_no_room_for_weights_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = linear(monkeypatch)[1]
    pattern = (
        dk.Ownership.contiguous(160, 2),
        dk.Ownership.contiguous(72, 2),
        (((), ()), ((), ())),
    )
    key = (1, 1, 2, 80, 36)
    monkeypatch.setitem(TUNED, key, SIZES)
    sizes = []
    for limit in (None, 10**6):
        packing = dk.Packing(limit)
        made = dk.GatherLinear(weight, *pattern, backend="triton", packing=packing)
        packing.finish()
        assert tuple(prepared(made).key) == key
        sizes.append(made.packed_bytes)
    assert sizes == [160 * (36 + 72) * 2, 160 * 36 * 2]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cublas_lt.library.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    assert cublas_lt.library() is None
    cublas_lt.library.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cublas_lt.library() is None
    cublas_lt.library.cache_clear()
