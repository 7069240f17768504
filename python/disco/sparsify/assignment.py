"""Which rank's places the entries of an axis get: balanced assignment, axis by axis.

For one axis, everything else as it is, what is lost is nearly linear in who is where: an output's
part is the scores of its row that are dropped on a rank, a channel's part is its score at the other
ranks as far as it is below what they keep. That is an assignment problem (as in RePurpose, arXiv
2008.08289, whose costs are all couplings between nodes). A solution is taken only if what is truly
lost falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from disco.errors import InputError
from disco.sparsify.lost_score import Floats, Scores, ranks_of
from disco.sparsify.permute import Axis, Permutable
from disco.sparsify.permute.axes import Indices

# Costs hold for one entry that moves; all at once they leave for the same places. So staying is
# rewarded with these parts of what the best entry would gain, until less is lost: with 0 all may
# move, with 0.9 only the best few.
_HOLDS = (0.0, 0.125, 0.25, 0.5, 0.75, 0.9)
# Sweeps over all axes end when one gains less than this part.
_LEAST_GAIN = 1e-3
_MOST_SWEEPS = 30


@dataclass(frozen=True)
class Side:
    """One dimension of what is scored that has entries of an axis.

    Attributes:
        group: whose channels or whose layer's outputs.
        parameter: the layer for outputs; empty for the group's channels.
        places: per output or channel its place along the axis; -1 where there is none.
        ranks: of the places along the axis.
    """

    group: int
    parameter: str
    places: Indices
    ranks: Indices


@dataclass(frozen=True)
class Movable:
    """An axis that can move, and where.

    Attributes:
        axis: which.
        sides: all that is scored along it.
        kinds: per place its kind: places of the same ranks on all sides are alike.
        kind_ranks: ``[kinds, sides]`` their ranks.
    """

    axis: Axis
    sides: Sequence[Side]
    kinds: Indices
    kind_ranks: Indices

    @property
    def groups(self) -> list[int]:
        """Whose scores change."""
        return sorted({side.group for side in self.sides})


def movable(axis: Axis, permutable: Permutable, scores: Scores) -> Movable | str:
    """How an axis can move, or why it is left alone."""
    if axis.reason:
        return axis.reason
    sides = []
    for number, group in enumerate(scores.groups):
        dims = [(number, name, 0, out) for name, out in group.out_ownership.items()]
        ins = [permutable.axis_of(name, 1) for name in group.out_ownership]
        found = {tuple(permutable.axes.places(dim, axis.number)) for dim in ins}
        if len(found) > 1:
            return "layers that share a selection read it differently"
        first = next(iter(group.out_ownership))
        dims.append((number, first, 1, group.in_ownership))
        for _, name, dim, ownership in dims:
            whole = permutable.axis_of(name, dim)
            places = permutable.axes.places(whole, axis.number)
            if (places < 0).all():
                continue
            ranks = ranks_of_places(places, ranks_of(ownership), axis.size)
            if ranks is None:
                return "each of its places lies on several ranks"
            sides.append(Side(number, name if dim == 0 else "", places, ranks))
    table = np.stack([side.ranks for side in sides], axis=1)
    kind_ranks, kinds = np.unique(table, axis=0, return_inverse=True)
    if len(kind_ranks) < 2:
        return "all of its places are alike"
    return Movable(axis, sides, kinds.reshape(-1), kind_ranks)


def ranks_of_places(places: Indices, ranks: Indices, size: int) -> Indices | None:
    """The rank of each of an axis's places; None where one of them lies on several.

    Args:
        places: per entry of a dimension its place along the axis; -1 where it has none.
        ranks: per entry.
        size: of the axis. A place that no entry has gets -1.
    """
    found = np.full(size, -1)
    found[places[places >= 0]] = ranks[places >= 0]
    same = found[places[places >= 0]] == ranks[places >= 0]
    return found if same.all() else None


class Assigner:
    """Moves entries of axes about, and remembers how.

    Args:
        scores: is changed.
        permutable: of the same model.
        movables: the axes.
    """

    def __init__(self, scores: Scores, permutable: Permutable, movables: Sequence[Movable]) -> None:
        self.scores = scores
        self.orders = {m.axis.number: np.arange(m.axis.size) for m in movables}
        self._permutable = permutable
        self._movables = movables
        self._solve = solver()

    def descend(self) -> float:
        """Improve axis after axis until nothing is gained; what is lost then."""
        every = range(len(self.scores.groups))
        lost = self.scores.lost(every)
        for _ in range(_MOST_SWEEPS):
            gain = sum(self._improve(m) for m in self._movables)
            lost -= gain
            if gain <= _LEAST_GAIN * lost:
                break
        return self.scores.lost(every)

    def move(self, movable: Movable, order: Indices) -> None:
        """Put the entry of place ``order[p]`` at place p, for all p."""
        number = movable.axis.number
        self.orders[number] = self.orders[number][order]
        matrices = self.scores.matrices
        for group in movable.groups:
            for name in self.scores.groups[group].out_ownership:
                rows, columns = (
                    self._permutable.order(name, dim, {number: order}) for dim in (0, 1)
                )
                matrices[name] = matrices[name][rows][:, columns]

    def _improve(self, movable: Movable) -> float:
        """By how much less is lost."""
        groups = movable.groups
        before = self.scores.lost(groups)
        costs = self._costs(movable)
        own = costs[np.arange(len(costs)), movable.kinds]
        most = float((own - costs.min(1)).max())
        for hold in _HOLDS if most > 0 else ():
            held = costs.copy()
            held[np.arange(len(costs)), movable.kinds] -= hold * most
            order = self._assigned(held, movable.kinds)
            if np.array_equal(order, np.arange(len(order))):
                return 0.0
            matrices = dict(self.scores.matrices)
            total = self.orders[movable.axis.number]
            self.move(movable, order)
            gain = before - self.scores.lost(groups)
            if gain > 1e-9 * before:
                return gain
            self.scores.matrices, self.orders[movable.axis.number] = matrices, total
        return 0.0

    def _assigned(self, costs: Floats, kinds: Indices) -> Indices:
        """The order after assigning entries to kinds of places; who need not move stays."""
        entries, places = self._solve(costs[:, kinds])
        wanted = np.empty(len(kinds), dtype=np.int64)
        wanted[entries] = kinds[places]
        order = np.arange(len(kinds))
        for kind in np.unique(kinds):
            left = np.flatnonzero((kinds == kind) & (wanted != kind))
            order[left] = np.flatnonzero((kinds != kind) & (wanted == kind))
        return order

    def _costs(self, movable: Movable) -> Floats:
        """``[entries, kinds]``: what is lost of an entry at places of a kind."""
        found = np.zeros((movable.axis.size, len(movable.kind_ranks)))
        for number, side in enumerate(movable.sides):
            losses = self._row_losses(side) if side.parameter else self._column_losses(side)
            there = side.places >= 0
            entries = np.zeros((movable.axis.size, losses.shape[1]))
            np.add.at(entries, side.places[there], losses[there])
            found += entries[:, movable.kind_ranks[:, number]]
        return found

    def _row_losses(self, side: Side) -> Floats:
        """``[outputs, ranks]``: what is dropped of a row where the rank keeps what it does now."""
        dropped = self.scores.dropped(side.group)
        return np.asarray(self.scores.matrices[side.parameter] @ dropped.T.astype(np.float64))

    def _column_losses(self, side: Side) -> Floats:
        """``[channels, ranks]``: the other ranks' scores, as far as they are below what is kept of
        a sender: the tangent of what is lost, which is convex."""
        columns, thresholds = self.scores.columns(side.group), self.scores.thresholds(side.group)
        found = np.zeros(columns.T.shape)
        for sender in range(len(columns)):
            for receiver in range(len(columns)):
                if sender != receiver:
                    found[:, sender] += np.minimum(columns[receiver], thresholds[receiver, sender])
        return found


def solver() -> Any:
    """scipy's, for square costs. Raises InputError if it is not installed."""
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(
            "co-location solves assignment problems with scipy, which is not installed: "
            "pip install 'disco-kernels[train]' (or scipy)"
        ) from error
    return linear_sum_assignment
