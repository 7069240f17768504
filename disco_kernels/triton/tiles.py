"""Which tile a layer's product is cut into: a description goes in, a printable choice comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from disco_kernels.triton.arguments import power_of_two


@dataclass(frozen=True, order=True)
class Tile:
    """Pixels x output channels x input channels of a program's step, and how it is compiled.

    Attributes:
        g: channels of a step over listed channels, instead of ``k``.
        warps: of 32 threads, per program.
        stages: steps whose loads are under way at once.
    """

    m: int
    n: int
    k: int
    g: int
    warps: int
    stages: int

    def __str__(self) -> str:
        size = f"{self.m}x{self.n}x{self.k} ({self.g} listed)"
        return f"{size}, {self.warps} warps, {self.stages} stages"


def choose_tile(
    pixels: int,
    columns: int,
    inputs: int,
    listed: int,
    taps: int,
    dtype: torch.dtype,
    multiprocessors: int,
) -> Tile:
    """For a product of ``pixels`` x ``columns`` (of the widest node) over so many input channels,
    ``listed`` of them by an index, and taps, on so many multiprocessors.

    From `benchmarks.bench_triton_tiles` over ResNet-50 on an H100 (benchmarks/results).
    """
    narrow = dtype.itemsize == 2
    widest = 64 if narrow else 32
    k = min(widest, max(16, power_of_two(min(inputs - listed, inputs) or inputs)))
    g = min(widest, max(16, power_of_two(listed)))
    if not narrow:
        n = max(16, min(64, power_of_two(columns)))
        m = _fitting(64, pixels, columns, n, multiprocessors)
        return Tile(m, n, k, g, 4, 3)
    n = max(16, min(128 if k > 16 else 64, power_of_two(columns)))
    long_sum = inputs * taps >= _LONG_SUM
    # Long sums are worth a tile that reads less for each product, as long as all multiprocessors
    # have two of them in turn; short ones are over before a large tile has filled.
    if n == 128 and long_sum and -(-pixels // 128) * -(-columns // 128) >= 2 * multiprocessors:
        return Tile(128, 128, k, g, 8, 3)
    m = _fitting(64 if n == 128 else 128, pixels, columns, n, multiprocessors)
    n = _fitting(n, columns, pixels, m, multiprocessors)
    return Tile(m, n, k, g, 4, 3 if k == 64 else 4)


# Products of one output from which a sum counts as long.
_LONG_SUM = 512
_SMALLEST_SIDE = 32


def _fitting(side: int, length: int, other_length: int, other: int, multiprocessors: int) -> int:
    """``side`` halved until every multiprocessor has a tile."""
    while (
        side > _SMALLEST_SIDE and -(-length // side) * -(-other_length // other) < multiprocessors
    ):
        side //= 2
    return side
