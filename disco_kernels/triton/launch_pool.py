"""The launches of pooling."""

from __future__ import annotations

from torch import Tensor

from disco_kernels.spec import ConvSpec
from disco_kernels.triton.arguments import geometry, pixel_strides, power_of_two, strides
from disco_kernels.triton.pool import global_avg_pool2d_kernel, max_pool2d_kernel


def max_pool2d_(x: Tensor, window: ConvSpec, out: Tensor) -> None:
    """As `Backend.max_pool2d_`."""
    batch, channels, height, width = out.shape
    pixels = batch * height * width
    if out.numel() == 0:
        return
    block_c = min(64, power_of_two(channels))
    block_m = 2048 // block_c
    max_pool2d_kernel[(-(-pixels // block_m), -(-channels // block_c))](
        x,
        strides(x),
        out,
        pixel_strides(out),
        pixels,
        x.shape[2],
        x.shape[3],
        height,
        width,
        channels,
        **geometry(window),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
    )


def global_avg_pool2d_(x: Tensor, out: Tensor) -> None:
    """As `Backend.global_avg_pool2d_`."""
    batch, channels, height, width = x.shape
    if out.numel() == 0:
        return
    block_c = min(64, power_of_two(channels))
    global_avg_pool2d_kernel[(batch, -(-channels // block_c))](
        x,
        strides(x),
        out,
        out.stride(0),
        height * width,
        width,
        channels,
        BLOCK_P=2048 // block_c,
        BLOCK_C=block_c,
        num_warps=4,
    )
