"""Checks and layout, shared by the prepared kernels and the dispatcher's operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from disco_kernels.registry import PreparedConv2d
from disco_kernels.spec import Channels, Conv2dDescriptor

# Up to here kernels take any channel stride (kFewChannels in csrc/cpu/conv2d.h).
FEW_CHANNELS = 8

_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def channels_last(x: Tensor, name: str) -> Tensor:
    """``x`` ``[B, C, H, W]`` with a channel stride of 1, copied only if it has another."""
    if x.dim() != 4:
        raise ValueError(f"{name} must be [B, C, H, W], given {x.dim()} dimensions {_shape(x)}")
    x = x.resolve_neg()  # the kernels read the memory, which a lazy negation has not reached
    if x.stride(1) == 1 or x.shape[1] <= 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def as_sources(segments: Sequence[Tensor]) -> list[Tensor]:
    """The segments as kernels take them: channels last, or as they lie if all have few channels.

    An image of three planes would otherwise be copied twice: kernels put few channels into a
    layout of their own.
    """
    if all(x.dim() == 4 and x.shape[1] <= FEW_CHANNELS for x in segments):
        return [x.resolve_neg() for x in segments]
    return [channels_last(x, f"segment {s}") for s, x in enumerate(segments)]


def tokens_as_image(x: Tensor, name: str) -> Tensor:
    """``[..., C]`` as ``[tokens, C, 1, 1]``, without a copy where the strides allow it.

    Tokens are images of one pixel rather than pixels of one image: no token is then no image,
    which is legal, and not an image of no width, which is not.
    """
    if x.dim() < 1:
        raise ValueError(f"{name} must be [..., C], given a scalar")
    tokens = math.prod(x.shape[:-1])
    return channels_last(x.reshape(tokens, 1, 1, x.shape[-1]).permute(0, 3, 1, 2), name)


def image_as_tokens(y: Tensor, leading: Sequence[int]) -> Tensor:
    """The inverse of `tokens_as_image`: ``[tokens, O, 1, 1]`` -> ``[*leading, O]``."""
    return y.permute(0, 2, 3, 1).reshape(*leading, y.shape[1])


def index_tensor(values: Sequence[int] | Tensor, num_channels: int, name: str) -> Tensor:
    """A contiguous int32 index in CPU memory, its values checked against ``num_channels``."""
    index = torch.as_tensor(values, device="cpu")
    if index.numel() and index.dtype not in _INDEX_DTYPES:
        raise ValueError(f"{name} must hold whole numbers, given {index.dtype}")
    if index.numel():
        # Before the conversion, which would fold larger numbers into the allowed ones.
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= num_channels:
            raise ValueError(
                f"{name} holds channel {low if low < 0 else high}; allowed are 0 to "
                f"{num_channels - 1}"
            )
    return index.to(torch.int32).reshape(-1).contiguous()


def channel_run(values: Sequence[int]) -> Channels:
    """The shortest description of a list of channels: a run where it is one, else an index."""
    values = list(values)
    if values == list(range(values[0], values[0] + len(values))) if values else True:
        return Channels(len(values), values[0] if values else 0)
    return Channels(len(values), 0, torch.tensor(values, dtype=torch.int32, device="cpu"))


def empty_output(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised ``[B, channels, height, width]`` tensor in channels-last memory."""
    return torch.empty(
        (like.shape[0], channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def execute(
    prepared: PreparedConv2d,
    descriptor: Conv2dDescriptor,
    sources: Sequence[Tensor],
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Check what the call brings, allocate ``out`` if none is given, run.

    Args:
        sources: ``[B, C_s, H, W]`` tensors from `as_sources`, one dtype and device.
        packed_weight, bias: as packed for ``descriptor``; bias ``[O]`` or None.
        residual: ``[B, O, OH, OW]`` or None, added before the activation.
        out: ``[B, O, OH, OW]``, channel stride 1, or None. Must not overlap a source.
        accumulate: add onto what ``out`` holds; bias is then not added.
    """
    x = sources[0]
    extent, dtype, device = x.shape, x.dtype, x.device
    for s, other in enumerate(sources[1:], 1):
        same_extent = other.shape[0] == extent[0] and other.shape[2:] == extent[2:]
        if not same_extent or other.dtype != dtype or other.device != device:
            raise ValueError(
                f"segment {s} is {_shape(other)} {other.dtype} on {other.device}; every segment "
                f"must have the batch, height, width, dtype and device of segment 0, which is "
                f"{_shape(x)} {dtype} on {device}"
            )
    if packed_weight.dtype != dtype or packed_weight.device != device:
        raise ValueError(
            f"the weights are {packed_weight.dtype} on {packed_weight.device}, the input is "
            f"{dtype} on {device}; convert one of them"
        )
    for s, needed in enumerate(descriptor.channels_needed):
        if sources[s].shape[1] < needed:
            raise ValueError(
                f"segment {s} has {sources[s].shape[1]} channels; the weights were packed for "
                f"{needed}"
            )
    height, width = descriptor.spec.output_size(extent[2], extent[3])
    shape = (extent[0], descriptor.out_channels, height, width)
    if residual is not None:
        _check_result("residual", residual, shape, x)
        residual = channels_last(residual, "residual")
    if bias is not None:
        _check_result("bias", bias, shape[1:2], x)
        bias = bias.resolve_neg().contiguous()
    if out is None:
        out = empty_output(x, *shape[1:])
    else:
        _check_result("out", out, shape, x)
        if (out.stride(1) != 1 and out.shape[1] > 1) or out.is_neg():
            raise ValueError(
                f"out must have a channel stride of 1 and no lazy negation, given strides "
                f"{out.stride()}"
            )
    prepared.run(sources, packed_weight, bias, residual, out, accumulate)
    return out


def _check_result(name: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if value.shape != shape or value.dtype != x.dtype or value.device != x.device:
        raise ValueError(
            f"{name} must be {list(shape)} {x.dtype} on {x.device}, given {_shape(value)} "
            f"{value.dtype} on {value.device}"
        )


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
