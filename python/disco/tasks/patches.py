"""Pairs of patches cut out of photographs: one of low resolution, and the same in high."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from disco.errors import InputError
from disco.images import Preprocessing
from disco.tasks.data import Example, mixed

Pixels = NDArray[np.uint8]


class Target(NamedTuple):
    """What is wanted of a low-resolution patch.

    Attributes:
        high: float32 [3, scale x size, scale x size] in [0, 1]; of a batch [B, 3, ...].
        photograph: its number in the set, int64 []; of a batch [B].
        scale: of the set.
    """

    high: Tensor
    photograph: Tensor
    scale: int


class Pair(NamedTuple):
    """A photograph, uint8 [3, scale x height, scale x width], and the small one of it."""

    high: Pixels
    low: Pixels


def pair_of(pixels: Pixels, scale: int, size: int) -> Pair:
    """A photograph and its low-resolution version, by Pillow's bicubic filter, which antialiases.

    Rows and columns beyond a multiple of the scale are left out, at the bottom and on the right.

    Args:
        pixels: uint8 [height, width, 3].
        scale: by which it is made smaller.
        size: side of the patches of low resolution.

    Raises:
        InputError: it is smaller than a patch; the photograph is not named.
    """
    height, width = pixels.shape[0] // scale, pixels.shape[1] // scale
    if min(height, width) < size:
        raise InputError(
            f"it has {pixels.shape[1]} x {pixels.shape[0]} pixels, and patches have "
            f"{scale * size} x {scale * size}: give a larger photograph, or a smaller --image-size"
        )
    high = np.ascontiguousarray(pixels[: scale * height, : scale * width])
    low = Image.fromarray(high).resize((width, height), Image.Resampling.BICUBIC)
    return Pair(_planes(high), _planes(np.array(low)))


def _planes(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@dataclass(frozen=True, eq=False)
class Patches:
    """Patches at fixed places of photographs, and at random ones in training.

    Attributes:
        pairs: the photographs.
        places: int64 [n, 3], a patch's photograph, and its top and left in the small photograph.
        refused: why photographs could not be used. Each counts as an example that is refused.
        scale: high resolution over low.
        preprocessing: whose size is that of the low-resolution patches.
        augment: in training take a random place of the photograph, flip it and turn it.
    """

    pairs: tuple[Pair, ...]
    places: NDArray[np.int64]
    refused: tuple[str, ...]
    scale: int
    preprocessing: Preprocessing
    augment: bool

    def __len__(self) -> int:
        return len(self.places) + len(self.refused)

    def load(self, index: int, seed: int | None) -> Example:
        """Float32 [3, size, size], and the `Target`. Raises InputError for a refused photograph."""
        if index >= len(self.places):
            raise InputError(self.refused[index - len(self.places)])
        number, top, left = self.places[index].tolist()
        size, scale, pair = self.preprocessing.size, self.scale, self.pairs[number]
        turns = 0
        if seed is not None and self.augment:
            down, right = _ends(pair, size)
            top, left, turns = (mixed(seed, i) % n for i, n in enumerate((down, right, 8)))
        low = _cut(pair.low, top, left, size, turns)
        high = _cut(pair.high, top * scale, left * scale, size * scale, turns)
        mean, std = self._normal
        target = Target(torch.from_numpy(high), torch.tensor(number), scale)
        return torch.from_numpy((low - mean) / std), target

    @cached_property
    def _normal(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `normalised` takes them, of which this is the rest in NumPy, for speed."""
        both = self.preprocessing.mean, self.preprocessing.std
        mean, std = (np.array(values, np.float32)[:, None, None] for values in both)
        return mean, std


def _cut(pixels: Pixels, top: int, left: int, size: int, turns: int) -> NDArray[np.float32]:
    """A square in [0, 1], float32 [3, size, size], in one of its eight turns and reflections."""
    part = pixels[:, top : top + size, left : left + size]
    if turns & 1:
        part = part.swapaxes(1, 2)
    if turns & 2:
        part = part[:, ::-1]
    if turns & 4:
        part = part[:, :, ::-1]
    return np.divide(part, np.float32(255), dtype=np.float32, order="C")


def training_places(pairs: Sequence[Pair], size: int, count: int) -> NDArray[np.int64]:
    """`count` places, as many in a photograph as its area asks for. See `Patches.places`."""
    areas = np.array([_ends(pair, size)[0] * _ends(pair, size)[1] for pair in pairs], np.float64)
    shares = (np.arange(count) + 0.5) / count
    numbers = np.searchsorted(areas.cumsum() / areas.sum(), shares).clip(max=len(pairs) - 1)
    found = []
    for index, number in enumerate(numbers.tolist()):
        down, right = _ends(pairs[number], size)
        found.append((number, mixed(index, 0) % down, mixed(index, 1) % right))
    return np.array(found, np.int64).reshape(-1, 3)


def grid_places(pairs: Sequence[Pair], size: int, most: int) -> NDArray[np.int64]:
    """Places side by side, from the centre of what is left over. See `Patches.places`.

    Photographs that have more than an equal share of `most` give every second, third, ... only.
    """
    share = max(1, most // max(1, len(pairs)))
    found: list[tuple[int, int, int]] = []
    for number, pair in enumerate(pairs):
        tops, lefts = (_side_by_side(length, size) for length in pair.low.shape[1:])
        every = [(number, top, left) for top in tops for left in lefts]
        chosen = np.linspace(0, len(every) - 1, min(share, len(every))).round().astype(int)
        found.extend(every[index] for index in chosen)
    return np.array(found, np.int64).reshape(-1, 3)


def _side_by_side(length: int, size: int) -> Iterable[int]:
    return range(length % size // 2, length - size + 1, size)


def _ends(pair: Pair, size: int) -> tuple[int, int]:
    return pair.low.shape[1] - size + 1, pair.low.shape[2] - size + 1
