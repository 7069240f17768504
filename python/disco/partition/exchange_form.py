"""Per layer the cheaper of sending inputs and sending partial sums, in bytes.

Layers that read one tensor share its exchange, so a layer alone may save nothing by leaving it, and
all of them together much: both are tried. Of equals inputs are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from disco.partition.exchanges import Sources, bytes_per_channel, collect_needs
from disco.partition.placement import union_of
from disco.partition.rules import Lowering, RuleContext
from disco.partition.rules.partial_sums import PartialSums, as_partial_sums
from disco.program import Op, Program
from disco_kernels.pattern import Selected


def with_cheapest_forms(
    program: Program, lowerings: Sequence[Lowering], context: RuleContext
) -> tuple[Program, RuleContext, list[Lowering]]:
    """With an op for the partial sums of each layer that sends those, before the layer."""
    sources = Sources(program, lowerings, context)
    chosen = _chosen(program, lowerings, context, sources)
    ops: list[Op] = []
    changed: list[Lowering] = []
    values, placements = dict(program.values), dict(context.placements)
    for op, lowering in zip(program.ops, lowerings, strict=True):
        sums = chosen.get(op.name)
        if sums is None:
            ops.append(op)
            changed.append(lowering)
            continue
        values[sums.name] = sums.value_info(context)
        placements[sums.name] = sums.placement
        ops += [sums.sums_op(), op]
        changed += [sums.sums_lowering(context), sums.layer_lowering(context)]
    context = replace(context, values=values, placements=placements)
    return replace(program, ops=tuple(ops), values=values), context, changed


def _chosen(
    program: Program, lowerings: Sequence[Lowering], context: RuleContext, sources: Sources
) -> dict[str, PartialSums]:
    needs = collect_needs(program, lowerings, context, sources)
    candidates: dict[str, list[PartialSums]] = {}
    for op, lowering in zip(program.ops, lowerings, strict=True):
        for name in lowering.select:
            root = sources.root(name)
            sums = None if needs[root].gathered_by else as_partial_sums(op, lowering, context)
            if sums is not None:
                candidates.setdefault(root, []).append(sums)
    chosen: dict[str, PartialSums] = {}
    for root, readers in candidates.items():
        if len(readers) == len(needs[root].readers):
            chosen.update((s.op.name, s) for s in _cheapest(root, readers, context))
    return chosen


def _cheapest(root: str, readers: Sequence[PartialSums], context: RuleContext) -> list[PartialSums]:
    """The readers of one tensor that had better send partial sums."""
    ownership = readers[0].lowering.in_ownership
    assert ownership is not None
    per_channel = bytes_per_channel(root, context)
    sums_bytes = [s.num_sent * bytes_per_channel(s.op.name, context) for s in readers]
    tables = [s.lowering.selected for s in readers]

    def total(leaving: frozenset[int]) -> int:
        stay = [table for i, table in enumerate(tables) if i not in leaving]
        sent = _size(union_of(stay, ownership)) * per_channel if stay else 0
        return sent + sum(sums_bytes[i] for i in leaving)

    best: frozenset[int] = frozenset()
    while True:
        others = [i for i in range(len(readers)) if i not in best]
        following = min((best | {i} for i in others), key=total, default=best)
        if total(following) >= total(best):
            break
        best = following
    everyone = frozenset(range(len(readers)))
    if total(everyone) < total(best):
        best = everyone
    return [readers[i] for i in sorted(best)]


def _size(selected: Selected) -> int:
    return sum(len(channels) for row in selected for channels in row)
