"""Where the channels of a value are: on every rank, or each rank's own along one dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disco_kernels.pattern import Ownership, Selected


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole value (also: numbers and tuples, which are never sharded)."""


@dataclass(frozen=True)
class Sharded:
    """Rank r holds the channels ``ownership.channels[r]`` of dimension `dim`, in that order."""

    ownership: Ownership
    dim: int


Placement = Replicated | Sharded


def all_selected(ownership: Ownership) -> Selected:
    """``selected[i][j]`` of a dense exchange: everything that the others own."""
    ranks = range(ownership.world_size)
    return tuple(tuple(() if i == j else ownership.channels[j] for j in ranks) for i in ranks)


def union_of(tables: Sequence[Selected], ownership: Ownership) -> Selected:
    """What is sent if one exchange serves several consumers: per block the union."""
    ranks = range(ownership.world_size)

    def block(i: int, j: int) -> tuple[int, ...]:
        wanted = {channel for table in tables for channel in table[i][j]}
        return tuple(channel for channel in ownership.channels[j] if channel in wanted)

    return tuple(tuple(() if i == j else block(i, j) for j in ranks) for i in ranks)


def to_reshare(placed: Ownership, wanted: Ownership) -> Selected:
    """What has to be sent so that every rank gets the channels that it is to have."""
    return tuple(
        tuple(
            () if i == j else tuple(channel for channel in owned if channel in target)
            for j, owned in enumerate(placed.channels)
        )
        for i, target in enumerate(map(frozenset, wanted.channels))
    )
