"""Selected channels of a map, packed into the messages of all destinations in one launch."""

import triton
import triton.language as tl


# Sizes and geometry come as plain numbers, so that a model's layers share compiled kernels.
@triton.jit(do_not_specialize=["M", "H", "W"])
def pack_kernel(
    x,
    x_strides,
    messages,
    counts,
    begins,
    channels,
    M,
    H,
    W,
    NUM_MESSAGES: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program writes ``BLOCK_M`` pixels to every message, the lists cut into ``BLOCK_C``."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    line = rows
    if WIDE:
        line = rows.to(tl.int64)
    image = line // (H * W)
    pixel = rows % (H * W)
    sn, sc, sh, sw = x_strides
    offsets = image * sn + (pixel // W) * sh + (pixel % W) * sw
    in_block = tl.arange(0, BLOCK_C)
    if GROUP > 1:
        offsets = tl.multiple_of(offsets, GROUP)
    for d in tl.static_range(NUM_MESSAGES):
        count = counts[d]
        message = messages[d]
        targets = line * count
        if GROUP > 1:
            targets = tl.multiple_of(targets, GROUP)
        for first in range(0, count, BLOCK_C):
            place = first + in_block
            inside = place < count
            if GROUP > 1:
                # Every group is a run of neighbours, so its first channel tells them all.
                base = tl.load(channels + begins[d] + place // GROUP * GROUP, mask=inside, other=0)
                channel = base + in_block % GROUP
                channel = tl.max_contiguous(tl.multiple_of(channel, GROUP), GROUP)
                place = tl.max_contiguous(tl.multiple_of(place, GROUP), GROUP)
                inside = tl.max_constancy(inside, GROUP)
            else:
                channel = tl.load(channels + begins[d] + place, mask=inside, other=0)
            mask = row_mask[:, None] & inside[None, :]
            values = tl.load(x + (offsets[:, None] + (channel * sc)[None, :]), mask=mask, other=0.0)
            tl.store(
                message + (targets[:, None] + place[None, :]),
                values.to(message.dtype.element_ty),
                mask=mask,
            )


# Sizes and geometry come as plain numbers, so that a model's layers share compiled kernels.
@triton.jit(do_not_specialize=["count", "num_pixels", "W"])
def scale_kernel(
    x,
    x_strides,
    scales,
    used_magnitudes,
    channels,
    count,
    num_pixels,
    W,
    SMALLEST: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A scale for every image and listed channel: the largest magnitude over 127, 0 for a channel
    below ``SMALLEST`` everywhere, NaN for one that holds a NaN or an infinity. The magnitudes of
    channels that are not sent as zeros go to ``used_magnitudes``, 0 for others."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = place < count
    channel = tl.load(channels + place, mask=inside, other=0)
    sn, sc, sh, sw = x_strides
    largest = tl.zeros((BLOCK_C,), dtype=tl.float32)
    known = tl.full((BLOCK_C,), 1, dtype=tl.int32)
    for first in range(0, num_pixels, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        offsets = image * sn + (pixel // W) * sh + (pixel % W) * sw
        values = tl.load(
            x + (offsets[:, None] + (channel * sc)[None, :]),
            mask=(pixel < num_pixels)[:, None] & inside[None, :],
            other=0.0,
        )
        magnitude = tl.abs(values.to(tl.float32))
        finite = magnitude < float("inf")
        known = tl.minimum(known, tl.min(finite.to(tl.int32), axis=0))
        largest = tl.maximum(largest, tl.max(tl.where(finite, magnitude, 0.0), axis=0))
    used = (largest >= SMALLEST) & (known == 1)
    scale = tl.minimum(tl.div_rn(largest, tl.full((BLOCK_C,), 127.0, tl.float32)), LARGEST_SCALE)
    scale = tl.where(used, scale, tl.where(known == 1, 0.0, float("nan")))
    tl.store(scales + image * count + place, scale, mask=inside)
    tl.store(used_magnitudes + image * count + place, tl.where(used, largest, 0.0), mask=inside)


# Sizes and geometry come as plain numbers, so that a model's layers share compiled kernels.
@triton.jit(do_not_specialize=["count", "num_pixels", "W"])
def quantise_kernel(
    x,
    x_strides,
    used_magnitudes,
    values,
    channels,
    count,
    num_pixels,
    W,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Listed channels in steps of their scale, rounded to nearest, ties to even."""
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    sn, sc, sh, sw = x_strides
    offsets = image * sn + (pixel // W) * sh + (pixel % W) * sw
    pixels = pixel < num_pixels
    for first in range(0, count, BLOCK_C):
        place = first + tl.arange(0, BLOCK_C)
        inside = place < count
        channel = tl.load(channels + place, mask=inside, other=0)
        mask = pixels[:, None] & inside[None, :]
        given = tl.load(x + (offsets[:, None] + (channel * sc)[None, :]), mask=mask, other=0.0)
        largest = tl.load(used_magnitudes + image * count + place, mask=inside, other=0.0)
        used = largest > 0.0
        steps = tl.full((BLOCK_C,), 127.0, tl.float32)
        inverse = tl.where(used, tl.div_rn(steps, tl.where(used, largest, 1.0)), 0.0)
        scaled = given.to(tl.float32) * inverse[None, :]
        scaled = tl.where(scaled == scaled, scaled, 0.0)
        # Adding and taking away 1.5 * 2**23 rounds to a whole number, ties to even.
        rounded = (scaled + 12582912.0) - 12582912.0
        target = values + ((image * num_pixels + pixel) * count)[:, None] + place[None, :]
        tl.store(target, rounded.to(tl.int8), mask=mask)
