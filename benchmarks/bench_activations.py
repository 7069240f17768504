"""An activation in the epilogue against the same layer followed by torch's own activation.

Layers of the models that use them, whole (one segment): MobileNetV2's widening 1x1, EfficientNet's,
and the first linear of DeiT-small's feed-forward part. Run with ``make bench``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import disco_kernels as dk

FUNCTIONS = {
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
}
# (input channels, output channels, pixels or tokens)
LAYERS = [(24, 144, 56 * 56), (80, 480, 14 * 14), (384, 1536, 197)]


@pytest.mark.parametrize("side", ["fused", "unfused"])
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize(("inputs", "outputs", "tokens"), LAYERS)
def test_activation(
    benchmark: Any, inputs: int, outputs: int, tokens: int, activation: str, side: str
) -> None:
    benchmark.group = f"{activation} after {inputs}x{outputs}, {tokens} pixels"
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    x = torch.randn(tokens, inputs)
    name = activation if side == "fused" else "none"
    linear = dk.PartialLinear(weight, [inputs], bias=bias, activation=name, backend="cpu")
    function = FUNCTIONS[activation]

    def run(x: Tensor) -> Tensor:
        y = linear([x])
        return y if side == "fused" else function(y)

    expected = function(F.linear(x.double(), weight.double(), bias.double()))
    with torch.inference_mode():
        error = float((run(x).double() - expected).abs().max() / expected.abs().max())
        benchmark(run, x)
    assert error < 1e-5
    benchmark.extra_info["max_relative_error"] = error
    benchmark.extra_info["threads"] = torch.get_num_threads()
