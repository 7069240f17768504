"""Is a result the whole model's result up to rounding?"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from disco.runtime.messages import flatten

# Rounding is measured, not guessed: the whole model's own error in float32 against float64. That of
# the CPU kernels was 3 to 6 times torch's (compiled ResNet-50, dense and at density 0.2, 2 seeds,
# one photograph, AVX-512). The factor leaves five times that for other models and inputs.
_OWN_ERRORS = 32.0
# In bfloat16 every activation is rounded to 8 bits, which hides how the sums are made.
_OWN_ERRORS_BF16 = 4.0
# 8-bit integers have their 8 bits of the range of a whole layer or channel, not each of its own. On
# ResNet-50 they cost 3 times what bfloat16 does.
_OWN_ERRORS_INT8 = 16.0
_FACTORS = {
    torch.float32: _OWN_ERRORS,
    torch.bfloat16: _OWN_ERRORS_BF16,
    torch.int8: _OWN_ERRORS_INT8,
}


def _floating(dtype: torch.dtype) -> torch.dtype:
    """What torch computes in for comparison: in integers it has no whole models."""
    return torch.bfloat16 if dtype == torch.int8 else dtype


@dataclass(frozen=True)
class Reference:
    """The whole model's outputs, flat.

    Attributes:
        outputs: float32, from torch in one process.
        scale: the largest absolute output.
        own_error: the largest difference of the same model, run by torch in `dtype` (for int8 in
            bfloat16), from float64.
        dtype: that results to be compared were computed in.
    """

    outputs: tuple[Tensor, ...]
    scale: float
    own_error: float
    dtype: torch.dtype = torch.float32

    @property
    def tolerance(self) -> float:
        """The largest difference that still is rounding."""
        floor = torch.finfo(_floating(self.dtype)).eps * self.scale
        return _FACTORS[self.dtype] * max(self.own_error, floor)


@dataclass(frozen=True)
class Comparison:
    """One result against a reference. `structure_matches` is about number and shapes."""

    max_abs_error: float
    tolerance: float
    scale: float
    structure_matches: bool = True
    allowed_by: str = "rounding"

    @property
    def equal(self) -> bool:
        """True if the result is the reference's up to the tolerance; False for NaN."""
        return self.structure_matches and self.max_abs_error <= self.tolerance

    def __str__(self) -> str:
        if not self.structure_matches:
            return "the outputs have other shapes"
        return (
            f"max |difference| {self.max_abs_error:.2e}, {self.allowed_by} allows "
            f"{self.tolerance:.2e} at outputs up to {self.scale:.3g}"
        )


def whole_model(model: nn.Module, *inputs: Tensor, dtype: torch.dtype = torch.float32) -> Reference:
    """Run the whole model with torch in this process, in float32, in float64 and in ``dtype`` (for
    int8 in bfloat16)."""
    with torch.inference_mode():
        outputs = _flat(model(*inputs))
        own = outputs
        if dtype != torch.float32:
            floating = _floating(dtype)
            lowered = (x.to(floating) if x.is_floating_point() else x for x in inputs)
            own = _flat(copy.deepcopy(model).to(floating)(*lowered))
        exact_model = copy.deepcopy(model).double()
        exact = _flat(exact_model(*(x.double() if x.is_floating_point() else x for x in inputs)))
    return Reference(
        outputs=tuple(outputs),
        scale=_largest(outputs),
        own_error=_largest([a.double() - b for a, b in zip(own, exact, strict=True)]),
        dtype=dtype,
    )


def compare(value: Any, reference: Reference) -> Comparison:
    """Compare a model's output, nested as it may be, with the whole model's."""
    tensors = _flat(value)
    shapes = [t.shape for t in tensors]
    if shapes != [t.shape for t in reference.outputs]:
        return Comparison(float("nan"), reference.tolerance, reference.scale, False)
    differences = [a.double() - b.double() for a, b in zip(tensors, reference.outputs, strict=True)]
    return Comparison(_largest(differences), reference.tolerance, reference.scale)


def worst(comparisons: Iterable[Comparison]) -> Comparison:
    """The one that is furthest off, measured by what it allows; one of other shapes first."""
    return max(
        comparisons,
        key=lambda c: float("inf") if not c.equal else c.max_abs_error / max(c.tolerance, 1e-300),
    )


def _flat(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    flatten(value, tensors)
    return tensors


def _largest(tensors: list[Tensor]) -> float:
    """The largest absolute value; NaN if one is in it."""
    values = [t.abs().max() for t in tensors if t.numel()]
    return float(torch.stack([v.double() for v in values]).max()) if values else 0.0
