"""Max pooling equals torch's in every bit. `test_isa.py` runs this file on each instruction set."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import disco_kernels as dk
from disco_kernels.backends.cpu import extension_status
from tests.kernels.cases import fresh, image, in_dtype, output_of, run, seed, threads
from tests.kernels.covering import covered_pairs, pairwise, possible_pairs

STATUS = extension_status()
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(STATUS.error is not None, reason=f"no extension: {STATUS.error}"),
]

# (kernel, stride, padding, dilation) of one dimension.
WINDOWS = (
    (1, 1, 0, 1),
    (1, 2, 0, 1),
    (2, 2, 0, 1),
    (2, 1, 1, 1),
    (3, 2, 1, 1),
    (3, 1, 1, 2),
    (2, 1, 1, 5),
    (5, 3, 2, 1),
    (3, 4, 1, 3),
)
AXES: dict[str, Sequence[object]] = {
    "channels": (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65, 130),
    "h": (1, 2, 3, 4, 5, 7, 8, 15),
    "gh": WINDOWS,
    "w": (1, 2, 3, 4, 5, 7, 8, 15),
    "gw": WINDOWS,
    "batch": (1, 2, 3),
    "dtype": (torch.float32, torch.bfloat16),
    "layout": ("w", "c", "v", "h", "x"),
    "special": (False, True),
    "out": ("fresh", "dense", "slice", "crop"),
}


def fits(first: str, a: object, second: str, b: object) -> bool:
    if (first, second) not in (("h", "gh"), ("w", "gw")):
        return True
    assert isinstance(a, int) and isinstance(b, tuple)
    kernel, _, padding, dilation = b
    return bool(a + 2 * padding >= dilation * (kernel - 1) + 1)


def test_equals_torch_cpu() -> None:
    """A window that meets nothing but padding included, whose largest is minus infinity."""
    cases = pairwise(AXES, fits)
    empty = 0
    for number, case in enumerate(cases):
        rng = seed(number)
        kernel, stride, padding, dilation = zip(case["gh"], case["gw"], strict=True)
        x = image(case["layout"], case["batch"], case["channels"], case["h"], case["w"])
        if case["special"]:
            x = x.clone()
            for value in (float("nan"), float("inf"), -float("inf"), -0.0) * 3:
                x[tuple(rng.randrange(size) for size in x.shape)] = value
            x[0, 0] = -float("inf")
        x = in_dtype(x, case["dtype"])
        wanted = F.max_pool2d(x, kernel, stride, padding, dilation)
        pool = dk.MaxPool2d(dk.ConvSpec(kernel, stride, padding, dilation), backend="cpu")
        shape = tuple(wanted.shape)
        y = run(partial(pool, x), case["out"], shape, case, "cpu", case["dtype"])
        assert y.dtype == x.dtype
        torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True, msg=str(case))
        empty += int(wanted.isneginf().any()) and not case["special"]
    assert covered_pairs(AXES, cases) == possible_pairs(AXES, fits)
    assert empty > 0


def test_an_empty_batch_cpu() -> None:
    pool = dk.MaxPool2d(dk.ConvSpec((3, 3), (2, 2), (1, 1)), backend="cpu")
    assert pool(torch.empty(0, 5, 8, 8)).shape == (0, 5, 4, 4)
    assert pool(torch.empty(2, 0, 8, 8)).shape == (2, 0, 4, 4)


def test_a_large_map_cpu() -> None:
    x = image("w", 2, 64, 56, 56)
    pool = dk.MaxPool2d(dk.ConvSpec((3, 3), (2, 2), (1, 1)), backend="cpu")
    y = run(fresh(pool, x), "fresh", (), "large", "cpu")
    assert torch.equal(y, F.max_pool2d(x, 3, 2, 1))
    with threads(2):
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_bad_arguments_are_refused_cpu() -> None:
    with pytest.raises(ValueError, match="at most half"):
        dk.MaxPool2d(dk.ConvSpec((3, 3), padding=(2, 0)))
    pool = dk.MaxPool2d(dk.ConvSpec((2, 2), (2, 2)), backend="cpu")
    x = image("w", 1, 5, 6, 6)
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        pool(x[0])
    with pytest.raises(ValueError, match="smaller than the kernel's window"):
        pool(image("w", 1, 5, 1, 6))
    for wrong in (image("w", 1, 5, 3, 4), image("w", 1, 5, 3, 3).double()):
        with pytest.raises(ValueError, match="out must be"):
            pool(x, wrong)
    with pytest.raises(ValueError, match="channel stride of 1"):
        pool(x, image("c", 1, 5, 3, 3))
    target = output_of("dense", (1, 5, 3, 3)).target
    assert pool(x, target) is target
    with pytest.raises(dk.BackendUnavailable):
        pool(x.double())
