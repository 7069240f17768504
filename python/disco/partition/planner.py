"""From a captured program to a plan and one program per rank.

Two passes: the first walks the program and lets a rule decide about each op, which gives every
value's placement and what the ranks need of each other; then all needs of one value become one
exchange, and the second pass writes each rank's ops.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from disco.partition.channel_order import ordered_layers
from disco.partition.exchange_form import with_cheapest_forms
from disco.partition.exchange_plan import ExchangePlan
from disco.partition.exchanges import (
    OUTPUT,
    Sources,
    collect_needs,
    exchange_plan,
    exchange_plans,
    make_exchanges,
)
from disco.partition.memory import predict_memory
from disco.partition.nearly_zero import NearlyZero, find_nearly_zero
from disco.partition.norms import split_norms
from disco.partition.ownership_choice import OwnershipChoice
from disco.partition.placement import Replicated, Sharded
from disco.partition.plan import LayerPlan, Plan
from disco.partition.rank_builder import Exchange, RankBuilder, RankProgram
from disco.partition.reductions import split_reductions
from disco.partition.rules import Lowering, RuleContext, lower
from disco.partition.rules.matrix import matrix_flops
from disco.partition.runs import gather_runs
from disco.partition.shares import Shares
from disco.partition.survivable import count_means, split_heads
from disco.partition.wire import plan_with_wire
from disco.partition.wire_programs import with_wire_dtype
from disco.program import Op, Program, Ref, WeightRef
from disco_kernels.pattern import Ownership

MATRIX_OPS = ("disco.conv2d", "disco.linear")


@dataclass(frozen=True)
class Decisions:
    """Everything that has been decided; what is left is to write it out.

    Attributes:
        context: placements and values of the whole program.
        lowerings: per op of the program, in order.
        exchanges: per exchanged value, in order.
        first_reader: per exchanged value the op that needs it first.
        sources: which value is exchanged where one is needed.
        unordered: the exchanges as they were before channels were put into a better order.
    """

    program: Program
    context: RuleContext
    lowerings: tuple[Lowering, ...]
    exchanges: Mapping[str, Exchange]
    first_reader: Mapping[str, str]
    sources: Sources
    unordered: Mapping[str, Exchange] = field(default_factory=dict)

    def plan(self) -> Plan:
        """The plan without what only `build_all` adds: weights and memory of the ranks, which are
        not cut yet, and columns that are nearly zero."""
        layers = [
            self._layer(op, lowering)
            for op, lowering in zip(self.program.ops, self.lowerings, strict=True)
        ]
        gathers = self._numbers_first_read_by(OUTPUT)
        if gathers:
            layers.append(self._output_layer(gathers))
        plan = Plan(
            world_size=self.context.world_size,
            dense_exchange=self.context.dense_exchange,
            tolerance=self.context.tolerance,
            layers=tuple(layer for layer in layers if layer is not None),
            exchanges=tuple(
                self._with_runs(plan)
                for plan in exchange_plans(self.program, self.context, self.exchanges, self.sources)
            ),
            weight_bytes_dense=self._weight_bytes_dense(),
            weight_bytes_per_rank=(),
            survivable=self.context.survivable,
        )
        return plan_with_wire(plan, self.context.wire_dtype)

    def _with_runs(self, plan: ExchangePlan) -> ExchangePlan:
        exchange = self.exchanges[plan.value]
        before = self.unordered.get(plan.value, exchange)
        return replace(plan, gather=gather_runs(exchange), gather_before=gather_runs(before))

    def build_rank(self, rank: int) -> RankProgram:
        """Cut one rank's weights and write its program."""
        builder = RankBuilder(
            rank,
            self.context.weights,
            self.context.placements,
            self.exchanges,
            self.sources.replayed,
        )
        for op, lowering in zip(self.program.ops, self.lowerings, strict=True):
            placed, info = lowering.placement, self.program.values[op.name]
            if isinstance(placed, Sharded) and not placed.ownership.channels[rank]:
                builder.add_empty(op.name, info.shape, placed.dim, info.dtype)
            else:
                lowering.emit(op, builder)
            # Sending starts as soon as the value is there, to overlap with what comes next.
            builder.exchange(op.name)
        return builder.finish(self.program)

    def nearly_zero(self) -> tuple[NearlyZero, ...]:
        """Layers whose remote columns are so small that they look like zeros, and are not."""
        found = []
        for op, lowering in zip(self.program.ops, self.lowerings, strict=True):
            out, inputs, weight = lowering.out_ownership, lowering.in_ownership, op.args[1:2]
            if lowering.select and out and inputs and isinstance(weight[0], WeightRef):
                raw = self.context.pattern_weight(weight[0])
                name, tolerance = self.context.layer_of(op), self.context.tolerance
                found.append(find_nearly_zero(name, raw, out, inputs, tolerance))
        return tuple(each for each in found if each is not None)

    def exchange_of(self, value: str) -> Exchange:
        """The exchange that a value is in, or is computed from."""
        return self._by_part[self.sources.root(value)]

    @cached_property
    def _by_part(self) -> dict[str, Exchange]:
        return {part.value: e for e in self.exchanges.values() for part in e.parts}

    def _layer(self, op: Op, lowering: Lowering) -> LayerPlan | None:
        numbers = self._numbers_first_read_by(op.name)
        matrix = op.kind in MATRIX_OPS
        if not (matrix or numbers or lowering.reason or lowering.flops):
            return None
        dense = dense_flops(op, self.context) if matrix else sum(lowering.flops)
        flops = lowering.flops or ((dense,) * self.context.world_size if matrix else ())
        out = lowering.out_ownership
        if out is None and isinstance(lowering.placement, Sharded):
            out = lowering.placement.ownership
        read = dict.fromkeys(
            self.exchange_of(name)
            for name in (*lowering.select, *lowering.reshare, *lowering.whole)
        )
        shared = [e.number for e in read if self.first_reader[e.value] != op.name]
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
            form=lowering.form if lowering.select else "",
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
        plans = [exchange_plan(e) for e in self.exchanges.values() if e.number in numbers]
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
    shares: Shares | None = None,
    partial_sums: bool = False,
    permute: bool = False,
    kept_order: Collection[str] = (),
    wire_dtype: str | None = None,
    survivable: bool = False,
    known_columns: dict[str, Tensor] | None = None,
) -> Decisions:
    """Decide about every op of `program` for `world_size` ranks.

    Args:
        program, weights, origins: as captured.
        out_ownership: layer -> who computes which of its outputs, where that is fixed.
        tolerance: weights up to this count as zero when channels are selected.
        dense_exchange: exchange every channel, whatever the weights are (the baseline).
        shares: how much each rank is to compute; equal shares if None.
        partial_sums: let layers send partial sums where that is less than their inputs.
        permute: let ranks hold channels in an order in which those that they send are runs.
        kept_order: layers whose outputs stay in the order of `out_ownership`.
        wire_dtype: that payloads travel in where that is fewer bytes; None for their own dtypes.
        survivable: any ranks can answer over all outputs (`disco.partition.survivable`).
        known_columns: which columns of the weights are in use, kept from call to call of the same
            weights and tolerance; what is found out is added.
    """
    known_columns = {} if known_columns is None else known_columns
    program = split_reductions(split_norms(program))
    if survivable:
        program = split_heads(program, world_size)

    def given(orders: Mapping[str, Ownership]) -> RuleContext:
        return RuleContext(
            world_size,
            {name: Replicated() for name in program.inputs},
            program.values,
            weights,
            origins,
            out_ownership or {},
            tolerance,
            dense_exchange,
            {**orders},
            shares,
            program.example_sizes,
            wire_dtype,
            survivable,
            known_columns,
        )

    sums = partial_sums and not dense_exchange
    decisions = _walk(program, given({}), sums, OwnershipChoice(program))
    if not permute or dense_exchange:
        return decisions
    orders = ordered_layers(
        decisions.program,
        decisions.lowerings,
        decisions.context,
        decisions.exchanges,
        kept_order,
    )
    if not orders:
        return decisions
    ordered = _walk(program, given({**decisions.context.chosen, **orders}), sums, None)
    # Runs of a slice or of joined tensors are not counted group by group, and an op that cannot
    # take another order would gather what it reads.
    old, new = decisions.plan(), ordered.plan()
    better = new.gather.runs < old.gather.runs and new.bytes_per_image <= old.bytes_per_image
    return replace(ordered, unordered=decisions.exchanges) if better else decisions


