"""Depthwise convolution, channels last: every output channel reads one input channel."""

import triton
import triton.language as tl

from disco_kernels.triton.activation import activate


# Sizes and geometry come as plain numbers, so that a model's layers share compiled kernels.
@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "num_channels"])
def depthwise_kernel(
    x,
    x_strides,
    weight,
    bias,
    residual,
    residual_strides,
    out,
    out_strides,
    M,
    H,
    W,
    OH,
    OW,
    num_channels,
    PER_GROUP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask = rows < M
    channel_mask = channel < num_channels
    image = rows // (OH * OW)
    pixel = rows % (OH * OW)
    oy = pixel // OW
    ox = pixel % OW
    if WIDE:
        image = image.to(tl.int64)
    sn, sc, sh, sw = x_strides
    begin = image * sn + (oy * SH - PH) * sh + (ox * SW - PW) * sw
    source = channel // PER_GROUP
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for r in tl.static_range(KH):
        for s in tl.static_range(KW):
            y = oy * SH - PH + r * DH
            z = ox * SW - PW + s * DW
            pixels = row_mask & (y >= 0) & (y < H) & (z >= 0) & (z < W)
            offsets = begin + (r * DH * sh + s * DW * sw)
            a = tl.load(
                x + (offsets[:, None] + (source * sc)[None, :]),
                mask=pixels[:, None] & channel_mask[None, :],
                other=0.0,
            )
            b = tl.load(
                weight + (r * KW + s) * num_channels + channel, mask=channel_mask, other=0.0
            )
            acc += a.to(tl.float32) * b.to(tl.float32)[None, :]
    mask = row_mask[:, None] & channel_mask[None, :]
    if bias is not None:
        acc += tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    out_pixel = image * out_strides[0] + oy * out_strides[1] + ox * out_strides[2]
    out_pointers = out + (out_pixel[:, None] + channel[None, :])
    if ACCUMULATE:
        acc += tl.load(out_pointers, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        residual_pixel = (
            image * residual_strides[0] + oy * residual_strides[1] + ox * residual_strides[2]
        )
        added = tl.load(
            residual + (residual_pixel[:, None] + channel[None, :]), mask=mask, other=0.0
        )
        acc += added.to(tl.float32)
    tl.store(out_pointers, activate(acc, ACTIVATION).to(out.dtype.element_ty), mask=mask)
