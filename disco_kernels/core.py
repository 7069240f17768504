"""Checks and layout, shared by the prepared kernels and the dispatcher's operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from disco_kernels.registry import Outgoing, PreparedConv2d
from disco_kernels.spec import Channels, Conv2dDescriptor, GroupedDescriptor
from disco_kernels.wire import NARROW_DTYPES

# Up to here kernels take any channel stride (kFewChannels in csrc/cpu/conv2d.h).
FEW_CHANNELS = 8

_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def refuse_derivatives(who: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if ``who`` would drop a derivative that torch is asked for.

    Of a tensor that requires a gradient while gradients are recorded, or of one with a tangent
    (`torch.autograd.forward_ad`).
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{who} records no gradient, but was given a tensor that requires one; "
            "use it under torch.no_grad(), or train through a swapped module (swap_)"
        )
    # Asking a tensor takes a microsecond, so first whether any can have one.
    if getattr(forward_ad, "_current_level", 0) >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(
            f"{who} computes no tangent, but was given a tensor that has one; give it "
            "torch.autograd.forward_ad.unpack_dual(x).primal, or use a swapped module (swap_)"
        )


def channels_last(x: Tensor, name: str) -> Tensor:
    """``x`` ``[B, C, H, W]`` with a channel stride of 1, copied only if it has another."""
    if x.dim() != 4:
        raise ValueError(f"{name} must be [B, C, H, W], given {x.dim()} dimensions {_shape(x)}")
    x = x.resolve_neg()  # the kernels read the memory, which a lazy negation has not reached
    if x.stride(1) == 1 or x.shape[1] <= 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def as_sources(segments: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The segments as kernels take them: channels last, or as they lie if all have few channels.

    An image of three planes would otherwise be copied twice: kernels put few channels into a
    layout of their own. Wire dtypes other than ``dtype``, the weights', are always read channels
    last.
    """
    if all(
        x.dim() == 4
        and x.shape[1] <= FEW_CHANNELS
        and (x.dtype == dtype or x.dtype not in NARROW_DTYPES)
        for x in segments
    ):
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