def _walk(
    program: Program, context: RuleContext, partial_sums: bool, choice: OwnershipChoice | None
) -> Decisions:
    """Ask a rule about every op, then join what the ops need."""
    placements, chosen = context.placements, context.chosen
    assert isinstance(placements, dict) and isinstance(chosen, dict)
    lowerings = []
    for op in program.ops:
        dim = None if choice is None else open_dim(op, context)
        if choice is not None and dim is not None:
            ownership = choice.choose(op, dim, context)
            if ownership is not None:
                chosen[op.name] = ownership
        lowering = lower(op, context)
        lowerings.append(lowering)
        placements[op.name] = lowering.placement
    if context.survivable:
        # What is behind the heads, which every rank has whole, every rank computes.
        assert not any(context.sharded(Ref(name)) for name in program.output_names())
        lowerings = count_means(program, lowerings)
    if partial_sums:
        program, context, lowerings = with_cheapest_forms(program, lowerings, context)
    return _decisions(program, context, lowerings)


def _decisions(program: Program, context: RuleContext, lowerings: Sequence[Lowering]) -> Decisions:
    sources = Sources(program, lowerings, context)
    needs = collect_needs(program, lowerings, context, sources)
    exchanges = make_exchanges(program, lowerings, context, needs, sources)
    readers = [*(op.name for op in program.ops), OUTPUT]
    first = {name: readers[min(needs[name].readers)] for name in exchanges}
    return Decisions(program, context, tuple(lowerings), exchanges, first, sources)


def build_all(decisions: Decisions) -> tuple[Plan, tuple[RankProgram, ...]]:
    """The plan with every rank's weights counted, and the ranks."""
    ranks = tuple(decisions.build_rank(r) for r in range(decisions.context.world_size))
    plan = decisions.plan()
    context, exchanges = decisions.context, decisions.exchanges
    counted = replace(
        plan,
        weight_bytes_per_rank=tuple(r.weight_bytes for r in ranks),
        nearly_zero=decisions.nearly_zero(),
        memory=tuple(predict_memory(part, r, context, exchanges) for r, part in enumerate(ranks)),
    )
    return with_wire_dtype(counted, ranks, context.wire_dtype)


def open_dim(op: Op, context: RuleContext) -> int | None:
    """The outputs' dimension of a layer whose ownership nothing has decided yet, else None."""
    if op.kind not in MATRIX_OPS or op.kwargs.get("groups", 1) != 1:
        return None
    residual = op.args[3]
    if context.layer_of(op) in context.out_ownership or context.sharded(residual) is not None:
        return None
    return 1 if op.kind == "disco.conv2d" else len(context.shape(Ref(op.name))) - 1


def dense_flops(op: Op, context: RuleContext) -> int:
    """Of one image of a convolution or linear, zeros counted."""
    outputs, inputs = (int(size) for size in context.shape(op.args[1])[:2])
    return matrix_flops(op, context, outputs, inputs)
