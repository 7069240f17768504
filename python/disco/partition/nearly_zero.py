"""Patterns that are almost there: remote columns so small that they look like zeros, and are not.

Training with a penalty, or a checkpoint that went through another number format, leaves such
weights. They are never cut unasked: the plan sends the channels that they read, names the layer,
and says which tolerance would take them as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disco_kernels.pattern import Ownership, column_magnitude_per_output

# Of a layer's largest weight. Columns of random or trained weights have their largest value far
# above: one of 64 normal values is within a thousandth of zero once in 1e190.
NEARLY = 1e-3
# Of a layer's remote columns that must be so for a report: a few dead channels make no pattern.
_LEAST_SHARE = 0.25
_SHOWN = 3


@dataclass(frozen=True)
class NearlyZero:
    """Remote columns of one layer that are nearly zero.

    Attributes:
        layer: the model's layer.
        columns: how many, over all pairs of ranks.
        remote_columns: how many there are.
        largest: the largest absolute value in them.
    """

    layer: str
    columns: int
    remote_columns: int
    largest: float


def find_nearly_zero(
    layer: str, weight: Tensor, out: Ownership, inputs: Ownership, tolerance: float
) -> NearlyZero | None:
    """Look at one layer.

    Args:
        weight: ``[O, I, *kernel]``.
        out, inputs: who owns its outputs and inputs.
        tolerance: up to which weights count as zero already.

    Returns:
        None unless a quarter of the remote columns are above `tolerance` and at most `NEARLY` of
        the layer's largest weight.
    """
    if not weight.numel():
        return None
    magnitude = column_magnitude_per_output(weight)
    limit = NEARLY * float(magnitude.max())
    found: list[Tensor] = []
    remote = 0
    for rank, outputs in enumerate(out.channels):
        others = [c for peer, owned in enumerate(inputs.channels) if peer != rank for c in owned]
        if not outputs or not others:
            continue
        columns = magnitude[list(outputs)].amax(0)[others]
        remote += len(others)
        found.append(columns[(columns > tolerance) & (columns <= limit)])
    small = torch.cat(found) if found else torch.empty(0)
    if not len(small) or len(small) < _LEAST_SHARE * remote:
        return None
    return NearlyZero(layer, len(small), remote, float(small.max()))


def describe(found: Sequence[NearlyZero]) -> list[str]:
    """Lines for the plan's totals: the first layers, and the tolerance for all of them."""
    lines = [
        f"nearly zero: {each.columns} of {each.remote_columns} remote columns of {each.layer}, "
        f"largest value {each.largest:.3g}; they are not zero, so they are sent"
        for each in found[:_SHOWN]
    ]
    if len(found) > _SHOWN:
        lines.append(f"nearly zero: {len(found) - _SHOWN} more layers")
    if found:
        largest = max(each.largest for each in found)
        lines.append(f"tolerance={_rounded_up(largest)} takes all of these as zero")
    return lines


def _rounded_up(value: float) -> str:
    """Three digits, never below the value."""
    text = f"{value:.2e}"
    if float(text) >= value:
        return text
    mantissa, exponent = text.split("e")
    return f"{float(mantissa) + 0.01:.2f}e{exponent}"
