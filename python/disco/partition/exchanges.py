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

from disco.partition.exchange_plan import DenseInputs, ExchangePlan
from disco.partition.placement import Sharded, all_selected, union_of
from disco.partition.rank_builder import Exchange, Replayed
from disco.partition.rules import Lowering, RuleContext
from disco.partition.rules.partial_sums import PARTIAL_SUMS
from disco.partition.wire import STATISTICS, channel_bytes, dense_bytes, wire_of
from disco.program import Op, Program, Ref
from disco.program.message_layout import is_floating
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
    """Bytes of one channel of a sharded value, of one image, in the wire dtype."""
    dtype, (elements, scales) = context.values[name].dtype, per_channel(name, context)
    wire = wire_of(dtype, context.wire_dtype, elements, scales)
    return channel_bytes(wire, elements, scales if wire != dtype else 0)


def per_channel(name: str, context: RuleContext) -> tuple[int, int]:
    """Elements of one channel of a sharded value, of one image, and its scales in int8.

    An int8 message scales the entries of its first dimension one by one, if it has others. Where
    that is not the batch's, or nothing grows with the batch, results would depend on what else is
    in a batch: no scales, then.
    """
    placement = context.placements[name]
    assert isinstance(placement, Sharded)
    one, two = (
        [size for dim, size in enumerate(context.sizes(name, batch)) if dim != placement.dim]
        for batch in (1, 2)
    )
    of_batch = len(one) > 1 and two[0] == 2 * one[0] and one[1:] == two[1:]
    return prod(one), one[0] if of_batch else 0


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
            narrows = (
                is_floating(exchange.dtype)
                and op.kind not in STATISTICS
                and OUTPUT not in exchange.gathered_by
            )
            found[op.name] = replace(exchange, riders=parts, form=form, narrows=narrows)
    return found


def exchange_plan(
    exchange: Exchange, dense_bytes: int | None = None, dense_inputs: DenseInputs | None = None
) -> ExchangePlan:
    """An exchange as the plan describes it, in its own dtype."""
    ranks = range(exchange.placement.ownership.world_size)
    riders = [exchange_plan(rider) for rider in exchange.riders]
    return ExchangePlan(
        number=exchange.number,
        value=exchange.value,
        dim=exchange.placement.dim,
        dtype=exchange.dtype,
        bytes_per_channel=channel_bytes(exchange.dtype, exchange.elements_per_channel, 0),
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
        wire_dtype=exchange.dtype,
        narrows=exchange.narrows,
        elements_per_channel=exchange.elements_per_channel,
        scales_per_channel=exchange.scales_per_channel,
        dense_inputs=dense_inputs,
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
        if not isinstance(x, Ref):
            found.append(exchange_plan(exchange))
            continue
        root = sources.root(x.name)
        read = None if root in counted else _dense_inputs(root, context)
        counted.add(root)
        dense = 0 if read is None else dense_bytes(exchange.dtype, None, read)
        found.append(exchange_plan(exchange, dense, read))
    return tuple(found)


def _dense_inputs(root: str, context: RuleContext) -> DenseInputs:
    placement = context.placements[root]
    assert isinstance(placement, Sharded)
    return DenseInputs(*per_channel(root, context), placement.ownership.counts)


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
    elements, scales = per_channel(name, context)
    return Exchange(
        number=number,
        value=name,
        placement=placement,
        sent=union_of(tables, placement.ownership),
        dtype=context.values[name].dtype,
        elements_per_channel=elements,
        scales_per_channel=scales,
        consumers=tuple(dict.fromkeys(needs.consumers)),
        gathered_by=tuple(dict.fromkeys(needs.gathered_by)),
    )
