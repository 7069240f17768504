"""Moves work away from nodes whose memory does not do, where that costs the least time.

A share of a layer takes memory by its weights and time by its FLOPs. So layers give it up in the
order of FLOPs a weight byte: late layers and classifiers first, whose weights are many and whose
maps are small. Layers that are tied by residuals or groups share one ownership and move together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from disco.partition.memory import PANEL
from disco.partition.placement import Sharded
from disco.partition.planner import MATRIX_OPS, Decisions, dense_flops, open_dim
from disco.partition.prediction import NodeMemory
from disco.partition.shares import Shares
from disco.program import Ref

# Moved beyond what is missing, as a part of the limit: whole channels are moved.
_MARGIN = 0.01


@dataclass
class _Tied:
    """Layers that have one ownership, and what they come to.

    Attributes:
        layer: the value of the one that decides.
        flops: of all, dense.
        held: per rank the bytes of packed weights.
        panel: per rank those of one panel of each layer; moving less may free nothing.
    """

    layer: str
    held: list[float]
    panel: list[float]
    flops: int = 0


def lighten(
    decisions: Decisions,
    shares: Shares,
    memory: Sequence[NodeMemory],
    limits: Sequence[int | None],
) -> Shares | None:
    """Shares that should fit better; None if no node has room for more, or nothing can move.

    Args:
        decisions: made with `shares`.
        memory: per rank what it needs with them.
        limits: per rank what it has; None is any.
    """
    needs = [m.total_bytes for m in memory]
    room = [
        float("inf") if limit is None else limit - need
        for need, limit in zip(needs, limits, strict=True)
    ]
    groups = sorted(_tied(decisions), key=lambda g: g.flops / max(sum(g.held), 1.0))
    of_layer = dict(shares.of_layer)
    for rank in range(len(needs)):
        limit = limits[rank]
        if limit is None or room[rank] >= 0:
            continue
        # With weights go activations and messages; the next try finds what is missing then.
        missing = (_MARGIN * limit - room[rank]) * memory[rank].weight_bytes / needs[rank]
        for group in groups:
            receivers = [r for r, free in enumerate(room) if free > 0]
            if missing <= 0 or not receivers:
                break
            held, panel = group.held[rank], group.panel[rank]
            if not held:
                continue
            moved = min(ceil(missing / panel) * panel, held, sum(room[r] for r in receivers))
            weights = of_layer.get(group.layer, shares.everywhere)
            parts = _parts(receivers, shares.everywhere)
            of_layer[group.layer] = _moved(weights, rank, moved / held, parts)
            for receiver, part in parts.items():
                room[receiver] -= moved * part
            missing -= moved
    return None if of_layer == shares.of_layer else replace(shares, of_layer=of_layer)


def _moved(
    weights: Sequence[float],
    rank: int,
    fraction: float,
    parts: Mapping[int, float],
) -> tuple[float, ...]:
    """This fraction of `rank`'s share, given to others in parts."""
    changed = list(weights)
    moving = changed[rank] * fraction
    changed[rank] = 0.0 if fraction >= 1 else changed[rank] - moving
    for receiver, part in parts.items():
        changed[receiver] += moving * part
    return tuple(changed)


def _parts(receivers: Sequence[int], weights: Sequence[float]) -> dict[int, float]:
    """How what is moved is divided: in proportion to what they do anyway."""
    total = sum(weights[r] for r in receivers)
    return {r: weights[r] / total if total else 1 / len(receivers) for r in receivers}


def _tied(decisions: Decisions) -> list[_Tied]:
    context = decisions.context
    root_of: dict[str, str] = {}
    groups: dict[str, _Tied] = {}
    for op, lowering in zip(decisions.program.ops, decisions.lowerings, strict=True):
        matrix = op.kind in MATRIX_OPS
        if matrix and open_dim(op, context) is not None:
            root_of[op.name] = op.name
        elif isinstance(lowering.placement, Sharded):
            # A layer is tied to its residual; a grouped one and other ops to what they read.
            tied = op.args[3:4] if matrix and op.kwargs.get("groups", 1) == 1 else op.args
            names = [arg.name for arg in tied if isinstance(arg, Ref)] if matrix else op.refs()
            found = next((root_of[name] for name in names if name in root_of), None)
            if found is not None:
                root_of[op.name] = found
        root = root_of.get(op.name)
        out = lowering.out_ownership
        if not matrix or root is None or out is None:
            continue
        none = [0.0] * context.world_size
        group = groups.setdefault(root, _Tied(root, none[:], none[:]))
        weight = context.weights[next(op.weight_refs())]
        dense = max(dense_flops(op, context), 1)
        group.flops += dense
        for rank, (count, flops) in enumerate(zip(out.counts, lowering.flops, strict=True)):
            if count:
                panel = weight.nbytes * flops / dense / count * PANEL
                group.panel[rank] += panel
                group.held[rank] += ceil(count / PANEL) * panel
    return list(groups.values())
