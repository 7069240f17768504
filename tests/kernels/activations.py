"""The activations in float64, written out, and how far float32 may be from them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24
# Results below this may come out as zero: e^-x is cut off at 2^-126.5 (csrc/cpu/activation_body.h),
# and silu multiplies it by up to 88.
SMALLEST = 2.0**-119


def _phi(x: Tensor) -> Tensor:
    """The normal distribution; erfc, unlike 1 + erf, keeps its digits where it is small."""
    return 0.5 * torch.special.erfc(-x * math.sqrt(0.5))


def _gelu_tanh(x: Tensor) -> Tensor:
    """(1 + tanh u) / 2 = sigmoid(2 u)."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _hardsigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


_EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * _phi(x),
    "gelu_tanh": _gelu_tanh,
    "hardswish": lambda x: x * _hardsigmoid(x),
    "hardsigmoid": _hardsigmoid,
    "sigmoid": torch.sigmoid,
}
# The steepest slope of each, rounded up: how much it can enlarge a difference.
_SLOPE = {
    "none": 1.0,
    "relu": 1.0,
    "relu6": 1.0,
    "silu": 1.1,
    "gelu": 1.13,
    "gelu_tanh": 1.13,
    "hardswish": 1.5,
    "hardsigmoid": 1 / 6,
    "sigmoid": 0.25,
}
# Largest errors of the C++ kernels, measured over the whole range (csrc/cpu/activation_body.h)
# and rounded up, in units in the last place of the result.
_ULP = {
    "none": 0.0,
    "relu": 0.0,
    "relu6": 0.0,
    "silu": 3.5,
    "gelu": 8.5,
    "gelu_tanh": 3.5,  # and 3 w more where the result is x e^-w
    "hardswish": 2.5,
    "hardsigmoid": 1.5,
    "sigmoid": 2.5,
}


def exact(x: Tensor, name: str) -> Tensor:
    """The activation of ``x``, in float64."""
    return _EXACT[name](x.double())


def allowed(x: Tensor, name: str) -> Tensor:
    """How far a C++ kernel's activation of the float32 ``x`` may be from `exact`, elementwise."""
    value = exact(x, name)
    ulp = 2.0 ** (torch.frexp(value.abs().clamp(min=2.0**-126))[1] - 24).double()
    count = torch.full_like(value, _ULP[name])
    if name == "gelu_tanh":
        factor = (value / x.double()).abs().clamp(min=2.0**-150)
        count = count - 3 * torch.where((x < 0) & x.isfinite(), factor, 1.0).log()
    return count * ulp + (SMALLEST if _ULP[name] else 0.0)


def bound(before: Tensor, error: Tensor, name: str) -> Tensor:
    """How far float32 may be from the activation of ``before``, itself known up to ``error``.

    Every backend's absolute error is within 4 (1 + |x|) u; the C++ kernels' measured one is 2.2.
    """
    if _ULP[name] == 0.0:
        return error
    return _SLOPE[name] * error + 4 * UNIT_ROUNDOFF * (1 + before.abs()) + SMALLEST
