"""The programs of ranks whose payloads travel in a wire dtype: which op reads what in which dtype.

Weights are the same in every wire dtype; only exchanges and the readers of payloads differ. The
kernels of convolutions and linears read a payload where it was received, with its scales. Every
other op reads a widened copy, which an op of its own makes, once a payload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from disco.errors import InputError
from disco.partition.cost import predict_latency
from disco.partition.exchange_plan import ExchangePlan
from disco.partition.plan import Plan
from disco.partition.prediction import NodeMemory
from disco.partition.rank_builder import RankProgram
from disco.partition.wire import plan_with_wire
from disco.program import Arg, Dtype, Op, Program, Ref
from disco.program.message_layout import item_bytes

EXCHANGE, SCALE, WIDEN = "disco.exchange", "disco.payload_scale", "disco.widen"
_KERNELS = frozenset({"disco.partial_conv2d", "disco.partial_linear"})
# What they read beside their weights' own dtype, and with which weights.
_KERNEL_WIRES = frozenset({"float16", "bfloat16", "int8"})
_KERNEL_DTYPES = frozenset({"float32", "float64"})
_PLAIN_VERSION, _WIRE_VERSION = 1, 2
_LINE_BYTES = 64


def with_wire_dtype(
    plan: Plan, ranks: Sequence[RankProgram], wanted: str | None
) -> tuple[Plan, tuple[RankProgram, ...]]:
    """The same partition with payloads in a wire dtype, whatever they were in before.

    Args:
        plan, ranks: of one partition.
        wanted: "float32", "float16", "bfloat16" or "int8"; None for each value's own dtype.

    Returns:
        The plan and the ranks; they share the given ranks' weights.

    Raises:
        InputError: another wire dtype, or a plan of an older version.
    """
    changed = plan_with_wire(plan, wanted)
    exchanges = {exchange.number: exchange for exchange in changed.exchanges}
    programs = [_narrowed(_plain(rank.program), exchanges) for rank in ranks]
    if plan.memory:
        changed = replace(changed, memory=_memory(plan, changed, ranks, programs))
    if plan.latency is not None:
        # What fewer nodes would take was found by planning for them; of one it holds.
        alone = tuple(fewer for fewer in plan.fewer_nodes if len(fewer.nodes) == 1)
        latency = predict_latency(changed, plan.nodes)
        changed = replace(changed, latency=latency, fewer_nodes=alone)
    return changed, tuple(
        replace(rank, program=program) for rank, program in zip(ranks, programs, strict=True)
    )


@dataclass(frozen=True)
class _Payload:
    """A received payload in a wire dtype: its exchange, and the rank that it is of."""

    exchange: ExchangePlan
    sender: int

    @property
    def kernels_read_it(self) -> bool:
        return self.exchange.wire in _KERNEL_WIRES and self.exchange.dtype in _KERNEL_DTYPES

    @property
    def is_scaled(self) -> bool:
        return self.exchange.wire == "int8"


def _narrowed(program: Program, exchanges: Mapping[int, ExchangePlan]) -> Program:
    """A program without wire dtypes, with those of the plan's exchanges."""
    ops: list[Op] = []
    payloads: dict[str, _Payload] = {}
    widened: set[str] = set()
    received: dict[str, tuple[ExchangePlan, list[int]]] = {}

    def wide(leaf: Arg) -> Arg:
        payload = payloads.get(leaf.name) if isinstance(leaf, Ref) else None
        if payload is None or not isinstance(leaf, Ref):
            return leaf
        name = f"{leaf.name}.wide"
        if name not in widened:
            widened.add(name)
            ops.append(_widen(name, leaf, payload))
        return Ref(name)

    for op in program.ops:
        source = op.args[0] if op.args else None
        if op.kind == EXCHANGE:
            exchange = exchanges[_number(op)]
            if exchange.is_narrow:
                received[op.name] = exchange, _senders(op)
                op = _with_wire(op, exchange)
            ops.append(op)
        elif op.kind == "operator.getitem" and isinstance(source, Ref) and source.name in received:
            ops.append(op)
            exchange, senders = received[source.name]
            position = op.args[1]
            assert isinstance(position, int)
            if position < len(senders):  # behind them come the statistics, as they are
                payloads[op.name] = _Payload(exchange, senders[position])
                if payloads[op.name].is_scaled:
                    ops.append(Op(SCALE, f"{op.name}.scale", op.args))
        elif op.kind in _KERNELS:
            in_place = _in_place(op, payloads)
            rest = Op(op.kind, op.name, op.args[1:], op.kwargs).replace_leaves(wide)
            segments = op.args[0]
            assert isinstance(segments, tuple)
            read = tuple(x if x in in_place else wide(x) for x in segments)
            ops.append(Op(op.kind, op.name, (read, *rest.args), _with_scales(op, in_place)))
        else:
            ops.append(op.replace_leaves(wide))
    version = _WIRE_VERSION if any("wire" in op.kwargs for op in ops) else _PLAIN_VERSION
    changed = replace(program, ops=tuple(ops), version=version)
    changed.validate()
    return changed


