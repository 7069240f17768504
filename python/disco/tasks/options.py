"""Numbers that losses take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossOptions:
    """`label_smoothing`: the share of a label that is spread over all classes, in [0, 1)."""

    label_smoothing: float = 0.0


@dataclass(frozen=True)
class DistillOptions:
    """`temperature`: outputs are divided by it before they are compared, above 0."""

    temperature: float = 2.0
