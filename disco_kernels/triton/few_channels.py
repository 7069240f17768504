"""Convolution of an image of few channels: taps and channels together are the sum's dimension.

A tap of three channels would fill a fifth of a matrix instruction and load single elements. So the
image is first written with its padding, as pixels of 4 or 8 channels: then a load is a whole pixel,
and none is outside. The rows of the weight for channels that do not exist are not read.
"""

import triton
import triton.language as tl

from disco_kernels.triton.epilogue import finish
from disco_kernels.triton.precision import product

_PLAIN = ["M", "OH", "OW", "C", "num_out_channels", "taps", "KW", "SH", "SW", "DH", "DW"]


@triton.jit(do_not_specialize=["P", "H", "W", "PH", "PW", "PADDED_H", "PADDED_W", "C"])
def pad_kernel(
    x,
    x_strides,
    padded,
    first_channel,
    C,
    P,
    H,
    W,
    PH,
    PW,
    PADDED_H,
    PADDED_W,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``[B, C, H, W]`` of any strides as zero-padded pixels ``[B, PADDED_H, PADDED_W, CHANNELS]``,
    ``P`` of them."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    image = (pixel // (PADDED_H * PADDED_W)).to(tl.int64)
    y = pixel // PADDED_W % PADDED_H - PH
    z = pixel % PADDED_W - PW
    channel = tl.arange(0, CHANNELS)
    sn, sc, sh, sw = x_strides
    inside = (pixel < P) & (y >= 0) & (y < H) & (z >= 0) & (z < W)
    values = tl.load(
        x + ((image * sn + y * sh + z * sw)[:, None] + ((first_channel + channel) * sc)[None, :]),
        mask=inside[:, None] & (channel < C)[None, :],
        other=0.0,
    )
    target = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(padded + target, values, mask=(pixel < P)[:, None])


@triton.jit(do_not_specialize=_PLAIN)
def few_channels_kernel(
    padded,
    padded_strides,
    weight,
    bias,
    residual,
    residual_strides,
    out,
    out_strides,
    messages,
    message_channels,
    positions,
    M,
    OH,
    OW,
    C,
    num_out_channels,
    taps,
    KW,
    SH,
    SW,
    DH,
    DW,
    CHANNELS: tl.constexpr,
    NUM_MESSAGES: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_n_tiles = tl.cdiv(num_out_channels, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // num_n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (pid % num_n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    column_mask = columns < num_out_channels
    if OUT_GROUP > 1:
        column_mask = columns < tl.multiple_of(num_out_channels, OUT_GROUP)
    padded_columns = tl.multiple_of((num_out_channels + 7) // 8 * 8, 8)
    image = rows // (OH * OW)
    pixel = rows % (OH * OW)
    oy = pixel // OW
    ox = pixel % OW
    first_image = image
    if WIDE:
        first_image = image.to(tl.int64)
    sn, sh = padded_strides
    begin = first_image * sn + oy * SH * sh + ox * SW * CHANNELS
    begin = tl.multiple_of(begin, CHANNELS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for chunk in range(0, tl.cdiv(taps * CHANNELS, BLOCK_K)):
        k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = k // CHANNELS
        channel = k % CHANNELS
        offsets = (tap // KW) * DH * sh + (tap % KW) * DW * CHANNELS + channel
        offsets = tl.max_contiguous(tl.multiple_of(offsets, CHANNELS), CHANNELS)
        exists = tl.max_constancy(tap < taps, CHANNELS)
        a = tl.load(
            padded + (begin[:, None] + offsets[None, :]),
            mask=row_mask[:, None] & exists[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + (tap * C + channel)[:, None] * padded_columns + columns[None, :],
            mask=((tap < taps) & (channel < C))[:, None] & (columns < padded_columns)[None, :],
            other=0.0,
        )
        acc = product(a, b, acc, PRECISION)
    finish(
        acc, rows, row_mask, image, oy, ox, columns, column_mask, bias, residual, residual_strides,
        out, out_strides, messages, message_channels, positions, num_out_channels, NUM_MESSAGES,
        OUT_GROUP, WIDE, ACTIVATION, ACCUMULATE,
    )  # fmt: skip
