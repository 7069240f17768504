"""One-shot magnitude selection: keep the channels with the largest weights, zero the rest.

After DISCO (arXiv 2302.11180, section 3), without its training: per receiver and sender the columns
of a block are scored over all layers that read the tensor, and the best floor(density x owned)
stay, or as many whole groups of neighbours as that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from disco.sparsify.groups import Group
from disco.sparsify.masks import apply_
from disco.sparsify.scores import WEIGHT_SCORES, weight_scores
from disco.sparsify.selection import pattern_of, select_uniform
from disco.sparsify.settings import check_choice, check_density, check_group_size
from disco_kernels.pattern import Pattern


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
    check_choice("score", score, WEIGHT_SCORES)
    check_group_size(group_size)
    kept = []
    with torch.no_grad():
        for group in groups:
            table = select_uniform(
                weight_scores(parameters, group, score), group, density, group_size
            )
            for name, out in group.out_ownership.items():
                apply_(parameters[name], out, table)
            kept.append(table)
    return pattern_of(groups, kept)
