"""What every row of a benchmark says beside its times."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from disco_kernels.backends.cpu import fma_peak_gflops


@cache
def peak_gflops(dtype: torch.dtype = torch.float32) -> float:
    """Measured multiply-add rate of one thread for this dtype, in GFLOP/s."""
    return fma_peak_gflops(dtype)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference from a float64 result, over its largest value."""
    return float((actual.double() - exact).abs().max() / exact.abs().max())


def record(benchmark: Any, flops: int, error: float, dtype: torch.dtype = torch.float32) -> None:
    """Add the row's columns.

    Args:
        benchmark: the pytest-benchmark fixture, after it has run.
        flops: of one call, 2 per multiply-accumulate that the layer needs.
        error: `relative_error`.
        dtype: whose peak the rate is compared with.
    """
    threads = torch.get_num_threads()
    if benchmark.stats is not None:
        rate = flops / benchmark.stats["median"] / 1e9
        benchmark.extra_info["gflop_per_s"] = round(rate, 1)
        benchmark.extra_info["peak_fraction"] = round(rate / (peak_gflops(dtype) * threads), 3)
    benchmark.extra_info["max_relative_error"] = error
    benchmark.extra_info["threads"] = threads
