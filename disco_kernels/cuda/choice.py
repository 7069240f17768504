"""Which kernel computes a layer on Hopper, where one was measured to be faster than Triton's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch

from disco_kernels.cuda.tuned import TUNED
from disco_kernels.spec import ConvSpec
from disco_kernels.triton.tables import Lists, num_channels

CUBLAS = "cublas"  # in the table, beside the tiles of `Conv2dSm90`
_CAPABILITY = (9, 0)  # that the table was measured on
# What a layer may differ by from the one whose measurements it takes.
_MOST_APART = 1.25  # inputs
_MOST_PIXELS_APART = 4.0


class Key(NamedTuple):
    """What a layer is to the table."""

    taps: int
    stride: int
    nodes: int
    columns: int  # output channels of the widest node
    inputs: int  # input channels of the node that reads most

    @classmethod
    def of(cls, lists: Lists, spec: ConvSpec) -> Key:
        return cls(
            math.prod(spec.kernel_size),
            spec.stride[0],
            len(lists.outputs),
            max(map(len, lists.outputs), default=0),
            max(map(num_channels, lists.inputs), default=0),
        )


def measured(key: Key) -> Mapping[int, str | None]:
    """The table's row of a layer, or of the one that differs from it in its inputs alone, and
    least: kernels' times are nearly proportional to them. By output pixels."""

    def apart(other: tuple[int, ...]) -> float:
        return abs(math.log(other[-1] / max(1, key.inputs)))

    alike = [other for other in TUNED if other[:-1] == key[:-1]]
    nearest = min(alike, key=apart, default=None)
    if nearest is None or apart(nearest) > math.log(_MOST_APART):
        return {}
    return TUNED[nearest]


def choose(row: Mapping[int, str | None], pixels: int) -> str | None:
    """What is fastest for so many output pixels: a tile of `Conv2dSm90`, `CUBLAS`, or None for the
    Triton kernel, with which also stays what nothing like it was measured of."""

    def apart(size: int) -> float:
        return abs(math.log(size / max(1, pixels)))

    nearest = min(row, key=apart, default=None)
    if nearest is None or apart(nearest) > math.log(_MOST_PIXELS_APART):
        return None
    return row[nearest]


@lru_cache(maxsize=64)
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == _CAPABILITY
