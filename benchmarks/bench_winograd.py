"""Direct convolution against Winograd on ResNet-50's 3 x 3 layers of stride 1: the measurements
behind `disco_kernels.choose_winograd`. GFLOP/s count direct convolution's operations for all.

Hot, one layer alone. In a whole pass the weights come from further away, 16 or 36 words for 9, so
the choice for the smallest maps is one step more careful than these rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.bench_gather_conv2d import _fused, bound, flops_of, layer
from benchmarks.rates import record, relative_error
from benchmarks.shapes import ConvShape, resnet50_shapes

_SHAPES = [shape for shape in resnet50_shapes() if shape.kernel == 3 and shape.stride == 1]
_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("winograd", ["off", "f2", "f4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_winograd(benchmark: Any, shape: ConvShape, dtype: torch.dtype, winograd: str) -> None:
    benchmark.group = f"winograd {shape} {dtype}"
    pattern, weight, bias, x, exact = layer(shape, dtype)
    kernel = _fused(shape, pattern, weight, bias, winograd)
    with torch.inference_mode():
        run, out = bound(kernel, x)
        benchmark(run)
    error = relative_error(out, exact)
    assert error < _LIMITS[dtype]
    record(benchmark, flops_of(shape, pattern), error, dtype)
    benchmark.extra_info["packed_bytes"] = kernel.packed_bytes
