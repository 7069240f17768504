"""What the training methods add to the loss, so that remote blocks lose whole columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from disco.sparsify.groups import Group
from disco.sparsify.masks import mask_for

Select = Callable[[Mapping[str, Tensor]], list[Tensor]]


def group_lasso(weights: Mapping[str, Tensor], groups: Sequence[Group], group_size: int) -> Tensor:
    """Sum of sqrt(p) ||W_g|| over the columns g of remote blocks, p values each.

    Group lasso (Yuan and Lin, "Model selection and estimation in regression with grouped
    variables", 2006), on input channels as in Wen et al., "Learning structured sparsity in deep
    neural networks", 2016. A column is what a receiver multiplies one channel with, in all layers
    that read it, or `group_size` neighbouring ones. The derivative at zero is taken for 0.
    """
    terms = []
    for group in groups:
        for i in range(group.world_size):
            rows = {n: list(o.channels[i]) for n, o in group.out_ownership.items() if o.channels[i]}
            blocks = [weights[n][r].transpose(0, 1).flatten(1) for n, r in rows.items()]
            for j, owned in enumerate(group.in_ownership.channels):
                if i == j or not owned or not blocks:
                    continue
                columns = torch.cat([block[list(owned)].float() for block in blocks], 1)
                whole = len(owned) // group_size * group_size
                width = columns.shape[1]
                terms.append(_norms(columns[:whole].reshape(-1, group_size * width)))
                if whole < len(owned):
                    terms.append(_norms(columns[whole:].reshape(1, -1)))
    if not terms:  # one node
        return torch.zeros((), device=next(iter(weights.values())).device)
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _norms(columns: Tensor) -> Tensor:
    """Of rows, weighted by the root of their length and added up."""
    return float(columns.shape[1]) ** 0.5 * torch.linalg.vector_norm(columns, dim=1).sum()


class Admm:
    """Alternating directions (Zhang et al., "A systematic DNN weight pruning framework using
    alternating direction method of multipliers", 2018): the weights are drawn to Z - U, where Z is
    the nearest weight within the budget and U adds up how far away it was.

    Attributes:
        z, u: by parameter, as its weight; empty before the first update.
    """

    def __init__(self, groups: Sequence[Group], rho: float) -> None:
        self._out = {n: (o, g) for g in groups for n, o in g.out_ownership.items()}
        self._groups = groups
        self.rho = rho
        self.z: dict[str, Tensor] = {}
        self.u: dict[str, Tensor] = {}
        self._local: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], select: Select) -> None:
        """Z <- projection of W + U, U <- U + W - Z; the first time U is 0 and stays so.

        Args:
            weights: W, by parameter.
            select: the channels of the largest norm within the budget, per group.
        """
        first = not self.z
        shifted = {n: weights[n].detach().clone() for n in self._out}
        if not first:
            for name, u in self.u.items():
                shifted[name] += u
        self.z = {}
        for group, kept in zip(self._groups, select(shifted), strict=True):
            for name, out in group.out_ownership.items():
                mask = mask_for(shifted[name], out, kept)
                self.z[name] = shifted[name].masked_fill(mask, 0.0)
        # W + U - Z is U + W - Z.
        self.u = {n: torch.zeros_like(z) if first else shifted[n] - z for n, z in self.z.items()}

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        """rho / 2 ||W - Z + U||^2 over the remote blocks; None before the first update."""
        total: Tensor | None = None
        for name, z in self.z.items():
            away = (weights[name] - z + self.u[name]).float()
            if name not in self._local or self._local[name].device != away.device:
                out, group = self._out[name]
                self._local[name] = ~mask_for(away, out, _own(group))
            term = away.masked_fill(self._local[name], 0.0).square().sum()
            total = term if total is None else total + term.to(total.device)
        return None if total is None else self.rho / 2 * total

    def forget(self) -> None:
        """Drop Z and U, which take as much memory as the weights twice."""
        self.z, self.u = {}, {}


def _own(group: Group) -> Tensor:
    """A selection of nothing but what ranks own."""
    kept = torch.zeros(group.world_size, group.in_ownership.num_channels, dtype=torch.bool)
    for rank, owned in enumerate(group.in_ownership.channels):
        kept[rank, list(owned)] = True
    return kept
