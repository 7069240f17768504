"""How much a channel of another rank is worth to the layers that read it.

A score is kept as ``[receivers, channels]``: for each receiving rank and each channel of the
exchanged tensor, over all layers that read the tensor there. What a rank owns itself is scored,
too, and never selected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from disco.sparsify.groups import Group

WEIGHT_SCORES = ("l2", "l1")


def weight_scores(
    parameters: Mapping[str, Tensor],
    group: Group,
    score: str = "l2",
    inputs: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Scores of a group's channels by the weights that read them.

    Args:
        parameters: weights ``[O, I, *kernel]`` by name, on any device.
        group: the layers that share the selection.
        score: "l2": the sum of squares of a channel's weights in a receiver's rows (its order is
            that of the norm); "l1": the sum of magnitudes.
        inputs: by parameter the mean magnitude ``[I]`` of its inputs, which the weights are
            multiplied with; None for 1.

    Returns:
        float64 ``[receivers, channels]`` on the CPU.
    """
    rows = []
    for i in range(group.world_size):
        scores = torch.zeros(group.in_ownership.num_channels, dtype=torch.float64)
        for name, out in group.out_ownership.items():
            weight = parameters[name].detach()
            block = weight[list(out.channels[i])].double().transpose(0, 1).flatten(1)
            if inputs is not None:
                block = block * inputs[name].double().to(block.device)[:, None]
            column = block.square().sum(1) if score == "l2" else block.abs().sum(1)
            scores += column.cpu()
        rows.append(scores)
    return torch.stack(rows)
