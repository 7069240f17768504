"""Kernels and operators compute no derivative, and say so when they are asked for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import disco_kernels as dk

OPS = torch.ops.disco_kernels
Run = Callable[[Tensor], object]


def kernels() -> dict[str, Run]:
    """By name, each as a function of an image of 8 channels."""
    spec, owned = dk.ConvSpec((1, 1)), dk.Ownership(((0, 1, 2, 3), (4, 5, 6, 7)))
    weight = torch.randn(8, 8)
    image_weight = weight[:, :, None, None]
    selected = dk.find_selected(weight, owned, owned)
    conv = dk.PartialConv2d(image_weight, [8], spec)
    linear = dk.PartialLinear(weight, [8])
    gather_conv = dk.GatherConv2d(image_weight, owned, owned, selected, spec)
    gather_linear = dk.GatherLinear(weight, owned, owned, selected)
    grouped = dk.GroupedConv2d(torch.randn(8, 1, 3, 3), 8, dk.ConvSpec((3, 3)))
    return {
        "PartialConv2d": lambda x: conv([x]),
        "PartialLinear": lambda x: linear([x.movedim(1, -1)]),
        "GatherConv2d": gather_conv,
        "GatherLinear": lambda x: gather_linear(x.movedim(1, -1)),
        "GroupedConv2d": grouped,
        "MaxPool2d": dk.MaxPool2d(dk.ConvSpec((3, 3))),
        "GlobalAvgPool2d": dk.GlobalAvgPool2d(),
        "GatherPack": dk.GatherPack([[1, 2]]),
    }


NAMES = sorted(kernels())


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_is_refused(name: str) -> None:
    run, x = kernels()[name], torch.randn(2, 8, 5, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"^{name} records no gradient.*no_grad"):
        run(x)
    with torch.no_grad():
        run(x)
    run(x.detach())


@pytest.mark.parametrize("name", NAMES)
def test_a_tangent_is_refused(name: str) -> None:
    """Recording gradients or not: forward mode has a switch of its own."""
    run, x = kernels()[name], torch.randn(2, 8, 5, 5)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(RuntimeError, match=rf"^{name} computes no tangent.*unpack_dual"):
                run(dual)
            run(x)
            run(forward_ad.unpack_dual(dual).primal)


def test_a_tangent_of_a_residual_is_refused() -> None:
    kernel, x = dk.PartialLinear(torch.randn(8, 8), [8]), torch.randn(2, 8)
    with forward_ad.dual_level():
        residual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="PartialLinear computes no tangent"):
            kernel([x], residual)


def test_operators_refuse_a_tangent() -> None:
    x, index = torch.randn(2, 8), torch.arange(4, dtype=torch.int32)
    packed = OPS.prepack(torch.randn(8, 8), [8], "reference")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="disco_kernels::partial_linear computes no tangent"):
            OPS.partial_linear([dual], [None], packed, None, None, 8, "none", "reference")
        with pytest.raises(RuntimeError, match="disco_kernels::gather_pack_ computes no tangent"):
            OPS.gather_pack_(dual, index, [4], torch.empty(8), "reference")


def test_jvp_through_a_kernel_is_an_error_that_says_so() -> None:
    kernel, x = dk.PartialLinear(torch.randn(8, 8), [8]), torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="PartialLinear computes no tangent"):
        torch.func.jvp(lambda x: kernel([x]), (x,), (torch.ones_like(x),))
