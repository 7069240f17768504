"""In which dtype exchanged tensors travel, and what that makes of a plan.

A tensor travels in the wire dtype that was asked for where that is fewer bytes than its own dtype,
and in its own dtype otherwise. Where int8 was asked for and does not pay, because a channel has few
values to share a scale (one, in a gate of squeeze-and-excitation) or no images to be scaled one by
one, it is bfloat16: off by at most 1/256 of a value, where int8 is by 1/254 of the largest. The
model's output, statistics of norms and reductions, and what is not of floats never travel in
another dtype.
"""

from __future__ import annotations

from dataclasses import replace

from disco.errors import InputError
from disco.partition.exchange_plan import DenseInputs, ExchangePlan
from disco.partition.plan import PLAN_VERSION, Plan
from disco.program.message_layout import (
    SCALE_BYTES,
    WIRE_DTYPES,
    is_floating,
    item_bytes,
    payload_bytes,
)

# Ops whose results are few and decide about everything that is normalised or summed up by them;
# parts of the model's last layer are its output.
STATISTICS = frozenset(
    {"disco.moments", "disco.group_moments", "disco.part_of_sum", "disco.part_of_layer"}
)


def check_wire_dtype(name: str | None) -> None:
    """Raise InputError for what no payload can travel in."""
    if name is not None and name not in WIRE_DTYPES:
        raise InputError(
            f"the wire dtype is one of {', '.join(WIRE_DTYPES)} (or none: values travel as they "
            f"are), given {name}"
        )


def wire_of(dtype: str, wanted: str | None, elements: int, scales: int) -> str:
    """The dtype that channels of a value travel in, if they may travel in another than their own.

    Args:
        dtype: of the value.
        wanted: the wire dtype asked for, or None.
        elements, scales: of one channel and one image; no scales: not in int8.
    """
    if wanted is None or not is_floating(dtype):
        return dtype
    # Of equals the first, which is the most exact.
    allowed = [dtype, wanted] if wanted != "int8" else [dtype, "bfloat16"]
    if wanted == "int8" and scales:
        allowed.append(wanted)
    return min(allowed, key=lambda wire: channel_bytes(wire, elements, scales))


def channel_bytes(wire: str, elements: int, scales: int) -> int:
    """Bytes of one channel and one image, without padding; no scales: int8 has none."""
    return elements * item_bytes(wire) + (SCALE_BYTES * scales if wire == "int8" else 0)


def plan_with_wire(plan: Plan, wanted: str | None) -> Plan:
    """The plan with every byte that travels counted in a wire dtype, memory and latency aside.

    Raises:
        InputError: a wire dtype that does not exist, or a plan of a version that does not say what
            a message would be in it.
    """
    check_wire_dtype(wanted)
    if plan.version < (1, 3):
        given = ".".join(map(str, plan.version))
        raise InputError(
            f"a plan of version {given} does not tell what its messages are in another dtype: "
            "partition the model again"
        )
    exchanges = tuple(_exchange_with_wire(exchange, wanted) for exchange in plan.exchanges)
    num_bytes = {exchange.number: exchange.bytes_per_image for exchange in exchanges}
    layers = tuple(
        replace(layer, bytes_per_image=sum(num_bytes[number] for number in layer.exchanges))
        for layer in plan.layers
    )
    return replace(
        plan, exchanges=exchanges, layers=layers, wire_dtype=wanted or "", version=PLAN_VERSION
    )


def _exchange_with_wire(exchange: ExchangePlan, wanted: str | None) -> ExchangePlan:
    elements, scales = exchange.elements_per_channel, exchange.scales_per_channel
    wire = wire_of(exchange.dtype, wanted if exchange.narrows else None, elements, scales)
    narrow = wire != exchange.dtype
    dense = exchange.dense_bytes
    if exchange.dense_inputs is not None:
        dense = dense_bytes(exchange.dtype, wanted, exchange.dense_inputs)
    return replace(
        exchange,
        wire_dtype=wire,
        bytes_per_channel=channel_bytes(wire, elements, scales if narrow else 0),
        dense_bytes=dense,
    )


def dense_bytes(dtype: str, wanted: str | None, inputs: DenseInputs) -> int:
    """Of one image: every rank gets all channels of the others."""
    elements, scales = inputs.elements_per_channel, inputs.scales_per_channel
    wire = wire_of(dtype, wanted, elements, scales)
    scales = scales if wire == "int8" and wire != dtype else 0
    others = len(inputs.counts) - 1
    return others * sum(payload_bytes(wire, n * elements, n * scales) for n in inputs.counts)
