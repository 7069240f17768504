"""The shipped choice between direct convolution and Winograd, made when weights are packed.

It depends on the layer's shape alone, so every rank and every run chooses the same; nothing is
timed at load. The measurements are in ``benchmarks/results``; ``benchmarks/bench_winograd.py``
repeats them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from disco_kernels.spec import ConvSpec, Pair

# Fewer channels fill less than a vector on either side, and the transforms are not paid back.
_FEWEST_CHANNELS = 16

# Output pixels of a map (at least) -> algorithm, largest maps first. The saving grows with the
# tile, but a weight becomes 16 or 36 words for 9, and the fewer pixels share it, the more reading
# it costs: F(4x4) needs maps of many tiles, and on the smallest maps nothing pays. What counts is a
# whole pass, whose weights come from memory: hot and alone, F(4x4) is also the fastest at 14 x 14
# and F(2x2) at 7 x 7. ResNet-50 for two nodes at density 0.2, batch 1, with those choices takes
# 19.2 ms on one thread and packs 91 MB; with these 18.6 ms and 63 MB (on two threads 10.5 and 10.0
# ms, in batches of 8 77 and 75).
#
# In bfloat16 direct convolution is twice as fast. So is F(2x2), which multiplies in bfloat16, but
# not F(4x4), which does so in float32: 5.87 ms on two threads with these, 6.14 without F(2x2) and
# 6.27 with it at 7 x 7 as well (one thread 10.97, 11.69, 10.92; batches of 8 44.8, 47.9, 44.5).
_BY_PIXELS = {
    torch.float32: ((784, "f4"), (196, "f2")),
    torch.bfloat16: ((3136, "f4"), (196, "f2")),
}


def choose_winograd(
    spec: ConvSpec,
    out_channels: int,
    in_channels: int,
    image_size: Pair | None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """``"off"``, ``"f2"`` or ``"f4"`` for one layer.

    Args:
        spec: geometry; its own ``winograd`` is not looked at.
        out_channels, in_channels: of one node.
        image_size: (height, width) of the input in pixels; None if not known, which gives "off".
        dtype: of activations and weights.
    """
    if not spec.winograd_fits or image_size is None:
        return "off"
    if min(out_channels, in_channels) < _FEWEST_CHANNELS:
        return "off"
    height, width = spec.output_size(*image_size)
    for pixels, algorithm in _BY_PIXELS.get(dtype, ()):
        if height * width >= pixels:
            return algorithm
    return "off"


def resolve_winograd(
    spec: ConvSpec,
    out_channels: int,
    in_channels: int,
    image_size: Pair | None,
    backend: str,
    dtype: torch.dtype,
) -> ConvSpec:
    """``spec`` with "auto" replaced by a choice; what has no Winograd gets "off"."""
    if spec.winograd != "auto":
        return spec
    if backend != "cpu":
        return replace(spec, winograd="off")
    chosen = choose_winograd(spec, out_channels, in_channels, image_size, dtype)
    return replace(spec, winograd=chosen)
