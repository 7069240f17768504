"""What pruning will lose: the scores of the columns that no budget is left for.

Per receiver and sender the best floor(density x owned) channels are kept (`select_uniform`); the
scores of the others are lost. Channels and outputs may change places; scores follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from disco.sparsify.groups import Group
from disco.sparsify.permute.axes import Indices
from disco.sparsify.selection import num_kept
from disco_kernels.pattern import Ownership

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass
class Scores:
    """Scores of single weights, summed up over kernels, and who reads them.

    Attributes:
        groups: layers that share a selection.
        density: of what is kept.
        matrices: by parameter ``[O, I]``, in the present order of channels.
        ranks_of_outputs: by parameter the rank of each output ``[O]``.
        ranks_of_inputs: by group that of each channel ``[I]``.
    """

    groups: Sequence[Group]
    density: float
    matrices: dict[str, Floats]
    ranks_of_outputs: Mapping[str, Indices] = field(init=False)
    ranks_of_inputs: Sequence[Indices] = field(init=False)

    def __post_init__(self) -> None:
        self.ranks_of_outputs = {
            name: ranks_of(out) for g in self.groups for name, out in g.out_ownership.items()
        }
        self.ranks_of_inputs = [ranks_of(group.in_ownership) for group in self.groups]

    def copy(self) -> Scores:
        """The same, to be reordered apart."""
        return Scores(self.groups, self.density, dict(self.matrices))

    def columns(self, group: int) -> Floats:
        """``[receivers, channels]``, as `weight_scores` has them."""
        ranks, channels = self.groups[group].world_size, len(self.ranks_of_inputs[group])
        found = np.zeros((ranks, channels))
        for name in self.groups[group].out_ownership:
            outputs = self.ranks_of_outputs[name]
            for rank in range(ranks):
                found[rank] += self.matrices[name][outputs == rank].sum(0)
        return found

    def lost(self, groups: Iterable[int]) -> float:
        """Over these groups, all receivers and senders."""
        return sum(float((self.columns(g) * self.dropped(g)).sum()) for g in groups)

    def dropped(self, group: int) -> Flags:
        """``[receivers, channels]``: what is another rank's and not among its best."""
        columns = self.columns(group)
        found = np.zeros(columns.shape, dtype=bool)
        for sender, receiver, owned, count in self._blocks(group):
            block = columns[receiver, owned]
            # Of equals the first stays, as in `select_uniform`.
            order = np.argsort(-block, kind="stable")
            found[receiver, owned[order[count:]]] = sender != receiver
        return found

    def thresholds(self, group: int) -> Floats:
        """``[receivers, senders]``: between the last score that is kept and the first that is not;
        infinite where none is kept, 0 where all are."""
        columns, ranks = self.columns(group), self.groups[group].world_size
        found = np.zeros((ranks, ranks))
        for sender, receiver, owned, count in self._blocks(group):
            block = np.sort(columns[receiver, owned])[::-1]
            if count == 0:
                found[receiver, sender] = np.inf
            elif count < len(block):
                found[receiver, sender] = (block[count - 1] + block[count]) / 2
        return found

    def _blocks(self, group: int) -> Iterable[tuple[int, int, Indices, int]]:
        """Sender, receiver, the sender's channels and how many of them are kept."""
        for sender, channels in enumerate(self.groups[group].in_ownership.channels):
            owned = np.array(channels, dtype=np.int64)
            for receiver in range(self.groups[group].world_size):
                if receiver != sender and len(owned):
                    yield sender, receiver, owned, num_kept(self.density, len(owned))


def ranks_of(ownership: Ownership) -> Indices:
    """The rank of each channel."""
    found = np.empty(ownership.num_channels, dtype=np.int64)
    for rank, owned in enumerate(ownership.channels):
        found[list(owned)] = rank
    return found


def score_matrices(
    tensors: Mapping[str, Tensor], groups: Sequence[Group], score: str
) -> dict[str, Floats]:
    """By parameter ``[O, I]``: what a weight adds to its column's score, over the kernel.

    Args:
        tensors: weights ``[O, I, *kernel]`` by name.
        groups: whose parameters are wanted.
        score: "l2" (squares) or "l1" (magnitudes).
    """
    found = {}
    for group in groups:
        for name in group.out_ownership:
            weight = tensors[name].detach().double()
            weight = weight.reshape(*weight.shape[:2], -1)
            summed = weight.square().sum(2) if score == "l2" else weight.abs().sum(2)
            found[name] = np.asarray(summed.cpu().numpy(), dtype=np.float64)
    return found
