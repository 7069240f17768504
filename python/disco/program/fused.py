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


def widen(x: Tensor, *, scale: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    """A payload in a wire dtype as a tensor of `dtype`.

    Args:
        x: ``[.., n, ..]`` with the channels in `dim`.
        scale: float32 ``[images, n]`` of int8, None of others; an image is an entry of the first
            other dimension.
        dim: of the channels.
        dtype: floating.
    """
    if scale is None:
        return x.to(dtype)
    # In float32, as a kernel widens it that reads the payload itself.
    return (x.float() * scale_of_images(scale, x.dim(), dim)).to(dtype)


def scale_of_images(scale: Tensor, num_dims: int, dim: int) -> Tensor:
    """Scales ``[images, n]`` so that they broadcast over a payload with its channels in `dim`."""
    images = 1 if dim == 0 else 0
    view = scale.T if images > dim else scale
    shape = [1] * num_dims
    shape[images], shape[dim] = scale.shape
    return view.reshape(shape)


def add_partial_sums(
    base: Tensor | None,
    pieces: tuple[Tensor, ...],
    *,
    index: tuple[Tensor | None, ...],
    dim: int,
    channels: int,
) -> Tensor:
    """What other ranks have computed of this rank's outputs, and a residual, added up.

    Args:
        base: ``[.., channels, ..]`` or None.
        pieces: one or more, with entries along `dim` for some of the channels.
        index: of each piece the channels (int32) that it is for; None for all of them.
        dim: that of the channels.
        channels: of the result.
    """
    if base is None:
        shape = list(pieces[0].shape)
        shape[dim] = channels
        # Laid out as the pieces are: messages have their channels last.
        base = pieces[0].new_zeros(shape).movedim(dim, -1).contiguous().movedim(-1, dim)
    for piece, positions in zip(pieces, index, strict=True):
        base = base + piece if positions is None else base.index_add(dim, positions, piece)
    return base


def layer_of_parts(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    dim: int,
    parts: int,
    activation: str,
) -> Tensor:
    """``activation(sum of parts + bias + residual)``, added up in the order of the parts.

    Args:
        x: ``[.., parts * channels, ..]``, part by part.
        bias: ``[channels]``.
        residual: ``[.., channels, ..]``.
        dim: that of the channels.
        parts: how many there are.
        activation: one of `ACTIVATIONS`.
    """
    first, *others = x.chunk(parts, dim)
    y = first if bias is None else first + bias.view(-1, *([1] * (x.dim() - 1 - dim)))
    for part in others:
        y = y + part
    return _epilogue(y, residual, activation)


def _epilogue(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    if residual is not None:
        y = y + residual
    return _ACTIVATION[activation](y)


def part_of_sum(x: Tensor, *, dim: int, square: bool) -> Tensor:
    """Sum of ``x``, or of its squares, over ``dim``, which stays with size 1: zero for no entry."""
    return (x.square() if square else x).sum(dim, keepdim=True)


def sum_of_parts(
    parts: Tensor,
    *,
    dim: int,
    keepdim: bool,
    size: int,
    how: str,
    counts: tuple[int, ...] = (),
) -> Tensor:
    """What the sums of parts come to.

    Args:
        parts: ``[.., parts, ..]``, of squares for a norm.
        dim: of the parts.
        keepdim: leave it with size 1.
        size: entries that were summed up, over all parts.
        how: "sum", "mean" or "norm" (2-norm).
        counts: entries of each part, where they are known: a mean is over their sum then.
    """
    total = parts.sum(dim, keepdim=keepdim)
    if how == "mean":
        return total / (sum(counts) or size)
    return total.sqrt() if how == "norm" else total
