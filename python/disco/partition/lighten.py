"""Moves work away from nodes whose memory does not do, where that costs the least time.

A share of a layer takes memory by its weights and time by its FLOPs. So layers give it up in the
order of FLOPs a weight byte: late layers and classifiers first, whose weights are many and whose
maps are small. Layers that are tied by residuals or groups share one ownership and move together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from disco.partition.placement import Sharded
from disco.partition.planner import MATRIX_OPS, Decisions, dense_flops, open_dim
from disco.partition.prediction import NodeMemory
from disco.partition.shares import Shares
from disco.program import Ref

# Moved beyond the need: whole channels are moved, and the need of the others grows a little.
_MARGIN = 1.02


@dataclass
class _Tied:
    """Layers that have one ownership, and what they come to.

    Attributes:
        layer: the value of the one that decides.
        flops: of all, dense.
        held: per rank the bytes of weights.
    """

    layer: str
    flops: int = 0
    held: list[float] = field(default_factory=list)


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
        missing = -room[rank] * _MARGIN
        for group in groups:
            receivers = [r for r, free in enumerate(room) if free > 0]
            if missing <= 0 or not receivers:
                break
            moved = min(missing, group.held[rank], sum(room[r] for r in receivers))
            if moved <= 0:
                continue
            weights = of_layer.get(group.layer, shares.everywhere)
            parts = _parts(receivers, shares.everywhere)
            of_layer[group.layer] = _moved(weights, rank, moved / group.held[rank], parts)
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
        if not matrix or root is None:
            continue
        group = groups.setdefault(root, _Tied(root, held=[0.0] * context.world_size))
        weight = context.weights[next(op.weight_refs())]
        dense = max(dense_flops(op, context), 1)
        group.flops += dense
        for rank, flops in enumerate(lowering.flops):
            group.held[rank] += weight.nbytes * flops / dense
    return list(groups.values())
