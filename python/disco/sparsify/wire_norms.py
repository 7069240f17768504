"""Norms over channels of which some may not be there, as nodes compute them: the statistics are of
the channels that are there, and exact; what is normalised by them may have been rounded."""

from __future__ import annotations

import torch
from torch import Tensor


def normalised(
    x: Tensor,
    groups: int,
    dim: int,
    there: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Layer norm (one group, channels last) or group norm of the channels that are there.

    Args:
        x: ``[.., C]`` with `dim` the last, or ``[B, C, ..]`` with `dim` 1.
        groups: into which the channels are divided.
        dim: of the channels.
        there: bool ``[C]``, None for all. What is returned of the others means nothing.
        weight, bias: ``[C]``.
        eps: added to the variance.
    """
    mean, scale = _statistics(x, groups, dim, there, eps)
    y = (x - mean) * scale
    if weight is not None:
        y = y * _along(weight, x, dim)
    return (y if bias is None else y + _along(bias, x, dim)).to(x.dtype)


@torch.no_grad()
def normalised_error(
    error: Tensor,
    x: Tensor,
    groups: int,
    dim: int,
    there: Tensor | None,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    """What an error of `x` is after the norm, whose statistics are those of `x` itself."""
    _, scale = _statistics(x, groups, dim, there, eps)
    y = error * scale
    return (y if weight is None else y * _along(weight, x, dim)).to(error.dtype)


def _statistics(
    x: Tensor, groups: int, dim: int, there: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation, to be broadcast over `x`."""
    wide = x if x.dtype == torch.float64 else x.float()
    channels = x.shape[dim]
    counted = torch.ones(channels, dtype=torch.bool, device=x.device) if there is None else there
    counted = counted.to(wide.dtype).view(groups, channels // groups)
    # A group of which nothing is there has no result that anybody reads, but must have a gradient.
    share = counted / counted.sum(1, keepdim=True).clamp_min(1.0)
    if dim == 1:
        rest = tuple(range(3, x.dim() + 1))
        split = wide.unflatten(1, (groups, channels // groups))
        shape = (1, groups, channels // groups, *([1] * len(rest)))
        share = share / max(x[0, 0].numel(), 1)
        over: tuple[int, ...] = (2, *rest)
    else:
        split = wide.unflatten(-1, (groups, channels // groups))
        shape, over = (groups, channels // groups), (-1,)
    share = share.view(shape)
    mean = (split * share).sum(over, keepdim=True)
    variance = ((split - mean).square() * share).sum(over, keepdim=True)
    both = (each.expand_as(split).reshape(x.shape) for each in (mean, (variance + eps).rsqrt()))
    found_mean, scale = both
    return found_mean, scale


def _along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return values.view(shape)
