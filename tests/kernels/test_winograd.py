"""Winograd against float64, with the bound that `winograd_model` derives.

`test_isa.py` runs this file once for each instruction set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import disco_kernels as dk
from disco_kernels.backends.cpu import extension_status
from tests.kernels import oracle, winograd_model
from tests.kernels.cases import OWNERSHIPS, fresh, image, in_dtype, run
from tests.kernels.covering import covered_pairs, pairwise, possible_pairs
from tests.kernels.layers import EPILOGUES, run_gather, run_partial

STATUS = extension_status()
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(STATUS.error is not None, reason=f"no extension: {STATUS.error}"),
]

BASE = dk.ConvSpec((3, 3), padding=(1, 1))
AXES: dict[str, Sequence[object]] = {
    "outputs": oracle.SOME_OUT_CHANNELS,
    "inputs": oracle.SOME_IN_CHANNELS,
    "winograd": ("f2", "f4"),
    "dtype": (torch.float32, torch.bfloat16),
    "h": oracle.ALL_MAPS,
    "ph": (0, 1, 2),
    "w": oracle.ALL_MAPS,
    "pw": (0, 1, 2),
    "batch": (0, 1, 3),
    **EPILOGUES,
}
PARTIAL_AXES = {
    **AXES,
    "layout": ("w", "c", "p", "v", "x", "i", "d", "e", "we", "cp", "wse", "ipv"),
}
GATHER_AXES = {
    **AXES,
    "layout": ("w", "c", "v", "h", "x"),
    "nodes": (1, 2, 3, 4),
    "density": (0.0, 0.3, 1.0),
    "owned_out": OWNERSHIPS,
    "owned_in": OWNERSHIPS,
}


def fits(first: str, a: object, second: str, b: object) -> bool:
    """Whether 3 x 3 fits into a padded map."""
    if (first, second) not in (("h", "ph"), ("w", "pw")):
        return True
    assert isinstance(a, int) and isinstance(b, int)
    return a + 2 * b >= 3


def spec_of(case: dict[str, object]) -> dk.ConvSpec:
    padding = (case["ph"], case["pw"])
    return replace(
        BASE,
        padding=padding,
        activation=case["activation"],
        winograd=case["winograd"],
    )


def test_partial_conv2d_cpu() -> None:
    cases = pairwise(PARTIAL_AXES, fits)
    for number, case in enumerate(cases):
        run_partial(case, spec_of(case), case["dtype"], number)
    assert covered_pairs(PARTIAL_AXES, cases) == possible_pairs(PARTIAL_AXES, fits)


def test_gather_conv2d_cpu() -> None:
    cases = pairwise(GATHER_AXES, fits)
    for number, case in enumerate(cases):
        run_gather(case, spec_of(case), case["dtype"], number)
    assert covered_pairs(GATHER_AXES, cases) == possible_pairs(GATHER_AXES, fits)


def test_every_number_of_channels_cpu() -> None:
    """1..130 output and input channels."""
    for number in range(1, 131):
        spec = replace(BASE, winograd=("f2", "f4")[number % 2])
        inputs = number * 37 % 131 or 130
        weight, x = torch.randn(number, inputs, 3, 3), image("w", 1, inputs, 5, 7)
        kernel = dk.PartialConv2d(weight, [inputs], spec, backend="cpu")
        oracle.check(kernel([x]), oracle.conv2d(x, weight, spec), (number, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("winograd", ["f2", "f4"])
def test_large_maps_in_chunks_cpu(winograd: str, dtype: torch.dtype) -> None:
    """More tiles than are transformed at a time (512 KB a thread), over the ends of images."""
    spec = replace(BASE, winograd=winograd, activation="relu")
    m = winograd_model.SIZES[winograd]
    weight, bias = torch.randn(70, 97, 3, 3).to(dtype), torch.randn(70).to(dtype)
    x = in_dtype(image("w", 3, 97, 45, 42), dtype)
    tiles = 3 * -(-45 // m) * -(-42 // m)
    assert tiles * (m + 2) ** 2 * 97 * 4 > 3 * 3 * 512 * 1024
    kernel = dk.PartialConv2d(weight, [97], spec, bias=bias, backend="cpu")
    y = run(fresh(kernel, [x]), "fresh", (), winograd, "cpu", dtype)
    oracle.check(y, oracle.rounded(oracle.conv2d(x, weight, spec, bias), dtype), winograd)


@pytest.mark.parametrize(
    ("winograd", "dtype", "most"),
    [
        ("f2", torch.float32, 1.0),
        ("f4", torch.float32, 3.0),
        ("f2", torch.bfloat16, 3.0),
        ("f4", torch.bfloat16, 1.1),
    ],
)
def test_accuracy_is_that_of_the_chosen_points_cpu(
    winograd: str, dtype: torch.dtype, most: float
) -> None:
    """Far inside of the bound, which is for the worst case: other points, or weights transformed
    in float32, would show here. Measured, times direct's error: 0.6 and 1.8 to 2.1; in bfloat16
    2.6, of weights that are bfloat16, and 1.0."""
    weight = torch.randn(64, 64, 3, 3).to(dtype)
    x = in_dtype(image("w", 1, 64, 28, 28), dtype)
    exact, errors = oracle.conv2d(x, weight, BASE).value, []
    for spec in (BASE, replace(BASE, winograd=winograd)):
        y = dk.PartialConv2d(weight, [64], spec, backend="cpu")([x])
        errors.append(float((y.double() - exact).square().mean().sqrt()))
    assert errors[1] <= most * errors[0], errors


@pytest.mark.parametrize("m", [2, 4])
def test_the_model_is_a_convolution(m: int) -> None:
    b, g, a = winograd_model.matrices(m)
    d, k = torch.randn(m + 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    exact = torch.stack([(d[i : i + 3] * k).sum() for i in range(m)])
    torch.testing.assert_close(a @ ((g @ k) * (b @ d)), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("winograd", ["f2", "f4"])
def test_unselected_channels_do_not_leak_cpu(winograd: str) -> None:
    """They may be NaN: whole vectors of channels are transformed, the others only beside."""
    spec = replace(BASE, winograd=winograd)
    for dtype in (torch.float32, torch.bfloat16):
        x = in_dtype(image("w", 1, 40, 9, 6), dtype)
        listed = torch.tensor([1, 17, 16, 39, 3, 1], dtype=torch.int32)
        others = [c for c in range(40) if c not in listed.tolist()]
        weight = torch.randn(9, 6, 3, 3).to(dtype)
        kernel = dk.PartialConv2d(weight, [6], spec, index=[listed], backend="cpu")
        expected = oracle.conv2d(x[:, listed.long()], weight, spec)
        x[:, others[::2]], x[:, others[1::2]] = float("nan"), float("inf")
        oracle.check(kernel([x]), oracle.rounded(expected, dtype), dtype)


def test_what_cannot_be_is_refused_cpu() -> None:
    for wrong in (
        {"kernel_size": (1, 1)},
        {"kernel_size": (3, 5)},
        {"stride": (2, 1)},
        {"dilation": (1, 2)},
    ):
        for winograd in ("f2", "f4"):
            with pytest.raises(ValueError, match="3 x 3 with stride and dilation 1"):
                replace(BASE, winograd=winograd, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="winograd must be one of"):
        replace(BASE, winograd="f6")
    weight = torch.randn(4, 5, 3, 3)
    with pytest.raises(ValueError, match="reference.*Winograd"):
        dk.PartialConv2d(weight, [5], replace(BASE, winograd="f4"), backend="reference")
    # Weights of one algorithm are not another's, even where their sizes are equal.
    x = image("w", 1, 5, 6, 6)
    for first, second in (("off", "f2"), ("f2", "f4"), ("f4", "off")):
        kernel = dk.PartialConv2d(weight, [5], replace(BASE, winograd=first), backend="cpu")
        other = dk.PartialConv2d(weight, [5], replace(BASE, winograd=second), backend="cpu")
        kernel._finished = other.packed_weight, kernel._prepared
        with pytest.raises(ValueError, match="pack them again"):
            kernel([x])


def test_auto_is_resolved_once_cpu() -> None:
    weight, auto = torch.randn(32, 32, 3, 3), replace(BASE, winograd="auto")
    sizes = {(56, 56): "f4", (14, 14): "f2", (7, 7): "off", None: "off"}
    for size, wanted in sizes.items():
        kernel = dk.PartialConv2d(weight, [32], auto, image_size=size, backend="cpu")
        assert kernel.descriptor.spec.winograd == wanted
        x = image("w", 1, 32, 6, 5)  # not the size it was told: computed as well
        oracle.check(kernel([x]), oracle.conv2d(x, weight, kernel.descriptor.spec))
    there = dk.PartialConv2d(weight, [32], auto, image_size=(56, 56), backend="reference")
    assert there.descriptor.spec.winograd == "off"
    wide = dk.ConvSpec((3, 3), (2, 2), winograd="auto")
    kernel = dk.PartialConv2d(weight, [32], wide, image_size=(56, 56), backend="cpu")
    assert kernel.descriptor.spec.winograd == "off"


def test_the_choice_is_a_function_of_the_shape() -> None:
    """The larger the map, the larger the tiles; more channels never take Winograd away."""
    order = ("off", "f2", "f4")
    for dtype in (torch.float32, torch.bfloat16):
        chosen = {}
        for channels in (1, 15, 16, 64, 2048):
            for edge in (1, 3, 6, 7, 13, 14, 28, 56, 224):
                arguments = (BASE, channels, channels, (edge, edge), dtype)
                first = dk.choose_winograd(*arguments)
                torch.manual_seed(edge)
                assert dk.choose_winograd(*arguments) == first
                chosen[channels, edge] = order.index(first)
        for (channels, edge), rank in chosen.items():
            for (more, larger), other in chosen.items():
                assert more < channels or larger < edge or other >= rank
        assert set(chosen.values()) == {0, 1, 2}
    for c_out, c_in in ((15, 64), (64, 15)):
        assert dk.choose_winograd(BASE, c_out, c_in, (56, 56)) == "off"
    assert dk.choose_winograd(BASE, 64, 64, (56, 56), torch.float64) == "off"
