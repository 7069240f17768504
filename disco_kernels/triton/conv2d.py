"""Implicit-GEMM convolution over listed channels: all virtual nodes in one launch.

Rows of the product are output pixels (``M = batch * OH * OW``), columns a node's output channels,
and the sum runs over taps and the channels that the node reads. Its own channels are a run, read as
in any dense convolution. Others are listed in a table in groups of ``GROUP`` neighbours: with a
group of 16 bytes loads are as wide as those of a run, and an index is read once for all taps.

The geometry is no constant of the compiler, so that a model's layers share few compiled kernels.
``INSIDE`` says that the window is one pixel and never in the padding. Names in capitals of one
letter are sizes; ``s*`` strides in elements.
"""

import triton
import triton.language as tl

from disco_kernels.triton.epilogue import finish
from disco_kernels.triton.precision import product

_PLAIN = ["M", "H", "W", "OH", "OW", "num_out_channels", "num_n_tiles", "tiles_per_node", "taps"]
_PLAIN += ["KW", "SH", "SW", "PH", "PW", "DH", "DW", "record_base", "record_step"]


@triton.jit
def _add_products(
    acc,
    x,
    begin,
    channel,
    listed,
    k,
    count,
    tap,
    scales,
    scale_stride,
    images_per_scale,
    image,
    row_mask,
    oy,
    ox,
    weight,
    columns,
    weight_mask,
    padded_columns,
    num_inputs,
    sc,
    sh,
    sw,
    H,
    W,
    KW,
    SH,
    SW,
    PH,
    PW,
    DH,
    DW,
    INSIDE: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one tap's products over a block of channels."""
    offsets = begin
    pixels = row_mask
    if not INSIDE:
        r = tap // KW
        s = tap - r * KW
        y = oy * SH - PH + r * DH
        z = ox * SW - PW + s * DW
        pixels = row_mask & (y >= 0) & (y < H) & (z >= 0) & (z < W)
        offsets = begin + (r * DH * sh + s * DW * sw)
    if GROUP > 1:
        offsets = tl.multiple_of(offsets, GROUP)
    a = tl.load(
        x + (offsets[:, None] + (channel * sc)[None, :]),
        mask=pixels[:, None] & listed[None, :],
        other=0.0,
    )
    if scales is not None:
        scale_row = (image // images_per_scale) * scale_stride
        scale = tl.load(
            scales + scale_row[:, None] + channel[None, :],
            mask=row_mask[:, None] & listed[None, :],
            other=0.0,
        )
        a = a.to(tl.float32) * scale
    rows = tap * num_inputs + k
    b = tl.load(
        weight + rows[:, None] * padded_columns + columns[None, :],
        mask=(k < count)[:, None] & weight_mask[None, :],
        other=0.0,
    )
    return product(a.to(b.dtype), b, acc, PRECISION)


@triton.jit
def _word(nodes, base, step, node, NODE_WORDS: tl.constexpr, PLACE: tl.constexpr):
    """A word of a node's record: computed where the records are evenly spaced, else loaded."""
    if base is None:
        word = tl.load(nodes + node * NODE_WORDS + PLACE)
    else:
        word = base[PLACE] + node * step[PLACE]
    return word


@triton.jit(do_not_specialize=_PLAIN)
def conv2d_kernel(
    # Per part: a tensor, its strides (image, channel, row, column), and for int8 its scales, their
    # rows' stride and how many images share a row.
    xs,
    x_strides,
    scales,
    scale_strides,
    images_per_scale,
    weight,
    bias,
    residual,
    residual_strides,
    out,
    out_strides,
    messages,
    message_channels,
    positions,
    # int32 tables, see `disco_kernels.triton.tables`.
    tiles,
    nodes,
    channels,
    out_channels,
    # The first node's record and what is added for every further one, or None.
    record_base,
    record_step,
    tiles_per_node,
    M,
    H,
    W,
    OH,
    OW,
    num_out_channels,
    num_n_tiles,
    taps,
    KW,
    SH,
    SW,
    PH,
    PW,
    DH,
    DW,
    NUM_PARTS: tl.constexpr,
    RUNS: tl.constexpr,
    NODE_WORDS: tl.constexpr,
    NUM_MESSAGES: tl.constexpr,
    INSIDE: tl.constexpr,
    GROUP: tl.constexpr,
    OUT_RUNS: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid = tl.program_id(0)
    # Tiles of the same pixels run next to each other: what one reads the others find in the cache.
    tile_m = pid // num_n_tiles
    tile = pid % num_n_tiles
    if record_base is None:
        node = tl.load(tiles + 2 * tile)
        first_n = tl.load(tiles + 2 * tile + 1) // BLOCK_N * BLOCK_N
    else:
        # Every load that another waits for costs as much as a step of the sum.
        node = tile // tiles_per_node
        first_n = (tile % tiles_per_node) * BLOCK_N
    # Weights are padded with zeros to whole vectors of 8 columns. What is a multiple is made one in
    # so many words: loads are as wide as the compiler can prove, and it forgets hints about sums
    # that it rearranges.
    weight_begin = _word(nodes, record_base, record_step, node, NODE_WORDS, 0) // 8 * 8
    num_columns = _word(nodes, record_base, record_step, node, NODE_WORDS, 1)
    padded_columns = _word(nodes, record_base, record_step, node, NODE_WORDS, 2) // 8 * 8
    out_begin = _word(nodes, record_base, record_step, node, NODE_WORDS, 3)
    num_inputs = _word(nodes, record_base, record_step, node, NODE_WORDS, 4)

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    image = rows // (OH * OW)
    pixel = rows % (OH * OW)
    oy = pixel // OW
    ox = pixel % OW
    if OUT_GROUP > 1:
        num_columns = num_columns // OUT_GROUP * OUT_GROUP
        out_begin = out_begin // OUT_GROUP * OUT_GROUP
    columns = first_n + tl.arange(0, BLOCK_N)
    column_mask = columns < num_columns
    weight_mask = columns < padded_columns

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for part in tl.static_range(NUM_PARTS):
        x = xs[part]
        sn, sc, sh, sw = x_strides[part]
        first = _word(nodes, record_base, record_step, node, NODE_WORDS, 5 + 3 * part)
        count = _word(nodes, record_base, record_step, node, NODE_WORDS, 6 + 3 * part)
        if GROUP > 1:
            count = count // GROUP * GROUP
        before = _word(nodes, record_base, record_step, node, NODE_WORDS, 7 + 3 * part)
        first_image = image
        if WIDE:
            first_image = image.to(tl.int64)
        begin = first_image * sn + (oy * SH - PH) * sh + (ox * SW - PW) * sw
        if RUNS[part]:
            # No index: the loads of later steps are under way while this one multiplies.
            if GROUP > 1:
                first = first // GROUP * GROUP
            num_chunks = tl.cdiv(count, BLOCK_K)
            for step in range(0, taps * num_chunks):
                if INSIDE:
                    tap, chunk = 0, step
                else:
                    tap = step // num_chunks
                    chunk = step - tap * num_chunks
                k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
                listed = k < count
                channel = first + k
                acc = _add_products(
                    acc, x, begin, channel, listed, k, count, tap, scales[part],
                    scale_strides[part], images_per_scale[part], image, row_mask, oy, ox,
                    weight + weight_begin + before * padded_columns, columns, weight_mask,
                    padded_columns, num_inputs, sc, sh, sw, H, W, KW, SH, SW, PH, PW, DH, DW,
                    INSIDE, GROUP, PRECISION,
                )  # fmt: skip
        else:
            for chunk in range(0, tl.cdiv(count, BLOCK_G)):
                k = chunk * BLOCK_G + tl.arange(0, BLOCK_G)
                if GROUP == 1:
                    channel = tl.load(channels + first + k)
                    listed = channel >= 0
                else:
                    group = chunk * (BLOCK_G // GROUP) + tl.arange(0, BLOCK_G) // GROUP
                    lowest = tl.load(channels + first + group)
                    listed = tl.max_constancy(lowest >= 0, GROUP)
                    channel = lowest + tl.arange(0, BLOCK_G) % GROUP
                    channel = tl.max_contiguous(tl.multiple_of(channel, GROUP), GROUP)
                for tap in range(0, taps):
                    acc = _add_products(
                        acc, x, begin, channel, listed, k, count, tap, scales[part],
                        scale_strides[part], images_per_scale[part], image, row_mask, oy, ox,
                        weight + weight_begin + before * padded_columns, columns,
                        weight_mask, padded_columns, num_inputs, sc, sh, sw, H, W, KW, SH, SW, PH,
                        PW, DH, DW, INSIDE, GROUP, PRECISION,
                    )  # fmt: skip

    if OUT_RUNS:
        target = out_begin + columns
    else:
        target = tl.load(out_channels + out_begin + columns, mask=column_mask, other=0)
    finish(
        acc, rows, row_mask, image, oy, ox, target, column_mask, bias, residual, residual_strides,
        out, out_strides, messages, message_channels, positions, num_out_channels, NUM_MESSAGES,
        OUT_GROUP, WIDE, ACTIVATION, ACCUMULATE,
    )  # fmt: skip
