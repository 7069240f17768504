"""What happens to a sum before it is written: bias, residual, activation, and the messages."""

import triton
import triton.language as tl

from disco_kernels.triton.activation import activate


@triton.jit
def finish(
    acc,
    rows,
    row_mask,
    image,
    oy,
    ox,
    target,
    column_mask,
    bias,
    residual,
    residual_strides,
    out,
    out_strides,
    messages,
    message_channels,
    positions,
    num_out_channels,
    NUM_MESSAGES: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Writes sums ``[pixels, channels]`` to the channels ``target`` of the pixels ``rows``.

    A message gets the channels that ``positions`` gives a place in it, as they are written.
    """
    mask = row_mask[:, None] & column_mask[None, :]
    if bias is not None:
        acc += tl.load(bias + target, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if WIDE:
        image = image.to(tl.int64)
    out_pixel = image * out_strides[0] + oy * out_strides[1] + ox * out_strides[2]
    if OUT_GROUP > 1:
        out_pixel = tl.multiple_of(out_pixel, OUT_GROUP)
    out_pointers = out + (out_pixel[:, None] + target[None, :])
    if ACCUMULATE:
        acc += tl.load(out_pointers, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        pixel = image * residual_strides[0] + oy * residual_strides[1] + ox * residual_strides[2]
        if OUT_GROUP > 1:
            pixel = tl.multiple_of(pixel, OUT_GROUP)
        added = tl.load(residual + (pixel[:, None] + target[None, :]), mask=mask, other=0.0)
        acc += added.to(tl.float32)
    result = activate(acc, ACTIVATION).to(out.dtype.element_ty)
    tl.store(out_pointers, result, mask=mask)
    for d in tl.static_range(NUM_MESSAGES):
        position = tl.load(positions + d * num_out_channels + target, mask=column_mask, other=-1)
        message = messages[d]
        line = rows
        if WIDE:
            line = rows.to(tl.int64)
        tl.store(
            message + ((line * message_channels[d])[:, None] + position[None, :]),
            result.to(message.dtype.element_ty),
            mask=row_mask[:, None] & (position >= 0)[None, :],
        )
