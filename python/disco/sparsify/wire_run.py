"""One forward pass of a model as a plan's nodes compute it, with gradients.

A value that is shared out is one tensor, whose channels are those that their owners hold. Rank i
sees its own channels as they are and the others' as they arrive: rounded to the wire dtype, the
rounding being a constant to the gradient (straight through). A value that every rank computes for
itself from such channels differs between ranks, and is kept once a rank (`PerRank`). Channels of
lost ranks are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from disco.errors import InputError
from disco.partition.placement import Placement, Sharded
from disco.partition.rules import Lowering
from disco.program import Op, Ref, pure_function
from disco.sparsify.source_ops import MATRIX_KINDS, Read, SourceOps
from disco.sparsify.wire_layout import Layout
from disco.sparsify.wire_norms import normalised, normalised_error
from disco.sparsify.wire_rounding import rounding_error
from disco_kernels.pattern import Ownership

_NORMS = ("disco.normalize", "disco.group_normalize")


class PerRank(tuple[Any, ...]):
    """A value of which every rank has one of its own."""


class WireRun:
    """One forward pass.

    Args:
        source: the model's ops; `begin` has been called.
        layout: the plan.
        lost: ranks whose channels are not there.
        inputs: of the program, by name.
    """

    def __init__(
        self,
        source: SourceOps,
        layout: Layout,
        lost: frozenset[int],
        inputs: dict[str, Tensor],
    ) -> None:
        self._source, self._layout, self._lost = source, layout, lost
        self._sources = layout.decisions.sources
        self._values: dict[str, Any] = dict(inputs)
        self._errors: dict[str, Tensor | None] = {}

    def outputs(self) -> Any:
        """The model's outputs, as the first rank that is there has them."""
        for op, lowering in self._layout.steps:
            self._values[op.name] = self._without_lost(op.name, self._compute(op, lowering))
        first = next(r for r in range(self._layout.world_size) if r not in self._lost)
        return self._source.outputs(lambda name: self._whole(name, first))

    def _compute(self, op: Op, lowering: Lowering) -> Any:
        if op.kind in _NORMS and self._norm_dim(op) is not None:
            return self._norm(op)
        if op.kind == "disco.layer_of_parts":
            return self._head(op, lowering)
        if op.kind == "disco.sum_of_parts":
            return self._reduction(op, lowering)
        if lowering.select:
            return self._layer(op, lowering)
        if op.kind in MATRIX_KINDS and isinstance(lowering.placement, Sharded):
            matrix = self._source.matrix(op.name)
            y = self._by_rank(op, lowering, lambda read: self._bare(matrix, read))
            return self._epilogue(op, lowering, matrix, y)
        return self._by_rank(op, lowering, lambda read: self._source.evaluate(op.name, read))

    def _by_rank(
        self, op: Op, lowering: Lowering, compute: Callable[[Read], Any], also: str = ""
    ) -> Any:
        """Once, where all ranks read the same; else once a rank, each taking its channels.

        Args:
            compute: the result, of values that it reads by name.
            also: a value that is read beside those of the op.
        """
        names = (*lowering.reshare, *lowering.whole)
        inexact = any(self._error(name) is not None for name in names)
        if not inexact and not any(self._differs(name) for name in (*op.refs(), also)):
            return compute(self._exact)
        found = []
        for rank in range(self._layout.world_size):
            # The statistics of batch norms are kept once a pass.
            with self._source.recording(rank == 0):
                found.append(compute(partial(self._seen, rank)))
        return self._joined(found, lowering.placement)

    def _layer(self, op: Op, lowering: Lowering) -> Any:
        """A convolution or linear that reads selected channels of other ranks, or their sums."""
        x, placed = op.args[0], lowering.placement
        assert isinstance(x, Ref) and isinstance(placed, Sharded)
        matrix = self._source.matrix(op.name)
        y = self._bare(matrix, self._exact)
        if lowering.form == "partial sums":
            y = self._with_rounded_sums(y, op, matrix, lowering)
        else:
            error = self._error(x.name)
            if error is not None:
                y = y + self._product(matrix, error, self._remote(matrix, lowering))
        return self._epilogue(op, lowering, matrix, y)

    def _epilogue(self, op: Op, lowering: Lowering, matrix: Op, y: Tensor) -> Any:
        """What follows the product, with a residual as each rank has it."""
        known = {matrix.name: self._source.with_noise(matrix.name, y)}
        residual, placed = op.args[3], lowering.placement
        if isinstance(residual, Ref) and isinstance(placed, Sharded):
            needed = residual.name in (*lowering.reshare, *lowering.whole)
            inexact = needed and self._error(residual.name) is not None
            if inexact or self._differs(residual.name):
                ranks = range(self._layout.world_size)
                views = [self._seen(rank, residual.name) for rank in ranks]
                known[residual.name] = self._joined(views, placed)
        return self._source.evaluate(op.name, self._exact, known)

    def _with_rounded_sums(self, y: Tensor, op: Op, matrix: Op, lowering: Lowering) -> Tensor:
        """Each rank's partial sums for the others are rounded, and not what they are sums of."""
        name, placed = f"{op.name}.sums", lowering.placement
        wire = self._layout.wires.get(name)
        if wire is None:
            return y
        x, inputs, out = self._values[_name(op.args[0])], lowering.in_ownership, placed
        assert inputs is not None and isinstance(out, Sharded)
        weight = self._source.arguments(matrix, self._exact)[1].detach()
        for rank in range(self._layout.world_size):
            own = self._layout.mask(inputs, (rank,), weight, 1)
            with torch.no_grad():
                sums = self._product(matrix, x.detach(), weight * own)
                error = rounding_error(sums, wire, out.dim)
            mine = self._layout.mask(out.ownership, (rank,), error, out.dim)
            y = y + error.masked_fill(mine, 0.0)
        return y

    def _remote(self, matrix: Op, lowering: Lowering) -> Tensor:
        """The weight without its local blocks, which nothing travels for."""
        weight: Tensor = self._source.arguments(matrix, self._exact)[1]
        inputs, out = lowering.in_ownership, lowering.out_ownership
        assert inputs is not None and out is not None
        local = torch.zeros((), dtype=torch.bool, device=weight.device)
        for rank in range(self._layout.world_size):
            rows = self._layout.mask(out, (rank,), weight, 0)
            local = local | (rows & self._layout.mask(inputs, (rank,), weight, 1))
        return weight.masked_fill(local, 0.0)

    def _bare(self, matrix: Op, read: Read) -> Any:
        """The result of a convolution or linear, to which errors may yet be added."""
        return self._source.evaluate(matrix.name, read, noiseless=True)

    def _product(self, matrix: Op, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution or linear without its bias."""
        found: Tensor = pure_function(matrix.kind)(
            x, weight, None, *matrix.args[3:], **matrix.kwargs
        )
        return found

    def _head(self, op: Op, lowering: Lowering) -> Any:
        """A last layer whose parts are added up: each rank multiplies what it holds."""
        parts = self._layout.parts[_name(op.args[0])]
        held, x = self._layout.held(parts), _name(parts.args[0])
        rounded = self._sharded(x) not in (None, held) and self._error(x) is not None
        mine = rounded or self._differs(x)
        lost = self._lost_mask(held.ownership, self._values[x], held.dim)

        value = self._held_by_each(x, held) if mine else self._values[x]
        if lost is not None:
            value = value.masked_fill(lost, 0.0)

        def compute(read: Read) -> Any:
            return self._source.evaluate(op.name, read, {x: value})

        return self._by_rank(op, lowering, compute)

    def _held_by_each(self, x: str, held: Sharded) -> Tensor:
        views = [self._seen(rank, x) for rank in range(self._layout.world_size)]
        joined: Tensor = self._joined(views, held)
        return joined

    def _reduction(self, op: Op, lowering: Lowering) -> Any:
        """A sum, mean or norm, of the channels that are there."""
        parts = self._layout.parts[_name(op.args[0])]
        x, dim = _name(parts.args[0]), op.kwargs["dim"]
        placed = self._sharded(x)
        over_channels = placed is not None and placed.dim == dim
        y = self._by_rank(op, lowering, lambda read: self._source.evaluate(op.name, read), x)
        if not over_channels or op.kwargs["how"] != "mean" or not self._lost:
            return y
        assert placed is not None
        counts = placed.ownership.counts
        left = sum(count for rank, count in enumerate(counts) if rank not in self._lost)
        return y * (sum(counts) / left) if left else y

    def _norm_dim(self, op: Op) -> int | None:
        """The dimension of a norm's channels if they are shared out, else None."""
        placed, x = self._sharded(_name(op.args[0])), _name(op.args[0])
        shape = self._layout.decisions.context.values[x].shape
        dim = len(shape) - 1 if op.kind == "disco.normalize" else 1
        return dim if placed is not None and placed.dim == dim else None

    def _norm(self, op: Op) -> Tensor:
        x, weight, bias, dim, groups, there, eps = self._norm_arguments(op)
        if there is None:
            found: Tensor = self._source.evaluate(op.name, self._exact)
            return found
        y = normalised(x, groups, dim, there, weight, bias, eps)
        noised: Tensor = self._source.with_noise(op.name, y)
        return noised

    def _norm_arguments(self, op: Op) -> tuple[Any, ...]:
        x, placed = self._values[_name(op.args[0])], self._sharded(_name(op.args[0]))
        assert placed is not None
        source = self._source.chain(op.name)[-1]
        args = self._source.arguments(source, self._exact)
        weight, bias = (*args[2:4], None, None)[:2]
        counts: Any = op.kwargs["counts"]
        groups = 1 if op.kind == "disco.normalize" else len(counts[0])
        gone = self._lost_mask(placed.ownership, x, placed.dim)
        there = None if gone is None else ~gone.flatten()
        return x, weight, bias, placed.dim, groups, there, op.kwargs["eps"]

    def _error(self, name: str) -> Tensor | None:
        """What arrives of a value at other ranks minus the value; None if that is nothing."""
        if name not in self._errors:
            wire = self._layout.wires.get(self._sources.root(name))
            found = None if wire is None else self._find_error(name, wire)
            self._errors[name] = None if found is None else self._without_lost(name, found)
        return self._errors[name]

    @torch.no_grad()
    def _find_error(self, name: str, wire: str) -> Tensor | None:
        placed, value = self._sharded(name), self._values[name]
        assert placed is not None
        if self._sources.root(name) == name:
            return rounding_error(value, wire, placed.dim)
        step = self._sources.replayed[name]
        before = self._error(step.source.name)
        if before is None:
            return None
        x = self._values[step.source.name]
        if step.op.kind in _NORMS:
            x, weight, _, dim, groups, there, eps = self._norm_arguments(step.op)
            error = normalised_error(before, x, groups, dim, there, weight, eps)
            noised: Tensor = self._source.with_noise(name, error)
            return noised
        known = {step.source.name: x + before}
        found: Tensor = self._source.evaluate(name, self._exact, known) - value
        return found

    def _seen(self, rank: int, name: str) -> Any:
        """A value as a rank has it, others' channels included."""
        value = self._values[name]
        if isinstance(value, PerRank):
            return value[rank]
        error, placed = self._error(name), self._sharded(name)
        if error is None or placed is None:
            return value
        own = self._layout.mask(placed.ownership, (rank,), error, placed.dim)
        return value + error.masked_fill(own, 0.0)

    def _exact(self, name: str) -> Any:
        """A value that is the same wherever it is."""
        value = self._values[name]
        if isinstance(value, PerRank):
            raise InputError(
                f"the value {name!r} differs between nodes where it may not: the model cannot be "
                "simulated with payloads in another dtype; take wire_dtype='float32'"
            )
        return value

    def _whole(self, name: str, rank: int) -> Any:
        """An output: channels that are gathered for it travel as they are."""
        value = self._values[name]
        return value[rank] if isinstance(value, PerRank) else value

    def _joined(self, found: Sequence[Any], placement: Placement) -> Any:
        """Of each rank's result the channels that it is to have; all results if they stay apart."""
        first = found[0]
        if not isinstance(placement, Sharded):
            return PerRank(found) if isinstance(first, (Tensor, tuple)) else first
        for rank, result in enumerate(found):
            own = self._layout.mask(placement.ownership, (rank,), result, placement.dim)
            first = torch.where(own, result, first)
        return first

    def _without_lost(self, name: str, value: Any) -> Any:
        placed = self._sharded(name)
        if placed is None or not isinstance(value, Tensor):
            return value
        gone = self._lost_mask(placed.ownership, value, placed.dim)
        return value if gone is None else value.masked_fill(gone, 0.0)

    def _lost_mask(self, owned: Ownership, like: Tensor, dim: int) -> Tensor | None:
        return self._layout.mask(owned, self._lost, like, dim) if self._lost else None

    def _sharded(self, name: str) -> Sharded | None:
        return self._layout.sharded(name)

    def _differs(self, name: str) -> bool:
        return isinstance(self._values.get(name), PerRank)


def _name(arg: object) -> str:
    assert isinstance(arg, Ref)
    return arg.name
