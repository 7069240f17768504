"""Comparing a model with a copy of it whose channels were permuted."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from disco import Cluster
from disco.sparsify import find_groups, tensors_of
from disco.sparsify.permute import Permutable, find_permutable, permute_
from disco.sparsify.permute.axes import Indices


def trained_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """With norms, biases, statistics and zeros as training leaves them: all channels differ."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.add_(0.2 * noise(tensor).abs())
            elif tensor.dim() <= 1 or not tensor.any():
                tensor.add_(0.1 * noise(tensor))
    return model.eval()


def random_orders(permutable: Permutable, seed: int = 1) -> dict[int, Indices]:
    """One for every axis that may be permuted."""
    generator = np.random.default_rng(seed)
    dims = [(name, d) for name, axes in permutable.dims.items() for d in range(len(axes))]
    free = [axis for axis in permutable.plain_axes(dims) if not axis.reason]
    return {axis.number: generator.permutation(axis.size) for axis in free}


def check_same_function(before: nn.Module, after: nn.Module, x: Tensor) -> Tensor:
    """Fail unless both models compute the same in float64, up to the rounding of sums in another
    order; the outputs.

    A sum of K products in two orders differs by at most 2 K eps of the sum of their magnitudes.
    Over the model that is 2 eps times the fan-in of all layers of the outputs' scale, where layers
    do not magnify errors; rounding errors fall far below it, and one wrong channel far above.
    """
    fan_in = sum(p[0].numel() for p in before.parameters() if p.dim() > 1)
    with torch.no_grad():
        one, other = (
            _flat(copy.deepcopy(model).double().eval()(x.double())) for model in (before, after)
        )
    scale = float(one.abs().max())
    assert scale > 0 and bool(torch.isfinite(one).all())
    assert float((one - other).abs().max()) <= 2 * fan_in * torch.finfo(torch.double).eps * scale
    return one


def permuted_copy(model: nn.Module, x: Tensor, seed: int = 1) -> tuple[nn.Module, int]:
    """A copy with every axis that is free permuted at random, and how many entries these have."""
    permutable = find_permutable(model, (x,))
    orders = random_orders(permutable, seed)
    other = copy.deepcopy(model)
    permute_(tensors_of(other), permutable, orders)
    return other, sum(len(order) for order in orders.values())


def make_local_(model: nn.Module, nodes: int, x: Tensor) -> None:
    """Zero all weights between nodes."""
    tensors = tensors_of(model)
    with torch.no_grad():
        for group in find_groups(model, Cluster(nodes), 0.2, (x,), ignore_zeros=True):
            for name, out in group.out_ownership.items():
                for i, rows in enumerate(out.channels):
                    for j, columns in enumerate(group.in_ownership.channels):
                        if i != j and rows and columns:
                            block = (torch.tensor(rows)[:, None], torch.tensor(columns))
                            tensors[name][block] = 0.0


def _flat(outputs: Any) -> Tensor:
    """A tensor, or all of a tuple's behind each other."""
    parts = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return torch.cat([part.flatten().double() for part in parts])
