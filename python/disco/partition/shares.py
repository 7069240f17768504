"""How much of a layer each rank computes: weights of ranks, and ownership in their proportion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from disco_kernels.pattern import Ownership


@dataclass(frozen=True)
class Shares:
    """Weights of the ranks, for all layers and for single ones.

    Attributes:
        everywhere: per rank, 0 or more, not all 0; only their proportion counts.
        of_layer: value that a layer computes -> the same for that layer.
    """

    everywhere: tuple[float, ...]
    of_layer: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def equal(cls, world_size: int) -> Shares:
        return cls((1.0,) * world_size)

    def of(self, layer: str) -> tuple[float, ...]:
        """The weights for the layer that computes this value."""
        return self.of_layer.get(layer, self.everywhere)


def share_out(num_channels: int, weights: Sequence[float]) -> Ownership:
    """Contiguous runs in proportion to `weights`, by largest remainders (Hamilton's method).

    Every rank gets its quota rounded down; what is left goes to the largest remainders, of equal
    ones to the lower rank. Equal weights give `Ownership.contiguous`; a rank may get nothing.
    """
    total = sum(weights)
    quotas = [num_channels * weight / total for weight in weights]
    counts = [int(quota) for quota in quotas]
    left = num_channels - sum(counts)
    by_remainder = sorted(range(len(weights)), key=lambda rank: (counts[rank] - quotas[rank], rank))
    for rank in by_remainder[:left]:
        counts[rank] += 1
    begin = [sum(counts[:rank]) for rank in range(len(counts) + 1)]
    return Ownership(
        tuple(tuple(range(begin[rank], begin[rank + 1])) for rank in range(len(counts)))
    )
