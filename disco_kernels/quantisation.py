"""8-bit integers as operands: inputs as unsigned bytes of one range, weights as signed bytes, each
output channel with a scale of its own (symmetric per-channel weights, affine per-tensor inputs, as
in Jacob et al., arXiv 1712.05877). Sums are exact int32; bias and epilogue are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_WEIGHT = 127
_LARGEST_INPUT = 255
# So many products of the two fit into 32 bits with their sign (csrc/cpu/conv2d.cpp).
MOST_PRODUCTS = 65536
# With fewer outputs or products of an output there is little to be gained: an input is made a byte
# once and then multiplied with every output, four neighbours at a time.
_FEWEST = 16


def choose_int8(weight: Tensor, groups: int = 1) -> bool:
    """Whether products of 8-bit integers pay for a layer, and fit: a shipped choice by its shape.

    Args:
        weight: ``[O, I / groups, kh, kw]`` or ``[O, I]``.
        groups: of the convolution; what has more than one is not multiplied in integers.
    """
    outputs, products = weight.shape[0], weight[:1].numel()
    return groups == 1 and outputs >= _FEWEST and _FEWEST <= products <= MOST_PRODUCTS


@dataclass(frozen=True)
class InputBytes:
    """What the bytes of a layer's input stand for: ``(byte - zero_point) * scale``.

    Its product with a weight's scale (the row's largest weight over 127), and 255 times that times
    the sum of the row's bytes, have to be numbers that float32 has.

    Attributes:
        scale: above zero, rounded to float32; the width of a step.
        zero_point: 0 to 255; the byte of zero, so that padding is exact.
    """

    scale: float
    zero_point: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.zero_point, bool) or not isinstance(self.zero_point, int):
            raise ValueError(f"zero_point must be a whole number, given {self.zero_point!r}")
        if not 0 <= self.zero_point <= _LARGEST_INPUT:
            raise ValueError(f"zero_point must be 0 to {_LARGEST_INPUT}, given {self.zero_point}")
        if not isinstance(self.scale, (int, float)):
            raise ValueError(f"scale must be a number, given {self.scale!r}")
        smallest = torch.finfo(torch.float32).tiny
        if not smallest <= self.scale <= 1 / smallest:
            raise ValueError(f"scale must be a normal float32 above zero, given {self.scale}")
        # The kernels multiply in float32; everyone else should mean the same.
        object.__setattr__(self, "scale", float(torch.tensor(float(self.scale))))

    @classmethod
    def of_range(cls, low: float, high: float) -> InputBytes:
        """Bytes that reach from ``low`` to ``high``, and to zero if that lies outside.

        Raises ValueError for a range that is not finite or not in order.
        """
        low, high = float(low), float(high)
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"a range needs two finite numbers in order, given {low} to {high}")
        low, high = min(low, 0.0), max(high, 0.0)
        smallest = torch.finfo(torch.float32).tiny
        scale = max((high - low) / _LARGEST_INPUT, smallest)
        return cls(scale, min(_LARGEST_INPUT, round(-low / scale)))


def input_bytes(x: Tensor, given: InputBytes) -> Tensor:
    """The bytes of ``x``, less the zero point, as float64 whole numbers of the shape of ``x``.

    The nearest one (ties to even), within the range; NaN becomes the lowest.
    """
    inverse = torch.tensor(given.scale, dtype=torch.float32).reciprocal()
    steps = (x.float() * inverse.to(x.device)).round().double()
    low, high = -given.zero_point, _LARGEST_INPUT - given.zero_point
    return steps.nan_to_num(low, high, low).clamp(low, high)


def weight_bytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[O, ...]`` -> float64 whole numbers from -127 to 127, and the float32 ``[O]`` scales.

    A row with a weight that is not finite becomes zeros, and its scale NaN.
    """
    rows = weight.detach().float().flatten(1)
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    scale = (largest / _LARGEST_WEIGHT).clamp_min(torch.finfo(torch.float32).tiny)
    steps = (rows / scale[:, None]).round().clamp(-_LARGEST_WEIGHT, _LARGEST_WEIGHT)
    finite = largest.isfinite()
    steps = torch.where(finite[:, None], steps, torch.zeros_like(steps))
    scale = torch.where(finite, scale, torch.full_like(scale, float("nan")))
    return steps.double().reshape(weight.shape), scale
