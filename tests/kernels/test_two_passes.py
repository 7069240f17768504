"""A layer in two passes has the bits of one pass, and both are right against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import disco_kernels as dk
from disco_kernels.backends.cpu import extension_status
from disco_kernels.wire import num_images
from tests.examples import examples

pytestmark = pytest.mark.skipif(
    extension_status().error is not None, reason=f"no extension: {extension_status().error}"
)
EPSILON = torch.finfo(torch.float32).eps


def maps(batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, channels, height, width).to(memory_format=torch.channels_last)


def in_two(kernel: Any, segments: list[Tensor], residual: Tensor | None, num_first: int) -> Tensor:
    """The two passes, with the later segments full of NaN until the second one."""
    late = [x.clone(memory_format=torch.preserve_format) for x in segments[num_first:]]
    out = torch.empty_like(kernel(segments, residual))
    passes = kernel.bind_passes(segments, residual, out, num_first)
    for x in segments[num_first:]:
        x.fill_(float("nan"))
    out.fill_(float("nan"))
    passes.first()
    assert not out.isnan().any(), "the first pass has read what is not there yet"
    for x, arrived in zip(segments[num_first:], late, strict=True):
        x.copy_(arrived)
    passes.second()
    return out


@settings(max_examples=examples(150), deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_random_layers_cpu(data: st.DataObject, seed: int) -> None:
    draw = data.draw
    torch.manual_seed(seed)
    counts = draw(st.lists(st.sampled_from((0, 1, 3, 8, 17, 40)), min_size=2, max_size=4))
    assume(sum(counts) > 0)  # torch gives no channels another shape
    outputs = draw(st.sampled_from((1, 5, 16, 33, 70)))
    edge, stride = draw(st.sampled_from((1, 3, 5))), draw(st.sampled_from((1, 2)))
    height, width = (draw(st.integers(edge, 15)) for _ in range(2))
    activation = draw(st.sampled_from(("none", "relu", "relu6", "silu")))
    batch = draw(st.integers(1, 3))
    num_first = draw(st.integers(1, len(counts) - 1))
    weight = torch.randn(outputs, sum(counts), edge, edge)
    bias = torch.randn(outputs) if draw(st.booleans()) else None
    spec = dk.ConvSpec((edge,) * 2, (stride,) * 2, (edge // 2,) * 2, activation=activation)
    segments = [maps(batch, n, height, width) for n in counts]
    kernel = dk.PartialConv2d(weight, counts, spec, bias=bias, backend="cpu")
    assert kernel.sums_in_parts
    plain = F.conv2d(
        torch.cat(segments, 1).double(),
        weight.double(),
        None if bias is None else bias.double(),
        stride,
        edge // 2,
    )
    added = torch.randn_like(plain.float()).to(memory_format=torch.channels_last)
    residual = added if draw(st.booleans()) else None
    whole = kernel(segments, residual)
    found = in_two(kernel, segments, residual, num_first)
    assert torch.equal(found, whole)
    # Every activation here has a slope of at most 1.1; the sums have as many roundings as terms.
    terms = sum(counts) * edge * edge + 2
    size = F.conv2d(
        torch.cat(segments, 1).double().abs(), weight.double().abs(), None, stride, edge // 2
    )
    functions = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
    total = plain if residual is None else plain + residual.double()
    expected = functions[activation](total)
    bound = 1.1 * EPSILON * (terms * (size + 4) + 16 * (total.abs() + 1))
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("counts", "index", "size", "edge"),
    [
        ((1024, 51), (None, None), 14, 1),  # pixels that share cache sets: gathered first
        ((40, 1024), (None, None), 7, 1),
        ((1024, 1024), ((*range(0, 1024, 3),), (*range(5, 400),)), 7, 3),
        ((3, 2), (None, None), 30, 3),  # few channels: copied with their padding
        ((64, 13), (None, (12, 0, 5)), 28, 3),
        ((300, 60), (None, None), 14, 3),
    ],
    ids=str,
)
def test_what_is_copied_first_cpu(
    counts: tuple[int, ...], index: Any, size: int, edge: int, threads: int
) -> None:
    torch.manual_seed(0)
    taken = [n if i is None else len(i) for n, i in zip(counts, index, strict=True)]
    weight = torch.randn(48, sum(taken), edge, edge)
    spec = dk.ConvSpec((edge,) * 2, (1, 1), (edge // 2,) * 2, activation="relu")
    kernel = dk.PartialConv2d(
        weight, taken, spec, index=index, source_channels=counts, bias=weight[:, 0, 0, 0]
    )
    segments = [maps(2, n, size, size) for n in counts]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = kernel(segments)
        assert torch.equal(in_two(kernel, segments, None, 1), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("leading", [(7,), (2, 197), (1, 3, 5)], ids=str)
def test_tokens_cpu(leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kernel = dk.PartialLinear(
        torch.randn(50, 96 + 19), (96, 19), bias=torch.randn(50), activation="gelu"
    )
    segments = [torch.randn(*leading, 96), torch.randn(*leading, 19)]
    residual = torch.randn(*leading, 50)
    whole = kernel(segments, residual)
    assert torch.equal(in_two(kernel, segments, residual, 1), whole)


@pytest.mark.parametrize("wire", [torch.float32, torch.int8], ids=str)
def test_the_second_pass_writes_the_messages_cpu(wire: torch.dtype) -> None:
    torch.manual_seed(0)
    pack = dk.GatherPack([[3, 9, 1], [0]], "cpu", wire_dtype=wire)
    kernel = dk.PartialConv2d(torch.randn(40, 30, 1, 1), (20, 10), dk.ConvSpec(), pack=pack)
    segments = [maps(2, 20, 9, 9), maps(2, 10, 9, 9)]
    expected, found = (pack.empty_messages((2, 9, 9), torch.float32) for _ in range(2))
    whole = kernel(segments, messages=expected)
    out = torch.empty_like(whole)
    passes = kernel.bind_passes(segments, None, out, 1, found)
    for message in found:
        message.zero_()
    passes.first()
    assert not any(message.any() for message in found)
    passes.second()
    assert num_images((2, 9, 9)) == 2 and torch.equal(out, whole)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_keeps_one_pass() -> None:
    """Where a break would round, or sums are no plain sums; asking for it anyway is refused."""
    window = {"kernel_size": (3, 3), "padding": (1, 1)}
    cases = [
        (torch.bfloat16, "cpu", dk.ConvSpec(**window)),
        (torch.float32, "cpu", dk.ConvSpec(**window, winograd="f2")),
        (torch.float32, "cpu", dk.ConvSpec(**window, winograd="f4")),
        (torch.float32, "reference", dk.ConvSpec(**window)),
        (torch.float64, "reference", dk.ConvSpec(**window)),
    ]
    for dtype, backend, spec in cases:
        weight = torch.randn(32, 24, 3, 3).to(dtype)
        kernel = dk.PartialConv2d(weight, (16, 8), spec, backend=backend)
        assert not kernel.sums_in_parts, (dtype, backend, spec)
        segments = [maps(1, n, 8, 8).to(dtype) for n in (16, 8)]
        with pytest.raises(ValueError, match="one pass"):
            kernel.bind_passes(segments, None, torch.empty_like(kernel(segments)), 1)


def test_refusals() -> None:
    kernel = dk.PartialConv2d(torch.randn(16, 24, 1, 1), (16, 8), dk.ConvSpec(), backend="cpu")
    segments = [maps(1, 16, 8, 8), maps(1, 8, 8, 8)]
    out = torch.empty_like(kernel(segments))
    for num_first in (-1, 0, 2, 3):
        with pytest.raises(ValueError, match="the first takes 1 to 1"):
            kernel.bind_passes(segments, None, out, num_first)
    with pytest.raises(ValueError, match="memory of its own"):
        kernel.bind_passes(segments, out, out, 1)
    with pytest.raises(ValueError, match="out must be"):
        kernel.bind_passes(segments, None, out[:, :8], 1)