def _in_place(op: Op, payloads: Mapping[str, _Payload]) -> dict[Arg, _Payload]:
    """The segments of a kernel that it reads as they were received."""
    segments = op.args[0]
    assert isinstance(segments, tuple)
    found = {x: payloads[x.name] for x in segments if isinstance(x, Ref) and x.name in payloads}
    return {x: payload for x, payload in found.items() if payload.kernels_read_it}


def _with_scales(op: Op, in_place: Mapping[Arg, _Payload]) -> dict[str, Arg]:
    """A kernel's attributes, with the scale of every segment that has one."""
    segments = op.args[0]
    assert isinstance(segments, tuple)
    scaled = {x.name for x, p in in_place.items() if isinstance(x, Ref) and p.is_scaled}
    if not scaled:
        return dict(op.kwargs)
    scales = tuple(
        Ref(f"{x.name}.scale") if isinstance(x, Ref) and x.name in scaled else None
        for x in segments
    )
    return {**op.kwargs, "scale": scales}


def _widen(name: str, payload: Ref, found: _Payload) -> Op:
    scale = Ref(f"{payload.name}.scale") if found.is_scaled else None
    attributes: dict[str, Arg] = {
        "scale": scale,
        "dim": found.exchange.dim,
        "dtype": Dtype(found.exchange.dtype),
    }
    return Op(WIDEN, name, (payload,), attributes)


def _with_wire(op: Op, exchange: ExchangePlan) -> Op:
    """An exchange whose value travels in another dtype, and whose statistics do not."""
    others = (None,) * (len(op.args) - 1)
    wire: Arg = (exchange.wire, *others) if others else exchange.wire
    return replace(op, kwargs={**op.kwargs, "wire": wire})


def _plain(program: Program) -> Program:
    """The inverse of `_narrowed`."""
    names: dict[str, Ref] = {}
    ops: list[Op] = []
    for op in program.ops:
        if op.kind == WIDEN:
            payload = op.args[0]
            assert isinstance(payload, Ref)
            names[op.name] = payload
        elif op.kind != SCALE:
            kwargs = {
                key: value
                for key, value in op.kwargs.items()
                if not (op.kind == EXCHANGE and key == "wire")
                and not (op.kind in _KERNELS and key == "scale")
            }
            plain = Op(op.kind, op.name, op.args, kwargs)
            ops.append(plain.replace_leaves(lambda leaf: _renamed(leaf, names)))
    return replace(program, ops=tuple(ops), version=_PLAIN_VERSION)


def _renamed(leaf: Arg, names: Mapping[str, Ref]) -> Arg:
    return names.get(leaf.name, leaf) if isinstance(leaf, Ref) else leaf


def _memory(
    plan: Plan, changed: Plan, ranks: Sequence[RankProgram], programs: Sequence[Program]
) -> tuple[NodeMemory, ...]:
    """Messages as they are now, and every widened payload in memory of its own."""
    sent = changed.bytes_matrix
    found = []
    for rank, memory in enumerate(plan.memory):
        before = sum(_widened_bytes(ranks[rank].program, plan, rank))
        now = sum(_widened_bytes(programs[rank], changed, rank))
        less = replace(
            memory,
            activation_bytes=memory.activation_bytes - before + now,
            message_bytes=sum(sent[rank]) + sum(row[rank] for row in sent),
        )
        found.append(less)
    return tuple(found)


def _widened_bytes(program: Program, plan: Plan, rank: int) -> Iterator[int]:
    exchanges = {exchange.number: exchange for exchange in plan.exchanges}
    by_name = {op.name: op for op in program.ops}
    for op in program.ops:
        if op.kind == WIDEN:
            (payload,) = op.args
            assert isinstance(payload, Ref)
            source, position = by_name[payload.name].args
            assert isinstance(source, Ref) and isinstance(position, int)
            exchange = exchanges[_number(by_name[source.name])]
            sender = _senders(by_name[source.name])[position]
            channels = len(exchange.sent[rank][sender])
            size = channels * exchange.elements_per_channel * item_bytes(exchange.dtype)
            yield -(-size // _LINE_BYTES) * _LINE_BYTES


def _number(op: Op) -> int:
    number = op.kwargs["exchange"]
    if not isinstance(number, int):
        raise InputError(f"op {op.name!r}: exchange must be a number, given {number!r}")
    return number


def _senders(op: Op) -> list[int]:
    """The ranks of the payloads of an exchange's value, in the order of their positions."""
    receive = op.kwargs["receive"]
    assert isinstance(receive, tuple)
    pairs = receive[0] if len(op.args) > 1 else receive
    assert isinstance(pairs, tuple)
    return [int(pair[0]) for pair in pairs if isinstance(pair, tuple) and isinstance(pair[0], int)]
