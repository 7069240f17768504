"""The shipped choice between direct convolution and Winograd, made when weights are packed.

It depends on the layer's shape alone, so every rank and every run chooses the same; nothing is
timed at load. The measurements are in ``benchmarks/results``; ``benchmarks/bench_winograd.py``
repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def alternatives_of(
    spec: ConvSpec,
    out_channels: int,
    in_channels: int,
    image_size: Pair | None,
    backend: str,
    dtype: torch.dtype,
) -> tuple[str, ...]:
    """What ``spec.winograd`` allows for a layer, what suits its shape best first.

    "auto" allows the choice for the shape and all that packs fewer bytes.
    """
    if spec.winograd != "auto" or spec.input_bytes is not None:
        return (spec.algorithm,)
    if backend != "cpu":
        return ("off",)
    chosen = choose_winograd(spec, out_channels, in_channels, image_size, dtype)
    return _BY_BYTES[_BY_BYTES.index(chosen) :]


# From most packed bytes to least.
_BY_BYTES = ("f4", "f2", "off")

# Multiplications for an output pixel of one pair of an input and an output channel, 3 x 3.
_MULTIPLICATIONS = {"off": 9.0, "f2": 4.0, "f4": 2.25}


def multiplications_saved(algorithm: str, pairs: int, pixels: int) -> float:
    """By a layer of so many pairs of an input and an output channel, against direct convolution."""
    direct = _MULTIPLICATIONS["off"]
    return (direct - _MULTIPLICATIONS.get(algorithm, direct)) * pairs * pixels


def fit_packed_bytes(layers: Sequence[Sequence[tuple[int, float]]], limit: int | None) -> list[int]:
    """Choose an alternative a layer so that all packed weights together fit.

    Args:
        layers: per layer its alternatives, best first: packed bytes, multiplications saved an
            image.
        limit: of the sum of the bytes; None takes the best of every layer.

    Returns:
        Per layer the place of its alternative. What saves fewest multiplications a byte is given
        up first; equal layers in their order.

    Raises:
        ValueError: the last alternatives together do not fit.
    """
    chosen = [0] * len(layers)
    if limit is None:
        return chosen
    total = sum(alternatives[0][0] for alternatives in layers)
    least = sum(min(num_bytes for num_bytes, _ in alternatives) for alternatives in layers)
    if least > limit:
        raise ValueError(
            f"the packed weights need at least {least} bytes, and {limit} are allowed: allow more"
        )

    def loss(layer: int) -> float:
        """Of the next step down, a byte."""
        (given, saved), (kept, still_saved) = layers[layer][chosen[layer] :][:2]
        return (saved - still_saved) / max(given - kept, 1)

    while total > limit:
        left = [i for i, place in enumerate(chosen) if place + 1 < len(layers[i])]
        down = min(left, key=loss)
        total += layers[down][chosen[down] + 1][0] - layers[down][chosen[down]][0]
        chosen[down] += 1
    # The last step may have freed more than was needed.
    for i in sorted(range(len(layers)), key=lambda i: layers[i][chosen[i]][1] - layers[i][0][1]):
        for place in range(chosen[i]):
            now = total + layers[i][place][0] - layers[i][chosen[i]][0]
            if now <= limit:
                total, chosen[i] = now, place
                break
    return chosen
