"""The launch that widens a received message into channels of an activation."""

from __future__ import annotations

import torch
from torch import Tensor

from disco_kernels.cuda import device as devices
from disco_kernels.cuda.arguments import WidenArgs, formats, magic_of, map_of, stride_multiple
from disco_kernels.cuda.launcher import Launcher, get_launcher
from disco_kernels.cuda.tiles import tile_pixels
from disco_kernels.wire import WIRE_DTYPES

_VECTOR_BYTES = 16
_OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A pixel's values are read through by one multiplication: see quotient() in csrc/cuda.
_MOST_CHANNELS = 2**15 - 1


def widen_(
    values: Tensor, scale: Tensor | None, out: Tensor, launcher: Launcher | None = None
) -> None:
    """Write a message's values, times their scales, to ``out``, in one launch.

    Args:
        values: contiguous ``[B, H, W, n]`` in a wire dtype, as of `disco_kernels.message_views`.
        scale: float32 ``[G, n]``, a row for every ``B / G`` images, if the values are int8; else
            None.
        out: ``[B, n, H, W]`` float32, float16 or bfloat16, channel stride 1: some channels of a
            wider activation, for instance ``x[:, 64:64 + n]``. Rounded to nearest, ties to even.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    _check(values, scale, out)
    if out.numel() == 0:
        return
    batch, channels, height, width = out.shape
    count = _count(values, out)
    groups, pixels = channels // count, batch * height * width
    tile = tile_pixels(pixels, groups, 1, 1, devices.multiprocessors(out.device))
    rows = 1 if scale is None else scale.shape[0]
    args = WidenArgs(
        map_of(out),
        values.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        pixels,
        pixels // rows,
        channels,
        groups,
        magic_of(groups),
        tile,
        0,
    )
    kernel = f"disco_widen_{formats(values.dtype, out.dtype)}_{count}"
    with devices.current(out.device):
        stream = devices.stream_of(out.device)
        (launcher or get_launcher()).launch(kernel, -(-pixels // tile), args, out.device, stream)


def _count(values: Tensor, out: Tensor) -> int:
    """Channels a load: as many as make 16 bytes on the wider side, or 1."""
    count = _VECTOR_BYTES // max(values.itemsize, out.itemsize)
    fits = out.shape[1] % count == 0 and stride_multiple(out, count)
    return count if fits and values.data_ptr() % (count * values.itemsize) == 0 else 1


def _check(values: Tensor, scale: Tensor | None, out: Tensor) -> None:
    if out.dim() != 4 or out.dtype not in _OUT_DTYPES or (out.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(
            "out must be [B, C, H, W] in float32, float16 or bfloat16 with a channel stride of 1, "
            f"given {list(out.shape)} {out.dtype} with strides {out.stride()}"
        )
    batch, channels, height, width = out.shape
    wanted = (batch, height, width, channels)
    if tuple(values.shape) != wanted or not values.is_contiguous():
        raise ValueError(
            f"values must be contiguous {list(wanted)}, given {list(values.shape)} with strides "
            f"{values.stride()}"
        )
    if values.dtype not in WIRE_DTYPES or values.device != out.device:
        raise ValueError(
            f"values must be in a wire dtype and on {out.device}, given {values.dtype} on "
            f"{values.device}"
        )
    if channels > _MOST_CHANNELS:
        raise ValueError(f"at most {_MOST_CHANNELS} channels, given {channels}")
    if (values.dtype == torch.int8) != (scale is not None):
        raise ValueError(f"int8 values need a scale and others have none, given {values.dtype}")
    if scale is not None:
        fits = scale.dim() == 2 and scale.shape[1] == channels and scale.dtype == torch.float32
        divides = fits and scale.shape[0] > 0 and batch % scale.shape[0] == 0
        if not (divides and scale.is_contiguous() and scale.device == out.device):
            raise ValueError(
                f"scale must be contiguous float32 [G, {channels}] on {out.device}, G a divisor of "
                f"{batch} images, given {list(scale.shape)} {scale.dtype} on {scale.device}"
            )
