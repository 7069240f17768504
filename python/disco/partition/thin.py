"""What a plan will be once its weights are sparsified: for choosing shares before that is done.

Of every exchanged tensor a receiver keeps floor(density x owned) channels of each sender, as
`disco.sparsify_` does, unless something needs the tensor whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import floor

from disco.partition.exchange_plan import Channels, ExchangePlan
from disco.partition.plan import LayerPlan, Plan
from disco.partition.planner import MATRIX_OPS, Decisions
from disco.partition.prediction import NodeMemory

# 0.2 x 15 is 3.0000000000000004 or, with other numbers, just below a whole number.
_ROUNDING = 1e-9


def thinned(plan: Plan, density: float) -> Plan:
    """The plan with fewer channels selected; which ones is not known yet, so the first."""
    exchanges = tuple(_thin_exchange(exchange, density) for exchange in plan.exchanges)
    layers = tuple(_thin_layer(layer, density) for layer in plan.layers)
    return replace(plan, exchanges=exchanges, layers=layers)


def thinned_memory(decisions: Decisions, plan: Plan, thin: Plan) -> tuple[NodeMemory, ...]:
    """The ranks' memory with `thin`, from that with `plan`: weights by layer, messages by bytes."""
    held, held_thin = _held_bytes(decisions, plan), _held_bytes(decisions, thin)
    found = []
    for rank, memory in enumerate(plan.memory):
        messages, messages_thin = (
            sum(p.bytes_matrix[rank]) + sum(row[rank] for row in p.bytes_matrix)
            for p in (plan, thin)
        )
        less = NodeMemory(
            weight_bytes=memory.weight_bytes - round(held[rank] - held_thin[rank]),
            activation_bytes=memory.activation_bytes,
            message_bytes=memory.message_bytes - (messages - messages_thin),
        )
        found.append(less)
    return tuple(found)


def _thin_exchange(exchange: ExchangePlan, density: float) -> ExchangePlan:
    if exchange.gathered_by:
        return exchange
    sent = tuple(
        tuple(
            channels[: _kept(len(exchange.ownership[j]), density)] for j, channels in enumerate(row)
        )
        for row in exchange.sent
    )
    return replace(exchange, sent=sent)


def _thin_layer(layer: LayerPlan, density: float) -> LayerPlan:
    if not layer.selected_counts or not layer.in_counts:
        return layer
    selected: Channels = tuple(
        tuple(min(n, _kept(layer.in_counts[j], density)) for j, n in enumerate(row))
        for row in layer.selected_counts
    )
    flops = tuple(
        flops * (own + sum(thin)) // max(own + sum(full), 1)
        for flops, own, thin, full in zip(
            layer.flops, layer.in_counts, selected, layer.selected_counts, strict=True
        )
    )
    return replace(layer, selected_counts=selected, flops=flops)


def _held_bytes(decisions: Decisions, plan: Plan) -> list[float]:
    """Per rank the bytes of matrices that it holds."""
    weight_of = {
        op.name: decisions.context.weights[next(op.weight_refs())].nbytes
        for op in decisions.program.ops
        if op.kind in MATRIX_OPS
    }
    held = [0.0] * plan.world_size
    for layer in plan.layers:
        if layer.value in weight_of:
            _add(held, weight_of[layer.value], layer.flops, layer.flops_dense)
    return held


def _add(held: list[float], weight_bytes: int, flops: Sequence[int], dense: int) -> None:
    for rank, own in enumerate(flops):
        held[rank] += weight_bytes * own / max(dense, 1)


def _kept(owned: int, density: float) -> int:
    return floor(density * owned + _ROUNDING)
