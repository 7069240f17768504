"""What a message looks like: the wire dtypes and their layout.

In float32, float16 and bfloat16 a message is ``[*leading, n]``, its leading dimensions those of the
activation without the channels. In int8 it is one row of bytes:

| bytes | |
| --- | --- |
| ``4 * images * n`` | float32 scale ``[images, n]`` |
| ``pixels * n`` | int8 value ``[*leading, n]`` |
| 0 to 3 | zeros, up to a multiple of 4 |

``value * scale`` is what was sent. An image is one entry of the first of two or more leading
dimensions; tokens ``[T, C]`` count as one image. csrc/cpu/gather_pack.h says why.

Conversions round to nearest, ties to even. float16 has infinities beyond 65504 and keeps NaN, as
bfloat16 does. int8 is symmetric: ``scale = max |x| / 127`` over the image's channel, so values are
-127 to 127 and the error is at most ``scale / 2``. A channel below 2**-100 everywhere is sent as
zeros with scale 0. A channel that holds a NaN or an infinity gets the scale NaN: it arrives as NaN
everywhere, rather than as something plausible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NARROW_DTYPES = (torch.float16, torch.bfloat16, torch.int8)
WIRE_DTYPES = (torch.float32, *NARROW_DTYPES)

# Below this, a channel is sent as zeros: 127 / max would be beyond float32, and whether a CPU takes
# denormals for zero would show (kSmallestMagnitude in csrc/cpu/gather_pack.cpp).
SMALLEST_MAGNITUDE = 2.0**-100
# The largest float32 whose 127-fold is finite.
LARGEST_SCALE = float.fromhex("0x1.020406p+121")


def check_wire_dtype(dtype: torch.dtype) -> None:
    if dtype not in WIRE_DTYPES:
        allowed = ", ".join(str(one) for one in WIRE_DTYPES)
        raise ValueError(f"a wire dtype must be one of {allowed}, given {dtype}")


def num_images(leading: Sequence[int]) -> int:
    """How many rows of scales an int8 message with these leading dimensions has."""
    return leading[0] if len(leading) > 1 else 1


def message_numel(dtype: torch.dtype, leading: Sequence[int], num_channels: int) -> int:
    """Elements of a message in ``dtype``."""
    values = math.prod(leading) * num_channels
    if dtype != torch.int8:
        return values
    return (4 * num_images(leading) * num_channels + values + 3) // 4 * 4


def message_shape(dtype: torch.dtype, leading: Sequence[int], num_channels: int) -> tuple[int, ...]:
    """Shape of a message in ``dtype``: one row in int8, ``[*leading, num_channels]`` otherwise."""
    if dtype == torch.int8:
        return (message_numel(dtype, leading, num_channels),)
    return (*leading, num_channels)


def message_views(
    message: Tensor, leading: Sequence[int], num_channels: int
) -> tuple[Tensor, Tensor | None]:
    """A message's values and scales, without a copy.

    Args:
        message: contiguous, as `GatherPack` or `gather_pack_` wrote it, in any wire dtype.
        leading: dimensions of the activation without its channels: ``(B, H, W)`` for a map.
        num_channels: channels of the message.

    Returns:
        values ``[*leading, num_channels]`` and, for int8, scale float32
        ``[images, num_channels]``, else None. Of a map, ``values.permute(0, 3, 1, 2)`` is a
        segment of `PartialConv2d`, and ``scale`` its scale.

    Raises:
        ValueError: the message has another size, or int8 does not begin at a multiple of 4 bytes.
    """
    wanted = message_numel(message.dtype, leading, num_channels)
    if message.numel() != wanted or not message.is_contiguous():
        raise ValueError(
            f"a message of {num_channels} channels over {list(leading)} in {message.dtype} is "
            f"contiguous and has {wanted} elements, given {list(message.shape)} with strides "
            f"{message.stride()}"
        )
    shape = (*leading, num_channels)
    if message.dtype != torch.int8:
        return message.view(shape), None
    flat = message.view(-1)
    images = num_images(leading)
    scale_bytes = 4 * images * num_channels
    try:
        scale = flat[:scale_bytes].view(torch.float32).view(images, num_channels)
    except RuntimeError as error:
        raise ValueError(
            "an int8 message begins with float32 scales, so at a multiple of 4 bytes of its memory"
        ) from error
    values = flat[scale_bytes : scale_bytes + math.prod(shape)].view(shape)
    return values, scale


def write_int8(message: Tensor, values: Tensor) -> None:
    """Quantise ``values`` ``[*leading, n]`` into ``message``: the layout in plain torch."""
    leading, num_channels = values.shape[:-1], values.shape[-1]
    flat = message.view(-1)
    quantised, scale = message_views(flat, leading, num_channels)
    assert scale is not None
    images = scale.shape[0]
    rows = values.float().reshape(images, math.prod(leading) // max(images, 1), num_channels)
    largest = rows.abs().amax(1) if rows.shape[1] else torch.zeros_like(scale)
    known = largest.isfinite()
    used = known & (largest >= SMALLEST_MAGNITUDE)
    steps = torch.full_like(largest, 127)  # `127 / x` would multiply by a rounded reciprocal
    scale.copy_(
        torch.where(
            used, (largest / steps).clamp(max=LARGEST_SCALE), torch.where(known, 0.0, math.nan)
        )
    )
    inverse = torch.where(used, steps / largest, 0.0)
    # Infinity times zero is NaN; whole numbers have none.
    scaled = (rows * inverse[:, None]).nan_to_num(0.0)
    quantised.copy_(scaled.round().to(torch.int8).view(values.shape))
    flat[4 * scale.numel() + quantised.numel() :] = 0


def widened(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A segment ``[B, C, H, W]`` in a wire dtype as ``dtype``; scale ``[G, C]``, G divides B."""
    if scale is None:
        return x.to(dtype)
    repeated = scale.repeat_interleave(x.shape[0] // max(scale.shape[0], 1), dim=0)
    return (x.float() * repeated[:, :, None, None]).to(dtype)
