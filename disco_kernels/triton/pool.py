"""Pooling, channels last."""

import triton
import triton.language as tl


# Sizes and geometry come as plain numbers, so that a model's layers share compiled kernels.
@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "num_channels"])
def max_pool2d_kernel(
    x,
    x_strides,
    out,
    out_strides,
    M,
    H,
    W,
    OH,
    OW,
    num_channels,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask = rows < M
    channel_mask = channel < num_channels
    image = (rows // (OH * OW)).to(tl.int64)
    pixel = rows % (OH * OW)
    oy = pixel // OW
    ox = pixel % OW
    sn, sc, sh, sw = x_strides
    begin = image * sn + (oy * SH - PH) * sh + (ox * SW - PW) * sw
    largest = tl.full((BLOCK_M, BLOCK_C), float("-inf"), dtype=tl.float32)
    for r in tl.static_range(KH):
        for s in tl.static_range(KW):
            y = oy * SH - PH + r * DH
            z = ox * SW - PW + s * DW
            pixels = row_mask & (y >= 0) & (y < H) & (z >= 0) & (z < W)
            offsets = begin + (r * DH * sh + s * DW * sw)
            a = tl.load(
                x + (offsets[:, None] + (channel * sc)[None, :]),
                mask=pixels[:, None] & channel_mask[None, :],
                other=float("-inf"),
            ).to(tl.float32)
            largest = tl.where((a > largest) | (a != a), a, largest)  # NaN wins
    out_pixel = image * out_strides[0] + oy * out_strides[1] + ox * out_strides[2]
    tl.store(
        out + (out_pixel[:, None] + channel[None, :]),
        largest.to(out.dtype.element_ty),
        mask=row_mask[:, None] & channel_mask[None, :],
    )


# Sizes and geometry come as plain numbers, so that a model's layers share compiled kernels.
@triton.jit(do_not_specialize=["num_pixels", "W", "num_channels"])
def global_avg_pool2d_kernel(
    x,
    x_strides,
    out,
    out_stride,
    num_pixels,
    W,
    num_channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < num_channels
    sn, sc, sh, sw = x_strides
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(0, num_pixels, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        offsets = image * sn + (pixel // W) * sh + (pixel % W) * sw
        values = tl.load(
            x + (offsets[:, None] + (channel * sc)[None, :]),
            mask=(pixel < num_pixels)[:, None] & channel_mask[None, :],
            other=0.0,
        )
        total += tl.sum(values.to(tl.float32), axis=0)
    mean = total / num_pixels
    tl.store(out + image * out_stride + channel, mean.to(out.dtype.element_ty), mask=channel_mask)
