"""Which channels stay: the best ones within a budget.

A selection is a bool table ``kept`` ``[receivers, channels]`` on the CPU, True for what a rank owns
itself. Channels are chosen in groups of neighbours in their owner's order, whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import torch
from torch import Tensor

from disco.sparsify.groups import Group
from disco_kernels.pattern import LayerPattern, Ownership, Pattern, Selected

# 0.2 x 15 is 3.0000000000000004 or, with other numbers, just below a whole number; both mean it.
_ROUNDING = 1e-9


def num_kept(density: float, owned: int) -> int:
    """floor(density x owned), as in exact arithmetic."""
    return floor(density * owned + _ROUNDING)


def everything(group: Group) -> Tensor:
    """The selection before anything is pruned."""
    return torch.ones(group.world_size, group.in_ownership.num_channels, dtype=torch.bool)


def select_uniform(
    scores: Tensor, group: Group, density: float, group_size: int, kept: Tensor | None = None
) -> Tensor:
    """The best floor(density x owned) channels of each sender for each receiver, or as many whole
    groups of neighbours as that is.

    Args:
        scores: ``[receivers, channels]``; groups are compared by their means, of equals the first
            stays.
        group: whose channels they are.
        density: in [0, 1].
        group_size: channels that are chosen together.
        kept: what may be selected; None for everything.

    Returns:
        The selection ``[receivers, channels]``, part of `kept`.
    """
    allowed = everything(group) if kept is None else kept
    selected = torch.zeros_like(allowed)
    for i in range(group.world_size):
        for j, owned in enumerate(group.in_ownership.channels):
            columns = torch.tensor(owned, dtype=torch.long)
            if i == j:
                selected[i, columns] = True
            elif owned:
                count = num_kept(density, len(owned))
                best = _best(scores[i, columns], allowed[i, columns], count, group_size)
                selected[i, columns[best]] = True
    return selected


def select_global(
    scores: Sequence[Tensor],
    groups: Sequence[Group],
    density: float,
    group_size: int,
    kept: Sequence[Tensor],
) -> list[Tensor]:
    """The selections of all tensors together, within the bytes that the density gives them.

    Greedily, the channels of the highest score a byte first. The budget is floor(density x owned)
    channels of every sender for every receiver and tensor, in bytes of one image; a tensor can
    end up with nothing or with everything.

    Args:
        scores: per group ``[receivers, channels]``, comparable between groups.
        groups: with the bytes of their channels.
        density, group_size: as for `select_uniform`.
        kept: per group what may be selected.

    Returns:
        Per group its selection.
    """
    budget = 0
    worth, sizes, places = [], [], []
    selected = [torch.zeros_like(table) for table in kept]
    for number, group in enumerate(groups):
        for i in range(group.world_size):
            for j, owned in enumerate(group.in_ownership.channels):
                columns = torch.tensor(owned, dtype=torch.long)
                if i == j:
                    selected[number][i, columns] = True
                if i == j or i not in group.receivers or not owned:
                    continue
                budget += num_kept(density, len(owned)) * group.bytes_per_channel
                means = _group_means(scores[number][i, columns], group_size)
                parts = columns.split(group_size)
                for mean, part in zip(means.tolist(), parts, strict=True):
                    if bool(kept[number][i, part].all()):
                        worth.append(mean / group.bytes_per_channel)
                        sizes.append(len(part) * group.bytes_per_channel)
                        places.append((number, i, part))
    order = torch.sort(torch.tensor(worth, dtype=torch.float64), descending=True, stable=True)
    for item in order.indices.tolist():
        if sizes[item] <= budget:
            budget -= sizes[item]
            number, i, part = places[item]
            selected[number][i, part] = True
    return selected


def _best(scores: Tensor, allowed: Tensor, count: int, group_size: int) -> Tensor:
    """Places of at most `count` channels, in the groups with the highest means; of equals the
    first, so that runs repeat."""
    owned = len(scores)
    usable = allowed.tolist()
    chosen: list[int] = []
    order = torch.sort(_group_means(scores, group_size), descending=True, stable=True).indices
    for number in order.tolist():
        first = number * group_size
        members = range(first, min(first + group_size, owned))
        if usable[first] and len(chosen) + len(members) <= count:
            chosen += members
    return torch.tensor(sorted(chosen), dtype=torch.long)


def _group_means(scores: Tensor, group_size: int) -> Tensor:
    """Of each whole group, then of what is left over."""
    whole = len(scores) // group_size * group_size
    means = [scores[:whole].reshape(-1, group_size).mean(1)]
    if whole < len(scores):
        means.append(scores[whole:].mean(0, keepdim=True))
    return torch.cat(means)


def pruned(out: Ownership, kept: Tensor) -> Tensor:
    """Bool ``[O, I]``: where a layer's weight has to be zero.

    Args:
        out: who computes the layer's O outputs.
        kept: ``[receivers, I]``.
    """
    rank_of = torch.empty(out.num_channels, dtype=torch.long)
    for rank, owned in enumerate(out.channels):
        rank_of[list(owned)] = rank
    return ~kept[rank_of]


def pattern_of(groups: Sequence[Group], kept: Sequence[Tensor]) -> Pattern:
    """The selections by layer. A rank that computes nothing of a layer needs nothing for it."""
    pattern = Pattern()
    for group, table in zip(groups, kept, strict=True):
        rows = table.tolist()
        for name, out in group.out_ownership.items():
            selected: Selected = tuple(
                tuple(
                    tuple(c for c in owned if i != j and outputs and rows[i][c])
                    for j, owned in enumerate(group.in_ownership.channels)
                )
                for i, outputs in enumerate(out.channels)
            )
            layer = LayerPattern(out, group.in_ownership, selected)
            pattern.layers[name.removesuffix(".weight")] = layer
    return pattern
