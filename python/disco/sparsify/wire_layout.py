"""Where a plan's nodes hold each value of a model, and what the values of others are when they
arrive: what a simulation has to know of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from disco.errors import InputError
from disco.partition import Decisions
from disco.partition.placement import Sharded
from disco.partition.rules import Lowering
from disco.program import Op
from disco.sparsify.source_ops import SourceOps
from disco_kernels.pattern import Ownership

# Ops of a plan that compute nothing of their own: what they compute is in the op that reads them.
PARTS = frozenset(
    {
        "disco.group_moments",
        "disco.moments",
        "disco.part_of_layer",
        "disco.part_of_sum",
        "disco.partial_sums",
    }
)


@dataclass(frozen=True)
class Layout:
    """A plan, as a simulation reads it.

    Attributes:
        decisions: of the planner.
        wires: exchanged value -> the dtype that it travels in, where that is not its own.
    """

    decisions: Decisions
    wires: Mapping[str, str]
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, decisions: Decisions) -> Layout:
        plan = decisions.plan()
        return cls(decisions, {e.value: e.wire for e in plan.exchanges if e.is_narrow})

    def check(self, source: SourceOps) -> None:
        """Raise InputError for what cannot be simulated: a value that the model does not compute,
        or a batch norm that receivers would apply to what has arrived."""
        replayed = self.decisions.sources.replayed
        for op, _ in self.steps:
            source.chain(op.name)
            rounded = self.decisions.sources.root(op.name) in self.wires
            if op.name in replayed and rounded and source.has_batch_norm(op.name):
                raise InputError(
                    f"{op.name!r} is a batch norm of channels that nodes exchange before it, which "
                    "cannot be simulated in a wire dtype: take wire_dtype='float32'"
                )

    @property
    def world_size(self) -> int:
        return self.decisions.context.world_size

    @cached_property
    def steps(self) -> tuple[tuple[Op, Lowering], ...]:
        """The ops that compute something, in order, and how each runs."""
        pairs = zip(self.decisions.program.ops, self.decisions.lowerings, strict=True)
        return tuple(pair for pair in pairs if pair[0].kind not in PARTS)

    @cached_property
    def parts(self) -> dict[str, Op]:
        """The ops that are left out of `steps`, by the value that they compute."""
        return {op.name: op for op in self.decisions.program.ops if op.kind in PARTS}

    def sharded(self, value: str) -> Sharded | None:
        """Where a value is if it is shared out, else None."""
        placed = self.decisions.context.placements.get(value)
        return placed if isinstance(placed, Sharded) else None

    def held(self, parts: Op) -> Sharded:
        """How the inputs of a layer whose parts are added up are shared out."""
        x, context = parts.args[0], self.decisions.context
        shape = context.shape(x)
        dim = 1 if parts.kwargs["layer"] == "disco.conv2d" else len(shape) - 1
        placed = context.sharded(x)
        if placed is not None and placed.dim == dim:
            return placed
        return Sharded(context.share_out(parts.name, int(shape[dim])), dim)

    def mask(self, owned: Ownership, ranks: Iterable[int], like: Tensor, dim: int) -> Tensor:
        """True for the channels of these ranks; broadcasts over `like` with its channels in
        `dim`."""
        chosen = frozenset(ranks)
        key = (owned, chosen, like.device)
        if key not in self._masks:
            mask = torch.zeros(owned.num_channels, dtype=torch.bool)
            for rank in chosen:
                mask[list(owned.channels[rank])] = True
            self._masks[key] = mask.to(like.device)
        shape = [1] * like.dim()
        shape[dim] = -1
        return self._masks[key].view(shape)