def empty_output(
    like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype
) -> Tensor:
    """An uninitialised ``[B, channels, height, width]`` tensor in channels-last memory."""
    return torch.empty(
        (like.shape[0], channels, height, width),
        dtype=dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def execute(
    prepared: PreparedConv2d,
    descriptor: Conv2dDescriptor | GroupedDescriptor,
    sources: Sequence[Tensor],
    packed_weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None = None,
    accumulate: bool = False,
    narrow: bool = False,
    scales: Sequence[Tensor | None] | None = None,
    outgoing: Outgoing | None = None,
) -> Tensor:
    """Check what the call brings, allocate ``out`` if none is given, run.

    Args:
        sources: ``[B, C_s, H, W]`` tensors from `as_sources`, of the weights' dtype and device.
        packed_weight, bias: as packed for ``descriptor``; bias ``[O]`` or None.
        residual: ``[B, O, OH, OW]`` or None, added before the activation.
        out: ``[B, O, OH, OW]``, channel stride 1, or None. Must not overlap a source.
        accumulate: add onto what ``out`` holds; bias is then not added.
        narrow: take sources in a narrow wire dtype, too (not with bfloat16 weights, whose
            sources are bfloat16).
        scales: per source None or, for int8, float32 ``[G, C_s]``: a row for every B / G images.
        outgoing: checked messages for the lists that ``prepared`` was made with, or None.
    """
    x = sources[0]
    extent, device = x.shape, x.device
    dtype = packed_weight.dtype
    if narrow and dtype == torch.bfloat16:
        _refuse_narrow_for_bfloat16(sources)
    if x.dtype != dtype and not (narrow and x.dtype in NARROW_DTYPES):
        raise ValueError(
            f"the weights are {dtype} on {packed_weight.device}, the input is {x.dtype} on "
            f"{device}; convert one of them"
        )
    if packed_weight.device != device:
        raise ValueError(
            f"the weights are on {packed_weight.device}, the input is on {device}; move one of them"
        )
    for s, other in enumerate(sources[1:], 1):
        same_extent = other.shape[0] == extent[0] and other.shape[2:] == extent[2:]
        same_dtype = other.dtype == dtype or (narrow and other.dtype in NARROW_DTYPES)
        if not same_extent or not same_dtype or other.device != device:
            raise ValueError(
                f"segment {s} is {_shape(other)} {other.dtype} on {other.device}; every segment "
                f"must have the batch, height, width and device of segment 0, which is "
                f"{_shape(x)} on {device}, and the weights' dtype {dtype}"
                + (" or a narrow wire dtype" if narrow else "")
            )
    if narrow:
        scales = _checked_scales(scales, sources)
    for s, needed in enumerate(descriptor.channels_needed):
        if sources[s].shape[1] < needed:
            raise ValueError(
                f"segment {s} has {sources[s].shape[1]} channels; the weights were packed for "
                f"{needed}"
            )
    height, width = descriptor.spec.output_size(extent[2], extent[3])
    shape = (extent[0], descriptor.out_channels, height, width)
    if residual is not None:
        _check_result("residual", residual, shape, packed_weight)
        residual = channels_last(residual, "residual")
    if bias is not None:
        _check_result("bias", bias, shape[1:2], packed_weight)
        bias = bias.resolve_neg().contiguous()
    if out is None:
        out = empty_output(x, *shape[1:], dtype=dtype)
    else:
        _check_result("out", out, shape, packed_weight)
        if (out.stride(1) != 1 and out.shape[1] > 1) or out.is_neg():
            raise ValueError(
                f"out must have a channel stride of 1 and no lazy negation, given strides "
                f"{out.stride()}"
            )
    prepared.run(sources, packed_weight, bias, residual, out, accumulate, scales, outgoing)
    return out


def _refuse_narrow_for_bfloat16(sources: Sequence[Tensor]) -> None:
    for s, x in enumerate(sources):
        if x.dtype != torch.bfloat16 and x.dtype in NARROW_DTYPES:
            raise ValueError(
                f"segment {s} is {x.dtype} and the weights are torch.bfloat16, which take segments "
                "in bfloat16 only; send bfloat16 messages, or use float32 weights, which take "
                "every wire dtype"
            )


def _checked_scales(
    scales: Sequence[Tensor | None] | None, sources: Sequence[Tensor]
) -> Sequence[Tensor | None] | None:
    """The scales, contiguous, or None if no segment is int8."""
    if scales is None:
        if all(x.dtype != torch.int8 for x in sources):
            return None
        scales = [None] * len(sources)
    if len(scales) != len(sources):
        raise ValueError(
            f"{len(sources)} segments need as many scales (None unless int8), given {len(scales)}"
        )
    found: list[Tensor | None] = []
    for s, (x, scale) in enumerate(zip(sources, scales, strict=True)):
        if (x.dtype == torch.int8) != (scale is not None):
            raise ValueError(
                f"segment {s} is {x.dtype} and its scale is "
                f"{None if scale is None else _shape(scale)}; int8 needs one, others take none"
            )
        if scale is None:
            found.append(None)
            continue
        groups = scale.shape[0] if scale.dim() == 2 else 0
        fits = scale.dim() == 2 and scale.shape[1] == x.shape[1] and scale.dtype == torch.float32
        divides = x.shape[0] % groups == 0 if groups else x.shape[0] == 0
        if not fits or not divides or scale.device != x.device:
            raise ValueError(
                f"scale {s} must be float32 [G, {x.shape[1]}] on {x.device} with G a divisor of "
                f"{x.shape[0]} (images or tokens), given {_shape(scale)} {scale.dtype} on "
                f"{scale.device}"
            )
        found.append(scale.resolve_neg().contiguous())
    return found


def _check_result(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if value.shape != shape or value.dtype != like.dtype or value.device != like.device:
        raise ValueError(
            f"{name} must be {list(shape)} {like.dtype} on {like.device}, given {_shape(value)} "
            f"{value.dtype} on {value.device}"
        )


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def check_scales_in_place(scales: Sequence[Tensor | None] | None) -> None:
    """Raise ValueError for scales that a call would copy: what is bound has to be itself."""
    for s, scale in enumerate(scales or ()):
        if scale is not None and (not scale.is_contiguous() or scale.is_neg()):
            raise ValueError(
                f"scale {s} {_shape(scale)} with strides {scale.stride()} cannot be bound: the "
                "kernel reads a copy of it; give it contiguous"
            )


def check_in_place(name: str, given: Tensor, read: Tensor) -> None:
    """Raise ValueError if the kernel would read a copy: what is bound has to be itself."""
    if given.data_ptr() != read.data_ptr():
        raise ValueError(
            f"{name} {list(given.shape)} with strides {given.stride()} cannot be bound: the kernel "
            "reads a copy of it; give it in channels-last memory"
        )
