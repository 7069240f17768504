"""Exact zeros in the weights, and in what an optimizer remembers of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from disco.sparsify.selection import pruned
from disco_kernels.pattern import Ownership


def mask_for(weight: Tensor, out: Ownership, kept: Tensor) -> Tensor:
    """Bool ``[O, I, 1, ...]`` on the weight's device: where ``weight`` has to be zero."""
    mask = pruned(out, kept).to(weight.device)
    return mask.reshape(*mask.shape, *(1,) * (weight.dim() - 2))


def apply_(weight: Tensor, out: Ownership, kept: Tensor) -> None:
    """Zero what is not selected, in place."""
    weight.masked_fill_(mask_for(weight, out, kept), 0.0)


@torch.no_grad()
def zero_(
    weights: Mapping[str, Tensor],
    masks: MutableMapping[str, Tensor],
    optimizer: Optimizer | None,
) -> None:
    """Zero weights where their masks are set, and there also every tensor of the same shape that
    the optimizer keeps for them (momenta and second moments). Masks follow their weights to other
    devices."""
    for name, weight in weights.items():
        if name not in masks:
            continue
        mask = masks[name] = masks[name].to(weight.device)
        weight.masked_fill_(mask, 0.0)
        for remembered in _state_of(optimizer, weight):
            remembered.masked_fill_(mask.to(remembered.device), 0.0)


def _state_of(optimizer: Optimizer | None, weight: Tensor) -> Iterator[Tensor]:
    # Not optimizer.state[weight], which would make an entry.
    state = optimizer.state.get(weight, {}) if optimizer is not None else {}
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            yield value
