"""What the ranks need of each other's values, and the messages in which it travels.

All needs of one value make one exchange. A value that others can compute from a smaller one is not
exchanged itself (an up-sampled map: what was there before travels, and every receiver up-samples
it), nor is the result of a norm over channels: its input travels, in one message with the
statistics, and every receiver normalises what it has got.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch

from disco.partition.placement import Sharded, all_selected, union_of
from disco.partition.plan import ExchangePlan
from disco.partition.rank_builder import Exchange, Replayed
from disco.partition.rules import Lowering, RuleContext
from disco.partition.rules.partial_sums import PARTIAL_SUMS
from disco.program import Op, Program, Ref
from disco_kernels.pattern import Selected

OUTPUT = "output"


@dataclass
class Needs:
    """What the ops want of one value of other ranks; `readers` are their places in the program."""

    selected: list[Selected] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    gathered_by: list[str] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)


class Sources:
    """Which value is exchanged when a value is needed: itself, or a smaller one that it is made of.

    Attributes:
        replayed: the values that receivers compute, and what from.
    """

    def __init__(
        self, program: Program, lowerings: Sequence[Lowering], context: RuleContext
    ) -> None:
        self.replayed: dict[str, Replayed] = {}
        self._root: dict[str, str] = {}
        normed: set[str] = set()
        for op, lowering in zip(program.ops, lowerings, strict=True):
            before = _replayed_from(op, lowering, context)
            if before is None:
                continue
            assert lowering.replay is not None
            root = self.root(before.name)
            # A norm's input is no smaller than its result, but it spares a message: the statistics
            # travel with it.
            spares = op.kind in STATISTICS_READERS or before.name in normed
            if bytes_per_channel(root, context) < bytes_per_channel(op.name, context) + spares:
                if spares:
                    normed.add(op.name)
                self._root[op.name] = root
                self.replayed[op.name] = Replayed(before, op, lowering.replay)

    def root(self, value: str) -> str:
        """The value that is exchanged where `value` is needed."""
        return self._root.get(value, value)


# Ops that apply what `disco.partition.norms` has split off to their first argument.
STATISTICS_READERS = ("disco.normalize", "disco.group_normalize")


def bytes_per_channel(name: str, context: RuleContext) -> int:
    """Bytes of one channel of a sharded value, of one image."""
    placement = context.placements[name]
    assert isinstance(placement, Sharded)
    sizes = context.sizes(name)
    others = prod(size for dim, size in enumerate(sizes) if dim != placement.dim)
    return others * _item_bytes(context.values[name].dtype)


def collect_needs(
    program: Program, lowerings: Sequence[Lowering], context: RuleContext, sources: Sources
) -> dict[str, Needs]:
    """By exchanged value what is needed of it, in the order of first reading."""
    needs: dict[str, Needs] = {}
    for position, (op, lowering) in enumerate(zip(program.ops, lowerings, strict=True)):
        for name, selected in (*lowering.select.items(), *lowering.reshare.items()):
            need = needs.setdefault(sources.root(name), Needs())
            need.selected.append(selected)
            need.consumers.append(context.layer_of(op))
            need.readers.append(position)
        for name in lowering.whole:
            need = needs.setdefault(sources.root(name), Needs())
            need.gathered_by.append(context.layer_of(op))
            need.readers.append(position)
    for name in program.output_names():
        if isinstance(context.placements[name], Sharded):
            need = needs.setdefault(sources.root(name), Needs())
            need.gathered_by.append(OUTPUT)
            need.readers.append(len(program.ops))
    return needs


def make_exchanges(
    program: Program,
    lowerings: Sequence[Lowering],
    context: RuleContext,
    needs: Mapping[str, Needs],
    sources: Sources,
) -> dict[str, Exchange]:
    """By exchanged value its exchange; statistics are in that of the value which they are of."""
    place = {op.name: position for position, op in enumerate(program.ops)}
    forms = {name: low.form for low in lowerings for name in low.select}
    riders: dict[str, list[str]] = {}
    for statistics, value in _statistics(program, needs, sources):
        same_dtype = context.values[value].dtype == context.values[statistics].dtype
        # A message goes out when all of it is there; who reads one part before that would wait for
        # what may depend on it. Of two norms in a row the second's statistics go by themselves.
        parts = (value, *riders.get(value, ()), statistics)
        complete = max(place[part] for part in parts)
        if same_dtype and all(min(needs[part].readers) > complete for part in parts):
            riders.setdefault(value, []).append(statistics)
    riding = {name for names in riders.values() for name in names}
    # Numbered in the order in which the values come into being, which is the order on every rank.
    found: dict[str, Exchange] = {}
    for op in program.ops:
        if op.name in needs and op.name not in riding:
            exchange = _exchange(len(found), op.name, needs[op.name], context)
            parts = tuple(_exchange(0, r, needs[r], context) for r in riders.get(op.name, ()))
            form = forms.get(op.name, "inputs")
            found[op.name] = replace(exchange, riders=parts, form=form)
    return found


def exchange_plan(exchange: Exchange, dense_bytes: int | None = None) -> ExchangePlan:
    """An exchange as the plan describes it."""
    ranks = range(exchange.placement.ownership.world_size)
    riders = [exchange_plan(rider) for rider in exchange.riders]
    item_bytes = _item_bytes(exchange.dtype)
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
        form=exchange.form,
        dense_bytes=dense_bytes,
        statistics=tuple(rider.value for rider in exchange.riders),
        statistics_bytes=tuple(
            tuple(sum(r.bytes_between(i, j) for r in riders) for j in ranks) for i in ranks
        )
        if riders
        else (),
    )


def exchange_plans(
    program: Program, context: RuleContext, exchanges: Mapping[str, Exchange], sources: Sources
) -> tuple[ExchangePlan, ...]:
    """All exchanges as the plan describes them.

    A dense exchange would send a layer's inputs where partial sums are sent, and each tensor once.
    """
    inputs = {op.name: op.args[0] for op in program.ops if op.kind == PARTIAL_SUMS}
    counted = set(exchanges)
    found = []
    for name, exchange in exchanges.items():
        x = inputs.get(name)
        dense_bytes = None
        if isinstance(x, Ref):
            root = sources.root(x.name)
            placement = context.placements[root]
            assert isinstance(placement, Sharded)
            copies = placement.ownership.num_channels * (context.world_size - 1)
            dense_bytes = 0 if root in counted else copies * bytes_per_channel(root, context)
            counted.add(root)
        found.append(exchange_plan(exchange, dense_bytes))
    return tuple(found)


def _replayed_from(op: Op, lowering: Lowering, context: RuleContext) -> Ref | None:
    """The value that `op` can be computed from channel by channel."""
    if lowering.replay is None or not op.args or not isinstance(op.args[0], Ref):
        return None
    x, result = op.args[0], lowering.placement
    placed = context.sharded(x)
    if placed is None or not isinstance(result, Sharded) or placed.ownership != result.ownership:
        return None
    sharded = [name for name in op.refs() if context.sharded(Ref(name)) is not None]
    others = [name for name in sharded if name not in lowering.whole]
    return x if others == [x.name] else None


def _statistics(
    program: Program, needs: Mapping[str, Needs], sources: Sources
) -> Iterator[tuple[str, str]]:
    """Exchanged statistics, and the exchanged value that receivers apply them to."""
    for op in program.ops:
        if op.kind in STATISTICS_READERS and op.name in sources.replayed:
            given = op.args[1]
            assert isinstance(given, Ref)
            value = sources.root(op.name)
            if value in needs and given.name in needs:
                yield given.name, value


def _exchange(number: int, name: str, needs: Needs, context: RuleContext) -> Exchange:
    placement = context.placements[name]
    assert isinstance(placement, Sharded)
    tables = [*needs.selected]
    if needs.gathered_by:
        tables.append(all_selected(placement.ownership))
    dtype = context.values[name].dtype
    return Exchange(
        number=number,
        value=name,
        placement=placement,
        sent=union_of(tables, placement.ownership),
        dtype=dtype,
        elements_per_channel=bytes_per_channel(name, context) // _item_bytes(dtype),
        consumers=tuple(dict.fromkeys(needs.consumers)),
        gathered_by=tuple(dict.fromkeys(needs.gathered_by)),
    )


def _item_bytes(dtype: str) -> int:
    return torch.empty(0, dtype=getattr(torch, dtype)).element_size()
