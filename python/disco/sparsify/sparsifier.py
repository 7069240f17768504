"""DISCO structure inside a training loop of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from disco.errors import InputError
from disco.partition import Cluster
from disco.sparsify import checkpoint
from disco.sparsify.attached import check_optimizer, weights_now
from disco.sparsify.find_groups import find_groups, tensors_of
from disco.sparsify.groups import Group
from disco.sparsify.masks import mask_for, zero_
from disco.sparsify.penalties import Admm, group_lasso
from disco.sparsify.schedule import Schedule
from disco.sparsify.selection import everything, pattern_of
from disco.sparsify.selector import Selector
from disco.sparsify.settings import Settings
from disco.sparsify.statistics import InputWatch, RunningMeans, taylor_scores
from disco_kernels.pattern import Pattern


class Sparsifier:
    """Gives a model DISCO structure while it is trained (arXiv 2302.11180, section 3.3).

    ::

        sparsifier = disco.Sparsifier(nodes=2, density=0.2, end_step=1000)
        sparsifier.attach(model, (x,), optimizer)
        for ...:
            loss = loss + sparsifier.penalty()
            loss.backward(); optimizer.step(); sparsifier.step()
        pattern = sparsifier.finalize()

    The budget is that of `disco.sparsify_`: of every exchanged tensor, each receiver keeps
    floor(density x owned) channels of each sender, the same ones for all layers that read it there.
    A column that is pruned is exactly zero after every `step` and never comes back.

    Args:
        nodes: number of equal nodes, or a `Cluster`, as for `disco.sparsify_`.
        density: at the end, in [0, 1].
        score: of a channel: "l2" or "l1" norm of the weights that read it; "taylor", the change of
            the loss without it (needs the optimizer in `attach`); "activation", l2 times its mean
            magnitude (of inputs in training mode).
        method: "magnitude": masks tighten along a cubic schedule; "group_lasso" and "admm": a
            penalty shrinks columns from `begin_step` to `end_step`, when all masks come at once.
        allocation: "uniform", the density for every tensor; "global", as many bytes an image in
            all, spent where the score a byte is highest; "periodic", the density for every
            `period`-th tensor in the order of the model, and nothing for the others.
        group_size: 1, 2, 4 or 8 neighbouring channels that are kept or dropped together.
        begin_step, end_step: numbers of calls of `step`; masks are final after `end_step`.
        every: steps between changes of the masks (for "admm": of the projection).
        options: `strength` of "group_lasso" (1e-4), `rho` of "admm" (1e-3), `decay` of the running
            means of "taylor" and "activation" (0.9), `period` of "periodic" (2).

    Raises:
        InputError: any other value, with those that are allowed.
    """

    def __init__(
        self,
        nodes: int | Cluster = 2,
        density: float = 0.2,
        score: str = "l2",
        method: str = "magnitude",
        allocation: str = "uniform",
        group_size: int = 1,
        begin_step: int = 0,
        end_step: int = 1000,
        every: int = 1,
        **options: float,
    ) -> None:
        self._cluster = Cluster.of(nodes)
        self.settings = Settings(
            density, score, method, allocation, group_size, begin_step, end_step, every, options
        )
        self._schedule = Schedule(begin_step, end_step, every)
        self._model: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._groups: list[Group] = []
        self._steps = 0
        self._final = self._finalized = self._penalised = False
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kept: list[Tensor] = []
        self._masks: dict[str, Tensor] = {}
        self._means = RunningMeans(self.settings.options.get("decay", 0.0))
        self._watch: InputWatch | None = None
        self._hook: RemovableHandle | None = None

    def attach(
        self,
        model: nn.Module,
        example_inputs: Sequence[Any],
        optimizer: Optimizer | None = None,
        *,
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Find the model's layers, who owns which channels, and what is exchanged. Nothing of the
        model changes; scores "taylor" and "activation" put hooks on optimizer or layers.

        Args:
            model: on any device, in any mode. Its parameters may move and be loaded later, but stay
                the same in name and shape.
            example_inputs, example_kwargs: as for `disco.partition`.
            optimizer: that trains it: momenta of pruned weights are zeroed, too.

        Raises:
            InputError: attached before, a model without channels to leave out, an optimizer of
                other parameters or none where the score needs it.
        """
        if self._model is not None:
            raise InputError("attach was called before; make one Sparsifier a model and training")
        groups = find_groups(
            model,
            self._cluster,
            self.settings.density,
            example_inputs,
            example_kwargs,
            ignore_zeros=True,
        )
        names = [name for group in groups for name in group.out_ownership]
        tensors = tensors_of(model)
        check_optimizer(optimizer, [tensors[name] for name in names], self.settings.score)
        if self.settings.score == "activation":
            self._watch = InputWatch(model, names, self._means)
        if self.settings.score == "taylor" and optimizer is not None:
            self._hook = optimizer.register_step_pre_hook(self._observe_gradients)
        self._shapes = {name: tuple(tensors[name].shape) for name in names}
        self._model, self._optimizer = model, optimizer
        self._adopt(groups, [everything(group) for group in groups])

    def penalty(self) -> Tensor:
        """What is to be added to the loss: a float32 scalar on the model's device, 0 for
        "magnitude" and outside of `begin_step` to `end_step`."""
        weights = self._weights("penalty")
        self._penalised = True
        term: Tensor | None = None
        if self._penalty_due:
            if self.settings.method == "group_lasso":
                lasso = group_lasso(weights, self._groups, self.settings.group_size)
                term = self.settings.options["strength"] * lasso
            else:
                term = self._admm.penalty(weights)
        return torch.zeros((), device=next(iter(weights.values())).device) if term is None else term

    def step(self) -> None:
        """After every step of the optimizer: change masks where it is time, and write the zeros.

        Raises:
            InputError: before `attach`, after `finalize`, scores that are not finite, a model whose
                layers changed, a loss without the penalty where the method has one.
        """
        weights = self._weights("step")
        if self._penalty_due and not self._penalised:
            raise InputError(
                f"method {self.settings.method!r} works by its penalty, which was not asked for "
                "since the last step: add sparsifier.penalty() to the loss"
            )
        self._penalised = False
        self._steps += 1
        if not self._final:
            self._advance(weights)
        zero_(weights, self._masks, self._optimizer)

    def finalize(self) -> Pattern:
        """Bring the model to its density if that is not done yet, and end.

        Returns:
            The selection, as `disco.sparsify_` returns it; save it beside the weights.
        """
        weights = self._weights("finalize")
        if not self._final:
            self._settle(weights)
        zero_(weights, self._masks, self._optimizer)
        self._finalized = True
        self._remove_hooks()
        return pattern_of(self._groups, self._kept)

    @property
    def _penalty_due(self) -> bool:
        begun = self._steps >= self._schedule.begin_step
        return self.settings.method != "magnitude" and begun and not self._final

    @property
    def steps(self) -> int:
        """How often `step` was called."""
        return self._steps

    @property
    def density_now(self) -> float:
        """Selected channels over those that the senders own, over all tensors, in [0, 1]."""
        sent = owned = 0
        for group, kept in zip(self._groups, self._kept, strict=True):
            for i in group.receivers:
                own = len(group.in_ownership.channels[i])
                sent += int(kept[i].sum()) - own
                owned += group.in_ownership.num_channels - own
        return sent / owned if owned else 1.0

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """Everything that a resumed training needs, flat: tensors, numbers and strings.

        Tensors are not copied. Model and optimizer have state of their own.
        """
        self._weights("state_dict", finalized=True)
        state = checkpoint.header(self.settings, self._cluster.world_size)
        state |= {"steps": self._steps, "final": self._final, "finalized": self._finalized}
        state |= checkpoint.of_groups(self._groups, self._kept)
        state |= {f"mean.{name}": value for name, value in self._means.values.items()}
        state |= {f"z.{name}": value for name, value in self._admm.z.items()}
        state |= {f"u.{name}": value for name, value in self._admm.u.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | int | float | str]) -> None:
        """Go on where `state_dict` was taken. Call it after `attach`; the order of this and of
        loading model and optimizer does not matter.

        Raises:
            InputError: before `attach`, or a state of other settings or of another model.
        """
        weights = self._weights("load_state_dict")
        checkpoint.check_header(state, checkpoint.header(self.settings, self._cluster.world_size))
        groups, kept = checkpoint.groups_from(state, self._groups)
        names = ("steps", "final", "finalized")
        steps, final, finalized = (checkpoint.number(state, name) for name in names)
        memory = checkpoint.like(state, "z.", weights), checkpoint.like(state, "u.", weights)
        means = checkpoint.tensors(state, "mean.")
        self._steps, self._final, self._finalized = steps, bool(final), bool(finalized)
        # The watch and the hook hold the means, so those are changed and not replaced.
        self._means.values.clear()
        self._means.values.update(means)
        self._adopt(groups, kept)
        self._admm.z, self._admm.u = memory
        self._masks = self._masks_for(weights)
        if self._finalized:
            self._remove_hooks()

    def _advance(self, weights: Mapping[str, Tensor]) -> None:
        schedule, step = self._schedule, self._steps
        if step >= schedule.end_step:
            self._settle(weights)
        elif self.settings.method == "admm" and step >= schedule.begin_step:
            if schedule.changes_at(step) or not self._admm.z:
                self._admm.update(weights, lambda w: self._selector.select(w, 0.0, self._kept))
        elif self.settings.method == "magnitude" and schedule.changes_at(step):
            self._prune(weights, schedule.excess_at(step))

    def _settle(self, weights: Mapping[str, Tensor]) -> None:
        self._prune(weights, 0.0)
        self._admm.forget()
        self._final = True

    def _prune(self, weights: Mapping[str, Tensor], excess: float) -> None:
        self._kept = self._selector.select(weights, excess, self._kept)
        self._masks = self._masks_for(weights)

    def _masks_for(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the weights that have anything to be zeroed."""
        return {
            name: mask_for(weights[name], out, kept)
            for group, kept in zip(self._groups, self._kept, strict=True)
            for name, out in group.out_ownership.items()
            if not bool(kept.all())
        }

    def _adopt(self, groups: list[Group], kept: list[Tensor]) -> None:
        self._groups, self._kept = groups, kept
        self._selector = Selector(self.settings, groups, self._means)
        self._admm = Admm(groups, self.settings.options.get("rho", 0.0))

    def _observe_gradients(self, *_: Any) -> None:
        if self._final:
            return
        weights = self._weights("the optimizer's step")
        for number, group in enumerate(self._groups):
            found = taylor_scores(weights, group)
            if found is not None:
                self._means.add(f"group {number}", found)

    def _remove_hooks(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        if self._hook is not None:
            self._hook.remove()

    def _weights(self, action: str, finalized: bool = False) -> dict[str, Tensor]:
        """The weights as they are now: loading may have replaced them."""
        if self._model is None:
            raise InputError(f"{action} before attach: call attach(model, example_inputs) first")
        if self._finalized and not finalized:
            raise InputError(
                f"{action} after finalize: this Sparsifier has ended; finalize after the last step"
            )
        return weights_now(self._model, self._shapes)
