"""Norms in two steps: statistics of parts, and normalising by those of all parts together.

Parts are put together without cancellation (Chan, Golub, LeVeque: Updating formulae and a pairwise
algorithm for computing sample variances, 1979).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def moments(x: Tensor) -> Tensor:
    """Mean and sum of squared differences from it over the last dimension: ``[.., C] -> [.., 2]``.

    Zeros for no channels. In float32 for narrower dtypes, whose sums would not do.
    """
    wide = _wide(x)
    if x.shape[-1] == 0:
        return wide.new_zeros((*x.shape[:-1], 2))
    mean = wide.mean(-1, keepdim=True)
    return torch.cat((mean, (wide - mean).square().sum(-1, keepdim=True)), -1)


def normalize(
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    counts: tuple[int, ...],
    eps: float,
) -> Tensor:
    """Layer norm by the `moments` of parts.

    Args:
        x: ``[.., C]``, any channels of what is normalised.
        moments: ``[.., 2 * parts]``.
        weight, bias: ``[C]`` or None.
        counts: channels of each part.
        eps: added to the variance.
    """
    pairs = moments.unflatten(-1, (len(counts), 2))
    sizes = _constant(counts, pairs.dtype, x.device)
    mean, variance = _together(pairs[..., 0], pairs[..., 1], sizes)
    y = (x - mean.unsqueeze(-1)) * (variance.unsqueeze(-1) + eps).rsqrt()
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def group_moments(x: Tensor, *, groups: tuple[int, ...], num_groups: int) -> Tensor:
    """Mean and sum of squared differences of every group: ``[B, C, ..] -> [B, 2 * num_groups]``.

    Args:
        groups: the group of each of the C channels.
        num_groups: groups there are; zeros for those without a channel here.
    """
    wide = _wide(x).flatten(2)
    found = wide.new_zeros((x.shape[0], num_groups, 2))
    for group in sorted(set(groups)):
        members = _constant(
            tuple(i for i, g in enumerate(groups) if g == group), torch.int64, x.device
        )
        found[:, group] = moments(wide[:, members].flatten(1))
    return found.flatten(1)


def group_normalize(
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    groups: tuple[int, ...],
    counts: tuple[tuple[int, ...], ...],
    eps: float,
) -> Tensor:
    """Group norm by the `moments` of parts.

    Args:
        x: ``[B, C, ..]``, any channels of what is normalised.
        moments: ``[B, 2 * groups * parts]``, part by part.
        weight, bias: ``[C]`` or None.
        groups: the group of each of the C channels.
        counts: ``[part][group]``: channels.
        eps: added to the variance.
    """
    pairs = moments.view(x.shape[0], len(counts), len(counts[0]), 2).transpose(1, 2)
    sizes = _constant(counts, pairs.dtype, x.device).T * x[0, 0].numel()
    mean, variance = _together(pairs[..., 0], pairs[..., 1], sizes)
    shape = (-1, len(groups), *([1] * (x.dim() - 2)))
    listed = _constant(groups, torch.int64, x.device)
    scale = (variance + eps).rsqrt()[:, listed].view(shape)
    y = (x - mean[:, listed].view(shape)) * scale
    if weight is not None:
        y = y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


def _together(means: Tensor, squares: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of parts (in the last dimension) of so many numbers each."""
    total = sizes.sum(-1)
    mean = (means * sizes).sum(-1) / total
    between = sizes * (means - mean.unsqueeze(-1)).square()
    return mean, (squares + between).sum(-1) / total


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@cache
def _constant(numbers: tuple[object, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers, made once: a copy to a GPU in every request would wait for it, and
    could not be in a CUDA graph. Never dropped, since a graph may read it; plans have few."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)
