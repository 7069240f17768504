"""One-shot magnitude selection: keep the channels with the largest weights, zero the rest.

After DISCO (arXiv 2302.11180, section 3), without its training: per receiver and sender the columns
of a block are scored over all layers that read the tensor, and the best floor(density x owned)
stay, or as many whole groups of neighbours as that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor

import torch
from torch import Tensor

from disco.errors import InputError
from disco.sparsify.groups import Group
from disco_kernels.pattern import LayerPattern, Ownership, Pattern, Selected

SCORES = ("l2", "l1")
GROUP_SIZES = (1, 2, 4, 8)


def sparsify_weights_(
    parameters: Mapping[str, Tensor],
    groups: Sequence[Group],
    density: float,
    score: str = "l2",
    group_size: int = 1,
) -> Pattern:
    """Zero, in place, the columns of remote blocks that are not among the selected ones.

    Args:
        parameters: the model's, by name; weights are ``[O, I, *kernel]``.
        groups: layers that share a selection.
        density: selected channels over those that the sender owns, in [0, 1], rounded down.
        score: of a channel over the blocks that read it: "l2" (square root of the sum of squares)
            or "l1" (sum of magnitudes).
        group_size: channels are chosen so many at a time, 1, 2, 4 or 8, neighbours in the sender's
            order: as many groups as fit into floor(density x owned), those with the largest sum of
            squares or magnitudes a channel. What is left over at the end is a smaller group.

    Returns:
        The selection as a pattern, by layer.
    """
    check_density(density)
    if score not in SCORES:
        raise InputError(f"score must be one of {', '.join(SCORES)}; given {score!r}")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise InputError(
            f"group_size must be one of {', '.join(map(str, GROUP_SIZES))} channels; given "
            f"{group_size!r}"
        )
    pattern = Pattern()
    with torch.no_grad():
        for group in groups:
            selected = _select(parameters, group, density, score, group_size)
            for name, out in group.out_ownership.items():
                _zero_unselected_(parameters[name], out, group.in_ownership, selected)
                layer = LayerPattern(out, group.in_ownership, _without_idle(selected, out))
                pattern.layers[name.removesuffix(".weight")] = layer
    return pattern


def check_density(density: float) -> None:
    """Raise InputError unless it is in [0, 1]."""
    if not isinstance(density, (int, float)) or not 0.0 <= density <= 1.0:
        raise InputError(
            f"density must be in [0, 1] (a share of the sender's channels), given {density!r}"
        )


def _select(
    parameters: Mapping[str, Tensor], group: Group, density: float, score: str, group_size: int
) -> Selected:
    """``selected[i][j]``: the best channels of rank j for rank i, in rank j's order."""
    rows = []
    for i in range(group.in_ownership.world_size):
        scores = torch.zeros(group.in_ownership.num_channels, dtype=torch.float64)
        for name, out in group.out_ownership.items():
            block = (
                parameters[name].detach()[list(out.channels[i])].double().transpose(0, 1).flatten(1)
            )
            scores += block.square().sum(1) if score == "l2" else block.abs().sum(1)
        rows.append(
            tuple(
                ()
                if i == j
                else _best(scores, owned, floor(density * len(owned) + _ROUNDING), group_size)
                for j, owned in enumerate(group.in_ownership.channels)
            )
        )
    return tuple(rows)


# 0.2 x 15 is 3.0000000000000004 or, with other numbers, just below a whole number; both mean it.
_ROUNDING = 1e-9


def _best(scores: Tensor, owned: Sequence[int], count: int, group_size: int) -> tuple[int, ...]:
    """At most `count` channels, in the groups with the highest mean scores; of equals the first, so
    that runs repeat."""
    values = scores[list(owned)]
    if not owned:
        return ()
    means = torch.stack([group.mean() for group in values.split(group_size)])
    chosen: list[int] = []
    for group in torch.sort(means, descending=True, stable=True).indices.tolist():
        first = group * group_size
        members = range(first, min(first + group_size, len(owned)))
        if len(chosen) + len(members) <= count:
            chosen += members
    return tuple(owned[position] for position in sorted(chosen))


def _zero_unselected_(
    weight: Tensor, out: Ownership, inputs: Ownership, selected: Selected
) -> None:
    for i, outputs in enumerate(out.channels):
        for j, owned in enumerate(inputs.channels):
            chosen = set(selected[i][j])
            columns = [channel for channel in owned if channel not in chosen]
            if i != j and outputs and columns:
                rows = torch.tensor(outputs)[:, None]
                weight[rows, torch.tensor(columns)] = 0.0


def _without_idle(selected: Selected, out: Ownership) -> Selected:
    """A rank that computes nothing of a layer needs nothing for it."""
    ranks = range(out.world_size)
    return tuple(tuple(selected[i][j] if out.channels[i] else () for j in ranks) for i in ranks)
