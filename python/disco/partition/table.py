"""A plan as text: a row a layer, then the totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from disco.partition.nearly_zero import describe

if TYPE_CHECKING:
    from disco.partition.exchange_plan import ExchangePlan
    from disco.partition.plan import LayerPlan, Plan

_HEADER = (
    *("layer", "op", "in", "out", "selected", "exchange"),
    *("activation", "exchanged", "kB/image", "MFLOP/rank", "note"),
)


def format_plan(plan: Plan) -> str:
    """The table that `print(plan)` shows."""
    by_number = {exchange.number: exchange for exchange in plan.exchanges}
    rows = [_HEADER, *(_row(layer, by_number) for layer in plan.layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *_totals(plan)])


def _row(layer: LayerPlan, exchanges: Mapping[int, ExchangePlan]) -> tuple[str, ...]:
    return (
        layer.name,
        layer.op.removeprefix("disco.").removeprefix("aten."),
        _counts(layer.in_counts) if layer.in_counts else "whole",
        _counts(layer.out_counts) if layer.out_counts else "whole",
        _selected(layer.selected_counts),
        " ".join(_exchange(exchanges[number]) for number in layer.exchanges) or "-",
        layer.activation or "-",
        layer.form or "-",
        f"{layer.bytes_per_image / 1e3:.1f}" if layer.exchanges else "-",
        _counts([f"{flops / 1e6:.1f}" for flops in layer.flops]) if layer.flops else "-",
        layer.note,
    )


def _totals(plan: Plan) -> list[str]:
    sparse, dense = plan.bytes_per_image, plan.bytes_dense_exchange
    flops, weights = plan.flops_per_rank, plan.weight_bytes_per_rank
    lines = [
        f"{plan.world_size} nodes, {len(plan.exchanges)} exchanged tensors"
        + (", every channel exchanged" if plan.dense_exchange else "")
        + (", survivable" if plan.survivable else ""),
        f"exchanged per image: {sparse / 1e6:.3f} MB, dense exchange {dense / 1e6:.3f} MB"
        + (f" ({dense / sparse:.2f}x)" if sparse else ""),
        *_narrow(plan),
        f"FLOPs per image: {_counts([f'{f / 1e9:.3f}' for f in flops])} G per node, "
        f"whole model {plan.flops_dense / 1e9:.3f} G"
        + (f" (all nodes: {sum(flops) / plan.flops_dense:.3f})" if plan.flops_dense else ""),
    ]
    if weights:
        share = (
            f" (largest: {max(weights) / plan.weight_bytes_dense:.3f})"
            if plan.weight_bytes_dense
            else ""
        )
        lines.append(
            f"weights: {_counts([f'{w / 1e6:.2f}' for w in weights])} MB per node, "
            f"whole model {plan.weight_bytes_dense / 1e6:.2f} MB{share}"
        )
    before, after = plan.gather_before, plan.gather
    if after.runs:
        lines.append(
            f"sent in part: runs of {after.channels / after.runs:.1f} channels "
            f"({before.channels / before.runs:.1f} unpermuted), {after.lines} lines of 64 bytes "
            f"a pixel ({before.lines} unpermuted)"
        )
    lines += _predictions(plan)
    if plan.replicated:
        lost = plan.bytes_without_rule
        share = f" ({lost / sparse:.1%} of all)" if sparse else ""
        lines.append(f"gathered for ops without a rule: {lost / 1e6:.3f} MB per image{share}")
    for layer in plan.replicated:
        lines.append(
            f"runs on every node: {layer.name} ({layer.op}), {layer.note}; gathering its inputs "
            f"costs {layer.bytes_per_image / 1e3:.1f} kB per image"
        )
    return [*lines, *describe(plan.nearly_zero)]


def _exchange(exchange: ExchangePlan) -> str:
    """Its number, and the part of the channels that every other rank gets."""
    if not exchange.bytes_dense:
        return f"#{exchange.number}"
    density = exchange.bytes_per_image / exchange.bytes_dense
    part = "whole" if exchange.gathered_by else f"d={density:.2f}"
    return f"#{exchange.number} {part}" + (f" {exchange.wire}" if exchange.is_narrow else "")


def _narrow(plan: Plan) -> list[str]:
    """What the wire dtype saves, scales and padding counted."""
    from disco.partition.wire import plan_with_wire

    if not plan.wire_dtype:
        return []
    wires = [exchange.wire for exchange in plan.exchanges if exchange.is_narrow]
    counts = [f"{wires.count(wire)} in {wire}" for wire in dict.fromkeys(sorted(wires))]
    counts.append(f"{len(plan.exchanges) - len(wires)} as they are")
    own = plan_with_wire(plan, None)
    sparse, dense = plan.bytes_per_image, own.bytes_dense_exchange
    return [
        f"wire dtype {plan.wire_dtype}: {', '.join(counts)}; in the values' own dtypes "
        f"{own.bytes_per_image / 1e6:.3f} MB, dense exchange {dense / 1e6:.3f} MB"
        + (f" ({dense / sparse:.2f}x)" if sparse else "")
    ]


def _predictions(plan: Plan) -> list[str]:
    lines = []
    if plan.memory:
        needed, weights, activations, messages = (
            _megabytes([getattr(memory, part) for memory in plan.memory])
            for part in ("total_bytes", "weight_bytes", "activation_bytes", "message_bytes")
        )
        lines.append(
            f"memory for one image: {needed} MB per node (packed weights {weights}, activations "
            f"{activations}, messages {messages})"
        )
    if any(node.memory_bytes is not None for node in plan.nodes):
        lines.append(f"memory limits: {_megabytes([n.memory_bytes for n in plan.nodes])} MB")
    if plan.latency is None:
        return lines
    latency, total = plan.latency, plan.latency.total_ms
    lines.append(
        f"predicted latency: {total:.2f} ms an image (computing {latency.compute_ms:.2f}, "
        f"exchanging {latency.exchange_ms:.2f}, nothing overlapped)"
    )
    for fewer in plan.fewer_nodes:
        lines.append(
            f"predicted on {_nodes(fewer.nodes)}: {fewer.latency_ms:.2f} ms"
            + ("" if fewer.fits else ", but it does not fit there")
        )
    if plan.faster_on is not None:
        lines.append(
            f"fewer nodes are faster: {_nodes(plan.faster_on.nodes)} take "
            f"{plan.faster_on.latency_ms:.2f} ms; this plan is for all {plan.world_size} that were "
            f"asked for"
        )
    return lines


def _megabytes(amounts: Sequence[int | None]) -> str:
    return _counts(["any" if n is None else f"{n / 1e6:.2f}" for n in amounts])


def _nodes(names: Sequence[str]) -> str:
    return f"{len(names)} node{'s' if len(names) > 1 else ''} ({', '.join(names)})"


def _counts(counts: Sequence[int | str]) -> str:
    """Equal counts once ("2 x 128"), others one by one."""
    if len(counts) > 1 and len(set(counts)) == 1:
        return f"{len(counts)} x {counts[0]}"
    return " ".join(str(count) for count in counts)


def _selected(table: Sequence[Sequence[int]]) -> str:
    """Channels taken from others, per receiving rank."""
    return _counts([sum(row) for row in table]) if table else "-"
