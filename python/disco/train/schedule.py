"""The learning rate as a function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear from near 0 to `peak` over `warmup` steps, then half a cosine down towards 0.

    After Loshchilov & Hutter (arXiv 1608.03983), without restarts. It is a function of the step, so
    resuming needs no state.

    Args:
        step: from 0 to total - 1.
        total: number of steps.
        warmup: of these, for rising.
        peak: the largest value.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))
