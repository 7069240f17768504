"""From a captured program to a plan and one program per rank.

Two passes: the first walks the program and lets a rule decide about each op, which gives every
value's placement and what the ranks need of each other; then all needs of one value become one
exchange, and the second pass writes each rank's ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from disco.partition.nearly_zero import NearlyZero, find_nearly_zero
from disco.partition.norms import split_norms
from disco.partition.ownership_choice import OwnershipChoice
from disco.partition.placement import Placement, Replicated, Sharded, all_selected, union_of
from disco.partition.plan import ExchangePlan, LayerPlan, Plan
from disco.partition.rank_builder import Exchange, RankBuilder, RankProgram
from disco.partition.reductions import split_reductions
from disco.partition.rules import Lowering, RuleContext, lower
from disco.partition.rules.matrix import matrix_flops
from disco.program import Op, Program, Ref, WeightRef
from disco_kernels.pattern import Ownership, Selected

OUTPUT = "output"

_MATRIX_OPS = ("disco.conv2d", "disco.linear")


@dataclass
class _Needs:
    """What the ops want of one value of other ranks."""

    selected: list[Selected] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    gathered_by: list[str] = field(default_factory=list)
    first_reader: str = ""


@dataclass(frozen=True)
class Decisions:
    """Everything that has been decided; what is left is to write it out.

    Attributes:
        context: placements and values of the whole program.
        lowerings: per op of the program, in order.
        exchanges: per exchanged value, in order.
        first_reader: per exchanged value the op that needs it first.
    """

    program: Program
    context: RuleContext
    lowerings: tuple[Lowering, ...]
    exchanges: Mapping[str, Exchange]
    first_reader: Mapping[str, str]

    def plan(self) -> Plan:
        """The plan, without the weights of the ranks (they are not cut yet)."""
        layers = [
            self._layer(op, lowering)
            for op, lowering in zip(self.program.ops, self.lowerings, strict=True)
        ]
        gathers = self._numbers_first_read_by(OUTPUT)
        if gathers:
            layers.append(self._output_layer(gathers))
        return Plan(
            world_size=self.context.world_size,
            dense_exchange=self.context.dense_exchange,
            tolerance=self.context.tolerance,
            layers=tuple(layer for layer in layers if layer is not None),
            exchanges=tuple(_exchange_plan(e) for e in self.exchanges.values()),
            weight_bytes_dense=self._weight_bytes_dense(),
            weight_bytes_per_rank=(),
            nearly_zero=self._nearly_zero(),
        )

    def build_rank(self, rank: int) -> RankProgram:
        """Cut one rank's weights and write its program."""
        builder = RankBuilder(rank, self.context.weights, self.context.placements, self.exchanges)
        for op, lowering in zip(self.program.ops, self.lowerings, strict=True):
            placed, info = lowering.placement, self.program.values[op.name]
            if isinstance(placed, Sharded) and not placed.ownership.channels[rank]:
                builder.add_empty(op.name, info.shape, placed.dim, info.dtype)
            else:
                lowering.emit(op, builder)
            # Sending starts as soon as the value is there, to overlap with what comes next.
            builder.exchange(op.name)
        return builder.finish(self.program)

    def _nearly_zero(self) -> tuple[NearlyZero, ...]:
        found = []
        for op, lowering in zip(self.program.ops, self.lowerings, strict=True):
            out, inputs, weight = lowering.out_ownership, lowering.in_ownership, op.args[1:2]
            if lowering.select and out and inputs and isinstance(weight[0], WeightRef):
                raw = self.context.pattern_weight(weight[0])
                name, tolerance = self.context.layer_of(op), self.context.tolerance
                found.append(find_nearly_zero(name, raw, out, inputs, tolerance))
        return tuple(each for each in found if each is not None)

    def _layer(self, op: Op, lowering: Lowering) -> LayerPlan | None:
        numbers = self._numbers_first_read_by(op.name)
        matrix = op.kind in _MATRIX_OPS
        if not (matrix or numbers or lowering.reason):
            return None
        dense = _dense_flops(op, self.context) if matrix else 0
        flops = lowering.flops or ((dense,) * self.context.world_size if matrix else ())
        out = lowering.out_ownership
        if out is None and isinstance(lowering.placement, Sharded):
            out = lowering.placement.ownership
        shared = [
            self.exchanges[name].number
            for name in (*lowering.select, *lowering.whole)
            if self.first_reader[name] != op.name
        ]
        notes = [lowering.reason] if lowering.reason else []
        notes += [f"shares exchange {number}" for number in shared]
        return LayerPlan(
            name=self.context.layer_of(op),
            op=op.kind,
            value=op.name,
            placement="sharded" if isinstance(lowering.placement, Sharded) else "replicated",
            in_counts=lowering.in_ownership.counts if lowering.in_ownership else (),
            out_counts=out.counts if out else (),
            selected_counts=tuple(tuple(len(c) for c in row) for row in lowering.selected),
            exchanges=tuple(numbers),
            bytes_per_image=self._bytes(numbers),
            flops=flops,
            flops_dense=dense,
            note=", ".join(notes),
            activation=str(op.kwargs.get("activation", "")),
        )

    def _output_layer(self, numbers: list[int]) -> LayerPlan:
        return LayerPlan(
            name=OUTPUT,
            op="gather",
            value=OUTPUT,
            placement="replicated",
            in_counts=(),
            out_counts=(),
            selected_counts=(),
            exchanges=tuple(numbers),
            bytes_per_image=self._bytes(numbers),
            flops=(),
            flops_dense=0,
            note="",
        )

    def _numbers_first_read_by(self, reader: str) -> list[int]:
        return [e.number for n, e in self.exchanges.items() if self.first_reader[n] == reader]

    def _bytes(self, numbers: list[int]) -> int:
        plans = [_exchange_plan(e) for e in self.exchanges.values() if e.number in numbers]
        return sum(plan.bytes_per_image for plan in plans)

    def _weight_bytes_dense(self) -> int:
        used = (self.context.weights[name] for name in self.program.weight_names())
        return sum(w.numel() * w.element_size() for w in used)


