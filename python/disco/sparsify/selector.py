"""From weights, and what was seen of the training, to a selection of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from disco.errors import InputError
from disco.sparsify.groups import Group
from disco.sparsify.scores import weight_scores
from disco.sparsify.selection import select_global, select_uniform
from disco.sparsify.settings import Settings
from disco.sparsify.statistics import RunningMeans


class Selector:
    """Scores channels and selects those that stay, as the settings say."""

    def __init__(self, settings: Settings, groups: Sequence[Group], means: RunningMeans) -> None:
        self._settings = settings
        self._groups = groups
        self._means = means

    def select(
        self, weights: Mapping[str, Tensor], excess: float, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """Per group its selection ``[receivers, channels]``, part of `kept`.

        Args:
            weights: as they are now.
            excess: of what is to go, the share that stays for now; 0 selects the budget.
            kept: what may be selected.

        Raises:
            InputError: scores that are not finite, or of something that was not seen yet.
        """
        size = self._settings.group_size
        scores = [self._scores(weights, number) for number in range(len(self._groups))]
        if self._settings.allocation == "global":
            if self._settings.score != "taylor":
                scores = [_relative(s, g) for s, g in zip(scores, self._groups, strict=True)]
            density = _between(self._settings.density, excess)
            return select_global(scores, self._groups, density, size, kept)
        return [
            select_uniform(score, group, _between(self._budget(number), excess), size, table)
            for number, (score, group, table) in enumerate(
                zip(scores, self._groups, kept, strict=True)
            )
        ]

    def _budget(self, number: int) -> float:
        """The density of a tensor at the end."""
        if self._settings.allocation == "periodic":
            period = int(self._settings.options["period"])
            return 0.0 if (number + 1) % period else self._settings.density
        return self._settings.density

    def _scores(self, weights: Mapping[str, Tensor], number: int) -> Tensor:
        group, score = self._groups[number], self._settings.score
        if score == "taylor":
            found = self._seen(f"group {number}", group).double().cpu()
        elif score == "activation":
            inputs = {name: self._seen(name, group) for name in group.out_ownership}
            found = weight_scores(weights, group, "l2", inputs)
        else:
            found = weight_scores(weights, group, score)
        if not bool(torch.isfinite(found).all()):
            raise InputError(
                f"scores of the channels that {_names(group)} read are not finite: training has "
                "diverged; go back to a checkpoint"
            )
        return found

    def _seen(self, key: str, group: Group) -> Tensor:
        if key not in self._means.values:
            missing = (
                "no gradient of their weights was there in any step of the optimizer"
                if self._settings.score == "taylor"
                else "no forward in training mode has called their modules"
            )
            raise InputError(
                f"score {self._settings.score!r} of the channels that {_names(group)} read is not "
                f"known: {missing} since attach; train before masks change, or take another score"
            )
        return self._means.values[key]


def _between(budget: float, excess: float) -> float:
    return budget + (1.0 - budget) * excess


def _names(group: Group) -> str:
    names = [repr(name) for name in group.out_ownership]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _relative(scores: Tensor, group: Group) -> Tensor:
    """Shares of what crosses between ranks: weights of one layer are no measure for another's."""
    remote = torch.ones_like(scores, dtype=torch.bool)
    for rank, owned in enumerate(group.in_ownership.channels):
        remote[rank, list(owned)] = False
    return scores / scores[remote].sum().clamp_min(torch.finfo(scores.dtype).tiny)
