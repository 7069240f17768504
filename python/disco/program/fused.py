"""The fused ops of captured programs as plain torch functions: definition and oracle in one.

Activations are those that the kernels have in their epilogue (`disco_kernels.ACTIVATIONS`, by the
same names); every other one stays an op of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from disco.errors import InputError

_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
}
ACTIVATIONS = tuple(_ACTIVATION)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
) -> Tensor:
    """``activation(conv2d(x) + bias + residual)``.

    Args:
        x: ``[B, I, H, W]``.
        weight: ``[O, I / groups, kh, kw]``.
        bias: ``[O]``.
        residual: ``[B, O, OH, OW]``.
        activation: one of `ACTIVATIONS`.
    """
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _epilogue(y, residual, activation)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, activation: str
) -> Tensor:
    """``activation(x @ weight.T + bias + residual)``: x ``[..., I]``, weight ``[O, I]``."""
    return _epilogue(F.linear(x, weight, bias), residual, activation)


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor, *, activation: str) -> Tensor:
    """``activation(x * scale + shift)`` along dim 1: a batch norm that stays alone.

    Args:
        x: ``[B, C, ...]``.
        scale, shift: ``[C]``.
    """
    shape = (-1, *([1] * (x.dim() - 2)))
    return _epilogue(torch.addcmul(shift.view(shape), x, scale.view(shape)), None, activation)


def check_attributes(kind: str, name: str, attributes: Mapping[str, object]) -> None:
    """Raise InputError if op `name` of this kind names an activation that is not known here."""
    activation = attributes.get("activation", "none")
    if kind.startswith("disco.") and activation not in ACTIVATIONS:
        raise InputError(
            f"op {name!r} ({kind}) has the activation {activation!r}; this release knows "
            f"{', '.join(ACTIVATIONS)}: install the release that wrote the program, or make it "
            "again"
        )


def take(x: Tensor, index: Tensor, *, dim: int) -> Tensor:
    """The entries `index` (int32) of `x` along `dim`."""
    return x.index_select(dim, index)


def _epilogue(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    if residual is not None:
        y = y + residual
    return _ACTIVATION[activation](y)


def part_of_sum(x: Tensor, *, dim: int, square: bool) -> Tensor:
    """Sum of ``x``, or of its squares, over ``dim``, which stays with size 1: zero for no entry."""
    return (x.square() if square else x).sum(dim, keepdim=True)


def sum_of_parts(parts: Tensor, *, dim: int, keepdim: bool, size: int, how: str) -> Tensor:
    """What the sums of parts come to.

    Args:
        parts: ``[.., parts, ..]``, of squares for a norm.
        dim: of the parts.
        keepdim: leave it with size 1.
        size: entries that were summed up, over all parts.
        how: "sum", "mean" or "norm" (2-norm).
    """
    total = parts.sum(dim, keepdim=keepdim)
    if how == "mean":
        return total / size
    return total.sqrt() if how == "norm" else total


def moments(x: Tensor) -> Tensor:
    """Mean and sum of squared differences from it over the last dimension: ``[.., C] -> [.., 2]``.

    Zeros for no channels. In float32 for narrower dtypes, whose sums would not do.
    """
    wide = x if x.dtype == torch.float64 else x.float()
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
    means, squares = pairs[..., 0], pairs[..., 1]
    sizes = torch.tensor(counts, dtype=means.dtype, device=x.device)
    total = sum(counts)
    mean = (means * sizes).sum(-1, keepdim=True) / total
    variance = (squares + sizes * (means - mean).square()).sum(-1, keepdim=True) / total
    y = (x - mean) * (variance + eps).rsqrt()
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias).to(x.dtype)
