"""Small programs on several ranks in one process, in float64, against the plain interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from disco.executor import Executor, InProcessHub, run_together
from disco.partition import Plan, RankProgram, build_all, decide
from disco.program import Op, Program, Ref, ValueInfo, WeightRef, interpret
from disco_kernels import Ownership
from tests.examples import examples

# A batch that no other size of these programs has: shapes are recognised by it.
PROBE_BATCH = 11
CONV = {
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "activation": "none",
}

property_test = settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
world_sizes = st.integers(1, 4)


@st.composite
def ownerships(draw: st.DrawFn, num_channels: int, world_size: int) -> Ownership:
    """Any ownership: unordered, uneven, ranks with nothing included."""
    ranks = st.lists(st.integers(0, world_size - 1), min_size=num_channels, max_size=num_channels)
    owner = draw(ranks)
    order = draw(st.permutations(range(num_channels)))
    return Ownership(tuple(tuple(c for c in order if owner[c] == r) for r in range(world_size)))


class Case:
    """A program under construction: ops, weights and a seeded source of numbers."""

    def __init__(self, *input_shape: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.input_shape = input_shape
        self.ops: list[Op] = []
        self.weights: dict[str, Tensor] = {}

    def weight(self, name: str, *shape: int, zero_columns: float = 0.0) -> WeightRef:
        """A random weight; this share of its blocks' columns, chosen at random, is zero."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if zero_columns:
            keep = torch.rand(shape[:2], generator=self.generator) >= zero_columns
            values *= keep.view(*shape[:2], *([1] * (len(shape) - 2)))
        self.weights[name] = values
        return WeightRef(name)

    def conv(self, name: str, x: str, outputs: int, inputs: int, **attributes: Any) -> Ref:
        """A convolution with bias; `kernel`, `zero_columns`, `residual` besides attributes."""
        kernel = attributes.pop("kernel", (1, 1))
        zeros = attributes.pop("zero_columns", 0.0)
        residual = attributes.pop("residual", None)
        groups = attributes.get("groups", 1)
        weight = self.weight(
            f"{name}.weight", outputs, inputs // groups, *kernel, zero_columns=zeros
        )
        args = (Ref(x), weight, self.weight(f"{name}.bias", outputs), residual)
        return self.op("disco.conv2d", name, *args, **{**CONV, **attributes})

    def linear(self, name: str, x: str, outputs: int, inputs: int, **attributes: Any) -> Ref:
        """A linear with bias; `zero_columns` and `residual` besides its activation."""
        zeros = attributes.pop("zero_columns", 0.0)
        residual = attributes.pop("residual", None)
        weight = self.weight(f"{name}.weight", outputs, inputs, zero_columns=zeros)
        args = (Ref(x), weight, self.weight(f"{name}.bias", outputs), residual)
        return self.op("disco.linear", name, *args, **{"activation": "none", **attributes})

    def op(self, kind: str, name: str, *args: Any, **kwargs: Any) -> Ref:
        """Any op."""
        self.ops.append(Op(kind, name, args, kwargs))
        return Ref(name)

    def input(self, batch: int) -> Tensor:
        """A random input."""
        shape = (batch, *self.input_shape)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def program(self, outputs: Any = None) -> Program:
        """The program, its shapes found by running it on a probe."""
        returned = outputs if outputs is not None else Ref(self.ops[-1].name)
        values = {"x": ValueInfo(("s0", *self.input_shape), "float64")}
        names = [op.name for op in self.ops]
        probe = Program(("x",), tuple(map(Ref, names)), tuple(self.ops), values)
        results = interpret(probe, self.weights, (self.input(PROBE_BATCH),))
        for name, result in zip(names, results, strict=True):
            values[name] = _info(result)
        return Program(("x",), returned, tuple(self.ops), values)


def _info(value: Any) -> ValueInfo:
    if not isinstance(value, Tensor):
        return ValueInfo((), "tuple" if isinstance(value, (tuple, list)) else "int")
    shape = tuple("s0" if size == PROBE_BATCH else size for size in value.shape)
    return ValueInfo(shape, str(value.dtype).removeprefix("torch."))


def cut(
    case: Case,
    world_size: int,
    ownership: Mapping[str, Ownership] | None = None,
    outputs: Any = None,
    **options: Any,
) -> tuple[Plan, Sequence[RankProgram]]:
    """Plan and ranks of a case."""
    decisions = decide(
        case.program(outputs), case.weights, {}, world_size, out_ownership=ownership, **options
    )
    return build_all(decisions)


def check_exact(
    case: Case,
    world_size: int,
    ownership: Mapping[str, Ownership] | None = None,
    outputs: Any = None,
    batches: Sequence[int] = (1, 3),
    **options: Any,
) -> Plan:
    """Every rank's outputs equal the interpreter's, and the counted bytes the planned ones."""
    plan, ranks = cut(case, world_size, ownership, outputs, **options)
    # What a node gets is what was written down, not the objects of the planner.
    programs = [Program.from_json(rank.program.to_json()) for rank in ranks]
    executors = [
        Executor(program, rank.weights, backend="reference")
        for program, rank in zip(programs, ranks, strict=True)
    ]
    for batch in batches:
        x = case.input(batch)
        expected = _flat(interpret(case.program(outputs), case.weights, (x,)))
        transports = InProcessHub(world_size).transports()
        for result in run_together(executors, (x,), transports):
            found = _flat(result)
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                assert a.shape == b.shape
                error = float((a - b).abs().max()) if a.numel() else 0.0
                scale = float(b.abs().max()) if b.numel() else 0.0
                assert error <= 1e-12 * max(scale, 1.0), f"error {error:.2e}, scale {scale:.2e}"
        for rank, transport in enumerate(transports):
            assert transport.bytes_sent == batch * sum(plan.bytes_matrix[rank])
            assert transport.bytes_received == batch * sum(row[rank] for row in plan.bytes_matrix)
    return plan


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]
