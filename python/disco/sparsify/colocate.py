"""Co-location: strongly coupled channels on one node, before anything is pruned.

Which node a channel lives on is decided by its number, and numbers mean nothing to a trained model:
permuting a layer's outputs, with all that is added to them, their norms and the inputs of whoever
reads them, leaves its function as it is. RePurpose (arXiv 2008.08289) chooses such permutations by
assignment so that little of a dense model's weight lies between nodes. Here a budget of channels
crosses anyway, and what counts is the rest, which pruning loses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from disco.capture import capture_once
from disco.errors import InputError
from disco.partition import Cluster
from disco.sparsify.assignment import Assigner, Movable, movable, solver
from disco.sparsify.calibration import output_energies
from disco.sparsify.find_groups import groups_in, tensors_of
from disco.sparsify.lost_score import Scores, score_matrices
from disco.sparsify.permute import Permutable, permutable_in, permute_
from disco.sparsify.permute.axes import Indices
from disco.sparsify.scores import WEIGHT_SCORES
from disco.sparsify.settings import check_choice, check_density

COLOCATION_SCORES = (*WEIGHT_SCORES, "activation")


@dataclass(frozen=True)
class ColocatedClass:
    """Channels that change places together.

    Attributes:
        name: the first layer whose outputs they are.
        channels: how many (heads, where those move whole).
        moved: how many have come to another node.
        lost_before, lost_after: score that pruning loses of all selections that they are part of.
    """

    name: str
    channels: int
    moved: int
    lost_before: float
    lost_after: float


@dataclass(frozen=True)
class ColocationReport:
    """What co-location did.

    Attributes:
        lost_before, lost_after: score that pruning loses at the density, over all exchanged
            tensors: with "l2" the sum of squares of the weights that become zero.
        remote: score of all weights between nodes before, for scale.
        classes: what could move, in the model's order.
        left_alone: by name why other channels stayed.
    """

    lost_before: float
    lost_after: float
    remote: float
    classes: tuple[ColocatedClass, ...]
    left_alone: Mapping[str, str]

    @property
    def num_moved(self) -> int:
        """Channels that have come to another node."""
        return sum(c.moved for c in self.classes)

    @property
    def summary(self) -> str:
        """One line."""
        change = self.lost_after / self.lost_before - 1 if self.lost_before else 0.0
        return (
            f"lost score {self.lost_before:.4g} -> {self.lost_after:.4g} ({change:+.1%}), "
            f"{self.num_moved} of {sum(c.channels for c in self.classes)} channels moved"
        )

    def __str__(self) -> str:
        lines = [
            self.summary,
            f"{'channels of':<32} {'number':>7} {'moved':>7} {'lost before':>12} {'after':>12}",
        ]
        lines += [
            f"{c.name:<32} {c.channels:>7} {c.moved:>7} {c.lost_before:>12.4g} "
            f"{c.lost_after:>12.4g}"
            for c in self.classes
        ]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left alone ({reason}): {', '.join(names[:3])}{more}")
        return "\n".join(lines)


def colocate_(
    model: nn.Module,
    nodes: int | Cluster,
    example_inputs: Sequence[Any],
    density: float = 0.2,
    score: str = "l2",
    *,
    calibration: Iterable[Sequence[Any]] | None = None,
    starts: int = 2,
    seed: int = 0,
    example_kwargs: Mapping[str, Any] | None = None,
) -> ColocationReport:
    """Permute channels between nodes, in place, so that less is lost when the model is pruned.

    For trained dense weights, before `sparsify_` or `Sparsifier.attach` with the same nodes and
    density. The function of the model stays the same up to the rounding of sums in another order;
    shapes, names and the ownership that those choose stay the same. Only what the captured program
    proves to be permutable moves: residual connections, norms, positions and whatever else has to
    agree moves along, attention moves by whole heads.

    What is lost is the score of the columns that no budget is left for (each receiver keeps
    floor(density x owned) channels of each sender). It is lowered class by class, each time by a
    balanced assignment of a class's channels to nodes, until nothing is gained; the best of several
    starts is taken, of which one is the model as it is, so that it never rises. Equal arguments
    give equal results. After RePurpose (arXiv 2008.08289), which counts all couplings of a dense
    model instead.

    Args:
        model: parameters and buffers are changed in place; on any device. Make optimizers and
            averages of weights afterwards: what they remember would not move along.
        nodes, example_inputs, example_kwargs: as for `sparsify_`.
        density: that it will be pruned to, in [0, 1].
        score: "l2" or "l1", as for `sparsify_`; or "activation", squared weights times the mean
            squares of their inputs, as a batch norm that follows scales them: about the mean square
            of what the layer's outputs lose.
        calibration: for "activation" batches of inputs that the model is used with (not augmented),
            each a tuple like `example_inputs`; all values of a batch are in memory at once.
        starts: beginnings from random places besides the model as it is; 0 is fastest.
        seed: of those.

    Raises:
        InputError: values that are not allowed, scipy is not installed, a model that cannot be
            captured, that exchanges nothing, whose weights are not finite, or that has parameters
            which it does not read in evaluation mode.
    """
    cluster = Cluster.of(nodes)
    check_density(density)
    check_choice("score", score, COLOCATION_SCORES)
    _check_calibration(score, calibration)
    _check_count("starts", starts)
    _check_count("seed", seed)
    solver()
    exported = capture_once(model, example_inputs, example_kwargs=example_kwargs)
    captured = exported.folded()
    groups = groups_in(captured, model, cluster, density, ignore_zeros=True)
    permutable = permutable_in(exported.source(), model)
    if calibration is None:
        matrices = score_matrices(tensors_of(model), groups, score)
    else:
        matrices = output_energies(captured, groups, calibration)
    scores = Scores(groups, density, matrices)
    _check_finite(scores)
    movables, left_alone = _movables(permutable, scores)
    best = _best(scores, permutable, movables, starts, seed)
    permute_(tensors_of(model), permutable, best.orders)
    return _report(scores, best, movables, left_alone)


def _movables(permutable: Permutable, scores: Scores) -> tuple[list[Movable], dict[str, str]]:
    """The axes of what is exchanged: those that can move, and why the others cannot."""
    names = [name for group in scores.groups for name in group.out_ownership]
    found: list[Movable] = []
    left_alone: dict[str, str] = {}
    for axis in permutable.plain_axes([(name, dim) for name in names for dim in (0, 1)]):
        answer = movable(axis, permutable, scores)
        if isinstance(answer, str):
            left_alone[f"{axis.name} ({axis.size})"] = answer
        else:
            found.append(answer)
    return found, left_alone


def _best(
    scores: Scores,
    permutable: Permutable,
    movables: Sequence[Movable],
    starts: int,
    seed: int,
) -> Assigner:
    best = Assigner(scores.copy(), permutable, movables)
    least = best.descend()
    for number in range(starts):
        trial = Assigner(scores.copy(), permutable, movables)
        generator = np.random.default_rng((seed, number))
        for one in movables:
            trial.move(one, generator.permutation(one.axis.size))
        lost = trial.descend()
        if lost < least:
            best, least = trial, lost
    return best


def _report(
    before: Scores,
    best: Assigner,
    movables: Sequence[Movable],
    left_alone: Mapping[str, str],
) -> ColocationReport:
    every = range(len(before.groups))
    classes = tuple(
        ColocatedClass(
            one.axis.name,
            one.axis.size,
            _num_moved(one, best.orders[one.axis.number]),
            before.lost(one.groups),
            best.scores.lost(one.groups),
        )
        for one in movables
    )
    remote = sum(
        float(
            (before.columns(g) * (ranks != np.arange(before.groups[g].world_size)[:, None])).sum()
        )
        for g, ranks in enumerate(before.ranks_of_inputs)
    )
    return ColocationReport(
        before.lost(every), best.scores.lost(every), remote, classes, left_alone
    )


def _num_moved(one: Movable, order: Indices) -> int:
    return int((one.kinds[order] != one.kinds).sum())


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{name} must be a whole number, 0 or more; given {value!r}")


def _check_calibration(score: str, calibration: Iterable[Sequence[Any]] | None) -> None:
    if (score == "activation") != (calibration is not None):
        raise InputError(
            f"score {score!r} was given {'with' if calibration is not None else 'without'} "
            "calibration inputs; score 'activation' needs them, calibration=[(x,)], and the others "
            "look at weights alone"
        )


def _check_finite(scores: Scores) -> None:
    for name, matrix in scores.matrices.items():
        if not np.isfinite(matrix).all():
            raise InputError(
                f"weights of {name!r} are not finite: training has diverged; go back to a "
                "checkpoint"
            )
