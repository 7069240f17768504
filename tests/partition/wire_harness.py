"""Partitions with payloads in a wire dtype, against the same programs with rounded payloads.

The oracle sends every value in its own dtype and rounds what arrived, by the formulas of
`disco_kernels.wire` written down again here. Both compute the same: by kernels of ours in the same
order, so that every output has to be equal, bit for bit; torch's own sums in float64 depend on the
layout in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from disco.executor import Executor, InProcessHub, run_together
from disco.partition import Plan, RankProgram, with_wire_dtype
from disco.program import Dtype, Op, Program, Ref, register_op
from disco_kernels import Ownership
from tests.partition.harness import Case, cut

WIRES = ("float32", "float16", "bfloat16", "int8")


def rounded(x: Tensor, *, wire: torch.dtype, dim: int) -> Tensor:
    """`x` as it arrives; channels in `dim`, an int8 scale for every channel and entry of the first
    other dimension."""
    if wire != torch.int8:
        return x.to(wire).to(x.dtype)
    rows = x.movedim(dim, -1)
    flat = rows.float().reshape(rows.shape[0], -1, rows.shape[-1])
    largest = flat.abs().amax(1, keepdim=True) if flat.shape[1] else flat.new_zeros(1)
    steps = torch.full_like(largest, 127.0)
    inverse = torch.where(largest >= 2.0**-100, steps / largest, 0.0)
    scale = torch.where(largest >= 2.0**-100, largest / steps, 0.0)
    back = (flat * inverse).round() * scale
    return back.to(x.dtype).reshape(rows.shape).movedim(-1, dim)


register_op("tests.rounded", rounded)


def with_rounded_payloads(program: Program, plan: Plan) -> Program:
    """A program that sends values as they are, with what it receives rounded as in `plan`."""
    exchanges = {exchange.number: exchange for exchange in plan.exchanges}
    of_op: dict[str, tuple[int, int]] = {}
    names: dict[str, str] = {}
    ops: list[Op] = []
    for op in program.ops:
        renamed = op.replace_leaves(
            lambda leaf: Ref(names.get(leaf.name, leaf.name)) if isinstance(leaf, Ref) else leaf
        )
        ops.append(renamed)
        source = op.args[0] if op.args else None
        if op.kind == "disco.exchange":
            number, receive = op.kwargs["exchange"], op.kwargs["receive"]
            assert isinstance(number, int) and isinstance(receive, tuple)
            own = receive[0] if len(op.args) > 1 else receive
            assert isinstance(own, tuple)
            of_op[op.name] = number, len(own)
        elif op.kind == "operator.getitem" and isinstance(source, Ref) and source.name in of_op:
            number, count = of_op[source.name]
            exchange, position = exchanges[number], op.args[1]
            assert isinstance(position, int)
            if exchange.is_narrow and position < count:
                names[op.name] = f"{op.name}.rounded"
                attributes = {"wire": Dtype(exchange.wire), "dim": exchange.dim}
                ops.append(Op("tests.rounded", names[op.name], (Ref(op.name),), attributes))
    return replace(program, ops=tuple(ops), version=2)


def run(
    ranks: Sequence[RankProgram], x: Tensor, backend: str | None, times: int = 1
) -> tuple[list[list[Tensor]], list[tuple[int, int]]]:
    """Every rank's outputs of the last of so many requests, and the bytes it sent and received."""
    executors = [Executor(rank.program, rank.weights, backend=backend) for rank in ranks]
    for _ in range(times):
        transports = InProcessHub(len(ranks)).transports()
        results = run_together(executors, (x,), transports)
    counted = [(t.bytes_sent, t.bytes_received) for t in transports]
    return [_flat(result) for result in results], counted


def check_payloads(
    plan: Plan,
    ranks: Sequence[RankProgram],
    wire: str,
    inputs: Sequence[Tensor],
    backend: str | None,
) -> Plan:
    """The partition in `wire`: outputs equal to the oracle's, bytes as planned. Its plan."""
    changed, narrow = with_wire_dtype(plan, ranks, wire)
    assert changed.wire_dtype == wire
    # What a node gets is what was written down.
    narrow = tuple(replace(r, program=Program.from_json(r.program.to_json())) for r in narrow)
    oracle = [replace(r, program=with_rounded_payloads(r.program, changed)) for r in ranks]
    assert Plan.from_json(changed.to_json()) == changed
    for x in inputs:
        expected, _ = run(oracle, x, backend)
        found, counted = run(narrow, x, backend, times=3)  # the third of bound kernels
        for mine, wanted in zip(found, expected, strict=True):
            assert len(mine) == len(wanted)
            for a, b in zip(mine, wanted, strict=True):
                assert a.dtype == b.dtype and _alike(a, b), f"{wire}: {(a - b).abs().max()}"
        planned = changed.bytes_matrix_for(len(x))
        for rank, (sent, received) in enumerate(counted):
            assert sent == sum(planned[rank])
            assert received == sum(row[rank] for row in planned)
        assert changed.bytes_for(len(x)) == sum(sent for sent, _ in counted)
    return changed


def check_case(
    case: Case,
    world_size: int,
    ownership: Mapping[str, Ownership] | None = None,
    outputs: Any = None,
    wires: Sequence[str] = WIRES,
    batches: Sequence[int] = (1, 3),
    **options: Any,
) -> dict[str, Plan]:
    """A small program in float64, by the reference kernels, in every wire dtype: their plans."""
    plan, ranks = cut(case, world_size, ownership, outputs, **options)
    inputs = [case.input(batch) for batch in batches]
    return {wire: check_payloads(plan, ranks, wire, inputs, "reference") for wire in wires}


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.dtype != torch.float64 or a.numel() == 0:
        return torch.equal(a, b)
    return float((a - b).abs().max()) <= 1e-12 * max(float(b.abs().max()), 1.0)


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]
