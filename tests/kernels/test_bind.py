"""Bound convolutions: the call, repeated, from whatever its tensors hold by then."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import disco_kernels as dk
from disco_kernels.backends.cpu import extension_status
from tests.kernels import oracle
from tests.kernels.cases import bits, image, in_dtype, threads

STATUS = extension_status()
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(STATUS.error is not None, reason=f"no extension: {STATUS.error}"),
]

F32, BF16 = torch.float32, torch.bfloat16
SPEC = dk.ConvSpec((3, 3), padding=(1, 1), activation="relu")
# name: (spec, channels, layout of the source, dtype). Staged: planes, and listed bfloat16.
KINDS = {
    "direct": (SPEC, 20, "w", F32),
    "f2": (replace(SPEC, winograd="f2"), 20, "w", F32),
    "f4": (replace(SPEC, winograd="f4"), 20, "v", BF16),
    "planes": (replace(SPEC, stride=(2, 2)), 3, "c", F32),
    "planes f2": (replace(SPEC, winograd="f2"), 3, "c", F32),
    "bfloat16": (SPEC, 21, "w", BF16),
    "1x1 by item": (dk.ConvSpec(stride=(2, 2)), 21, "h", BF16),
    "bfloat16 planes": (SPEC, 3, "c", BF16),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def partial(name: str, edge: int = 9) -> tuple[dk.PartialConv2d, Tensor, Tensor, Tensor]:
    """The kernel, its source, a residual and where to write."""
    spec, channels, layout, dtype = KINDS[name]
    x = in_dtype(image(layout, 2, channels, edge, 7), dtype)
    listed = torch.arange(channels - 1, -1, -1, dtype=torch.int32)
    weight = torch.randn(18, channels, *spec.kernel_size).to(dtype)
    bias = torch.randn(18).to(dtype)
    kernel = dk.PartialConv2d(weight, [channels], spec, bias=bias, index=[listed], backend="cpu")
    shape = (2, 18, *spec.output_size(edge, 7))
    residual = in_dtype(image("w", *shape), dtype)
    return kernel, x, residual, torch.full_like(residual, float("nan"))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


@every_kind
def test_equals_the_call_cpu(name: str) -> None:
    kernel, x, residual, out = partial(name)
    bound = kernel.bind([x], residual, out)
    assert same(out, kernel([x], residual)), "binding runs once"
    for count in (1, 2, 3, 1):
        x.copy_(torch.randn(x.shape))
        residual.copy_(torch.randn(residual.shape))
        out.fill_(float("nan"))
        with threads(count):
            bound()
            assert same(out, kernel([x], residual)), count


@every_kind
def test_gather_equals_the_call_cpu(name: str) -> None:
    spec, channels, layout, dtype = KINDS[name]
    x = in_dtype(image(layout, 2, channels, 9, 7), dtype)
    owned = dk.Ownership.contiguous(18, 2), dk.Ownership.contiguous(channels, 2)
    weight = torch.randn(18, channels, *spec.kernel_size).to(dtype)
    kernel = dk.GatherConv2d(
        weight, *owned, (((), (channels - 1,)), ((0,), ())), spec, backend="cpu"
    )
    out = kernel(x)
    bound = kernel.bind(x, None, out)
    x.copy_(torch.randn(x.shape))
    bound()
    assert same(out, kernel(x))


@every_kind
def test_from_other_threads_cpu(name: str) -> None:
    """Copies lie in memory of the calling thread; a larger call moves it."""
    kernel, x, residual, out = partial(name)
    bound = kernel.bind([x], residual, out)
    larger = partial(name, edge=60)

    def once(_: object = None) -> bool:
        x.copy_(torch.randn(x.shape))
        bound()
        return same(out, kernel([x], residual))

    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(once).result()
            pool.submit(larger[0], [larger[1]], larger[2]).result()
            assert pool.submit(once).result()
        assert once()  # the other thread, and its memory, are gone
        larger[0]([larger[1]], larger[2])
        assert once()


def test_several_share_a_thread_cpu() -> None:
    """All stage into the same memory, one after the other."""
    calls: list[tuple[Callable[[], None], Tensor, Tensor]] = []
    for edge in (5, 30, 11):
        for name in KINDS:
            kernel, x, residual, out = partial(name, edge)
            wanted = kernel([x], residual)
            calls.append((kernel.bind([x], residual, out), out, wanted))
    gc.collect()  # what is bound keeps what it needs
    for bound, out, wanted in calls * 2 + calls[::-1]:
        out.fill_(float("nan"))
        bound()
        assert same(out, wanted)


def test_copies_cannot_be_bound_cpu() -> None:
    kernel, x, residual, out = partial("direct")
    planes = x.contiguous()
    with pytest.raises(ValueError, match="segment 0 .* cannot be bound"):
        kernel.bind([planes], None, out)
    with pytest.raises(ValueError, match="residual .* cannot be bound"):
        kernel.bind([x], residual.contiguous(), out)
    with pytest.raises(ValueError, match="segment 0 .* cannot be bound"):
        kernel.bind([torch._neg_view(x)], None, out)
    weight = torch.randn(18, 20, 3, 3)
    owned = dk.Ownership.contiguous(18, 1), dk.Ownership.contiguous(20, 1)
    gather = dk.GatherConv2d(weight, *owned, (((),),), SPEC, backend="cpu")
    with pytest.raises(ValueError, match="cannot be bound"):
        gather.bind(planes, None, out)
    with pytest.raises(ValueError, match="out must be"):
        kernel.bind([x], None, out[:, :5])


def test_the_bias_of_any_memory_cpu() -> None:
    weight, x = torch.randn(6, 5, 1, 1), image("w", 1, 5, 3, 3)
    for bias in (torch._neg_view(torch.randn(6)), torch.randn(12)[::2], torch.randn(1).expand(6)):
        kernel = dk.PartialConv2d(weight, [5], dk.ConvSpec(), bias=bias, backend="cpu")
        out = image("w", 1, 6, 3, 3)
        kernel.bind([x], None, out)()
        oracle.check(out, oracle.conv2d(x, weight, dk.ConvSpec(), bias))


WIRES = (torch.float16, torch.bfloat16, torch.int8)


def narrow_partial(
    wire: torch.dtype, spec: dk.ConvSpec, edge: int
) -> tuple[dk.PartialConv2d, list[Tensor], list[Tensor | None], Tensor]:
    """A kernel over float32 channels and a payload, these, the scales, and where to write."""
    own = image("w", 2, 8, edge, 7)
    payload = torch.randn(2, edge, 7, 5).mul_(40).to(wire).permute(0, 3, 1, 2)
    scale = torch.rand(2, 5) if wire == torch.int8 else None
    weight = torch.randn(18, 13, *spec.kernel_size)
    kernel = dk.PartialConv2d(weight, [8, 5], spec, bias=torch.randn(18), backend="cpu")
    out = torch.full_like(image("w", 2, 18, *spec.output_size(edge, 7)), float("nan"))
    return kernel, [own, payload], [None, scale], out


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    "spec", [SPEC, replace(SPEC, winograd="f2"), dk.ConvSpec()], ids=["3x3", "f2", "1x1"]
)
def test_payloads_in_a_wire_dtype_cpu(wire: torch.dtype, spec: dk.ConvSpec) -> None:
    """New payloads and scales in the same memory; copies move when a larger call comes between."""
    kernel, segments, scale, out = narrow_partial(wire, spec, 9)
    bound = kernel.bind(segments, None, out, scale=scale)
    assert same(out, kernel(segments, scale=scale)), "binding runs once"
    larger, more, its_scale, target = narrow_partial(wire, spec, 60)
    again = larger.bind(more, None, target, scale=its_scale)
    for count in (1, 2, 1):
        segments[0].copy_(torch.randn(segments[0].shape))
        segments[1].copy_(torch.randn(segments[1].shape).mul_(40).to(wire))
        if scale[1] is not None:
            scale[1].copy_(torch.rand(scale[1].shape))
        for run, kind, xs, s, y in (
            (bound, kernel, segments, scale, out),
            (again, larger, more, its_scale, target),
        ):
            y.fill_(float("nan"))
            with threads(count):
                run()
                assert same(y, kind(xs, scale=s)), count


@pytest.mark.parametrize("wire", WIRES)
def test_tokens_in_a_wire_dtype_cpu(wire: torch.dtype) -> None:
    own, payload = torch.randn(2, 6, 8), torch.randn(2, 6, 5).mul_(40).to(wire)
    scale = [None, torch.rand(2, 5)] if wire == torch.int8 else None
    kernel = dk.PartialLinear(torch.randn(7, 13), [8, 5], backend="cpu")
    out = torch.full((2, 6, 7), float("nan"))
    bound = kernel.bind([own, payload], None, out, scale=scale)
    payload.copy_(torch.randn(2, 6, 5).mul_(40).to(wire))
    bound()
    assert same(out, kernel([own, payload], scale=scale))


def test_scales_that_would_be_copied_cannot_be_bound_cpu() -> None:
    kernel, segments, scale, out = narrow_partial(torch.int8, SPEC, 9)
    assert scale[1] is not None
    with pytest.raises(ValueError, match="scale 1 .* cannot be bound"):
        kernel.bind(segments, None, out, scale=[None, torch.rand(2, 10)[:, ::2]])
    with pytest.raises(ValueError, match="int8 needs one"):
        kernel.bind(segments, None, out)
