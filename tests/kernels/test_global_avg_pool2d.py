"""Means over whole maps against float64. `test_isa.py` runs this file on each instruction set."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import disco_kernels as dk
from disco_kernels.backends.cpu import extension_status
from tests.kernels.cases import BACKENDS, bits, image, in_dtype, output_of, seed, threads
from tests.kernels.covering import pairwise

pytestmark = pytest.mark.usefixtures("poison")
needs_extension = pytest.mark.skipif(
    extension_status().error is not None, reason=f"no extension: {extension_status().error}"
)
both_backends = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=needs_extension if b == "cpu" else ()) for b in BACKENDS]
)
AXES: dict[str, Sequence[object]] = {
    "channels": (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130, 600),
    "h": (1, 2, 7, 40),
    "w": (1, 3, 7, 40),
    "batch": (1, 2, 3),
    "dtype": (torch.float32, torch.bfloat16),
    "layout": ("w", "c", "v", "h", "x"),
    "out": ("fresh", "dense", "slice", "crop"),
}


@both_backends
def test_equals_the_mean(backend: str) -> None:
    pool = dk.GlobalAvgPool2d(backend)
    for number, case in enumerate(pairwise(AXES)):
        seed(number)
        shape = (case["batch"], case["channels"], case["h"], case["w"])
        x = in_dtype(image(case["layout"], *shape), case["dtype"])
        wanted = x.double().mean((2, 3), keepdim=True)
        target = output_of(case["out"], (*shape[:2], 1, 1), case["dtype"]).target
        y = pool(x, target)
        assert y.shape == wanted.shape and y.dtype == x.dtype and (target is None or y is target)
        # Two sums, of a row and of the rows, a division, and the rounding to the output's dtype.
        terms = case["h"] + case["w"] + 2
        magnitude = x.double().abs().mean((2, 3), keepdim=True)
        if backend == "reference":  # torch adds in another order, and rounds its own way
            terms = case["h"] * case["w"] + 2
        bound = terms * 2.0**-24 * magnitude
        if case["dtype"] == torch.bfloat16:
            bound = bound + 2.0**-8 * wanted.abs()
        assert bool(((y.double() - wanted).abs() <= bound).all()), case


@needs_extension
def test_bits_do_not_depend_on_the_threads() -> None:
    pool = dk.GlobalAvgPool2d("cpu")
    for batch, channels in ((1, 2048), (1, 70), (3, 700)):
        x = image("w", batch, channels, 13, 14)
        with threads(1):
            wanted = pool(x)
        for count in (2, 3, 5):
            with threads(count):
                assert torch.equal(bits(pool(x)), bits(wanted))


@both_backends
def test_bound_calls_read_what_is_there(backend: str) -> None:
    pool = dk.GlobalAvgPool2d(backend)
    x, out = image("w", 2, 300, 9, 9), torch.empty(2, 300, 1, 1)
    bound = pool.bind(x, out)
    assert torch.equal(out, pool(x)), "binding runs once"
    x.copy_(torch.randn(x.shape))
    bound()
    assert torch.equal(out, pool(x))
    with pytest.raises(ValueError, match="cannot be bound"):
        pool.bind(image("c", 1, 20, 3, 3), torch.empty(1, 20, 1, 1))


@both_backends
def test_special_values_and_mistakes(backend: str) -> None:
    pool = dk.GlobalAvgPool2d(backend)
    x = torch.zeros(1, 3, 2, 2)
    x[0, 0, 0, 0], x[0, 1, 1, 1] = float("nan"), float("inf")
    y = pool(x).flatten()
    assert y[0].isnan() and y[1] == float("inf") and y[2] == 0
    assert pool(torch.empty(0, 5, 2, 2)).shape == (0, 5, 1, 1)
    with pytest.raises(ValueError, match="at least one pixel"):
        pool(torch.empty(1, 5, 0, 2))
    with pytest.raises(ValueError, match=r"out must be \[1, 3, 1, 1\]"):
        pool(x, torch.empty(1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        pool(x[0])
