"""`gather_linear` on DeiT-small's layers (197 tokens, two virtual nodes, density 0.2) against the
dense layer in torch and in oneDNN with its weight packed. The FLOPs alone are 1.67 times fewer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import disco_kernels as dk
from benchmarks.rates import record, relative_error

NODES, DENSITY, TOKENS = 2, 0.2, 197
LAYERS = {"qkv": (384, 1152), "proj": (384, 384), "fc1": (384, 1536), "fc2": (1536, 384)}


def _kernel(weight: Tensor, bias: Tensor) -> tuple[dk.GatherLinear, Tensor, int]:
    """The kernel, the weight with zeros where it reads nothing, its multiply-adds a token."""
    outputs, inputs = (dk.Ownership.contiguous(n, NODES) for n in weight.shape)
    generator = torch.Generator().manual_seed(0)
    selected, read = [], torch.zeros_like(weight, dtype=torch.bool)
    for i in range(NODES):
        row = []
        for j, owned in enumerate(inputs.channels):
            order = torch.randperm(len(owned), generator=generator)[: int(DENSITY * len(owned))]
            chosen = tuple(owned[k] for k in sorted(order.tolist()))
            row.append(() if i == j else chosen)
            columns = torch.tensor(owned if i == j else chosen)
            read[torch.tensor(outputs.channels[i])[:, None], columns] = True
        selected.append(tuple(row))
    kernel = dk.GatherLinear(weight, outputs, inputs, tuple(selected), bias=bias, backend="cpu")
    return kernel, weight * read, int(read.sum())


@pytest.mark.parametrize("side", ["disco", "torch", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_gather_linear(benchmark: Any, name: str, dtype: torch.dtype, side: str) -> None:
    benchmark.group = f"gather_linear {name} {dtype}"
    torch.manual_seed(0)
    inputs, outputs = LAYERS[name]
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    x = torch.randn(TOKENS, inputs).to(dtype)
    kernel, sparse, multiply_adds = _kernel(weight, bias)
    with torch.inference_mode():
        if side == "disco":
            out = torch.empty(TOKENS, outputs, dtype=dtype)
            benchmark(kernel.bind(x, None, out))
            weight = sparse
        elif side == "torch":
            out = benchmark(F.linear, x, weight, bias)
        else:
            onednn = torch.ops.mkldnn
            packed = onednn._reorder_linear_weight(weight, TOKENS)
            out = benchmark(onednn._linear_pointwise, x, packed, bias, "none", [], "")
    error = relative_error(out, F.linear(x.double(), weight.double(), bias.double()))
    assert error < (1e-5 if dtype == torch.float32 else 2**-7)
    needed = multiply_adds if side == "disco" else weight.numel()
    record(benchmark, 2 * TOKENS * needed, error, dtype)