def decide(
    program: Program,
    weights: Mapping[str, Tensor],
    origins: Mapping[str, str],
    world_size: int,
    *,
    out_ownership: Mapping[str, Ownership] | None = None,
    tolerance: float = 0.0,
    dense_exchange: bool = False,
) -> Decisions:
    """Decide about every op of `program` for `world_size` ranks.

    Args:
        program, weights, origins: as captured.
        out_ownership: layer -> who computes which of its outputs, where that is fixed.
        tolerance: weights up to this count as zero when channels are selected.
        dense_exchange: exchange every channel, whatever the weights are (the baseline).
    """
    program = split_reductions(split_norms(program))
    placements: dict[str, Placement] = {name: Replicated() for name in program.inputs}
    chosen: dict[str, Ownership] = {}
    choice = OwnershipChoice(program)
    context = RuleContext(
        world_size,
        placements,
        program.values,
        weights,
        origins,
        out_ownership or {},
        tolerance,
        dense_exchange,
        chosen,
        program.example_sizes,
    )
    lowerings = []
    needs: dict[str, _Needs] = {}
    for op in program.ops:
        dim = _open_dim(op, context)
        if dim is not None and (ownership := choice.choose(op, dim, context)) is not None:
            chosen[op.name] = ownership
        lowering = lower(op, context)
        lowerings.append(lowering)
        placements[op.name] = lowering.placement
        for name, selected in lowering.select.items():
            need = needs.setdefault(name, _Needs(first_reader=op.name))
            need.selected.append(selected)
            need.consumers.append(context.layer_of(op))
        for name in lowering.whole:
            need = needs.setdefault(name, _Needs(first_reader=op.name))
            need.gathered_by.append(context.layer_of(op))
    for name in program.output_names():
        if isinstance(placements[name], Sharded):
            needs.setdefault(name, _Needs(first_reader=OUTPUT)).gathered_by.append(OUTPUT)
    # Numbered in the order in which the values come into being, which is the order on every rank.
    produced = [op.name for op in program.ops if op.name in needs]
    exchanges = {n: _exchange(i, n, needs[n], context) for i, n in enumerate(produced)}
    first = {name: need.first_reader for name, need in needs.items()}
    return Decisions(program, context, tuple(lowerings), exchanges, first)


def build_all(decisions: Decisions) -> tuple[Plan, tuple[RankProgram, ...]]:
    """The plan with every rank's weights counted, and the ranks."""
    ranks = tuple(decisions.build_rank(r) for r in range(decisions.context.world_size))
    plan = decisions.plan()
    return replace(plan, weight_bytes_per_rank=tuple(r.weight_bytes for r in ranks)), ranks


def _open_dim(op: Op, context: RuleContext) -> int | None:
    """The outputs' dimension of a layer whose ownership nothing has decided yet, else None."""
    if op.kind not in _MATRIX_OPS or op.kwargs.get("groups", 1) != 1:
        return None
    residual = op.args[3]
    if context.layer_of(op) in context.out_ownership or context.sharded(residual) is not None:
        return None
    return 1 if op.kind == "disco.conv2d" else len(context.shape(Ref(op.name))) - 1


def _exchange(number: int, name: str, needs: _Needs, context: RuleContext) -> Exchange:
    placement = context.placements[name]
    assert isinstance(placement, Sharded)
    tables = [*needs.selected]
    if needs.gathered_by:
        tables.append(all_selected(placement.ownership))
    others = [s for dim, s in enumerate(context.sizes(name)) if dim != placement.dim]
    return Exchange(
        number=number,
        value=name,
        placement=placement,
        sent=union_of(tables, placement.ownership),
        dtype=context.values[name].dtype,
        elements_per_channel=prod(others),
        consumers=tuple(dict.fromkeys(needs.consumers)),
        gathered_by=tuple(dict.fromkeys(needs.gathered_by)),
    )


def _exchange_plan(exchange: Exchange) -> ExchangePlan:
    item_bytes = torch.empty(0, dtype=getattr(torch, exchange.dtype)).element_size()
    return ExchangePlan(
        number=exchange.number,
        value=exchange.value,
        dim=exchange.placement.dim,
        dtype=exchange.dtype,
        bytes_per_channel=exchange.elements_per_channel * item_bytes,
        ownership=exchange.placement.ownership.channels,
        sent=exchange.sent,
        consumers=exchange.consumers,
        gathered_by=exchange.gathered_by,
    )


def _dense_flops(op: Op, context: RuleContext) -> int:
    outputs, inputs = (int(size) for size in context.shape(op.args[1])[:2])
    return matrix_flops(op, context, outputs, inputs)
