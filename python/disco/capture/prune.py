"""Passes that remove ops: copies that a pure program does not need, and results nobody reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from disco.program import Op, Program, Ref, ValueInfo, WeightRef, leaves, map_leaves

_COPIES = frozenset(
    {
        "aten.alias.default",
        "aten.clone.default",
        "aten.contiguous.default",
        "aten.detach.default",
        "aten.lift_fresh_copy.default",
    }
)
# What `x[:, :n] += y` and `x[...] = y` become: all of the first argument may be written over.
_WRITES = frozenset({"aten.copy.default", "aten.slice_scatter.default"})
_TO_THE_END = 2**63 - 1


def remove_copies(program: Program) -> Program:
    """Let readers of a copy read the original. In a pure program nothing can tell them apart."""
    stand_for: dict[str, Ref | WeightRef] = {}

    def original(leaf: Any) -> Any:
        return stand_for.get(leaf.name, leaf) if isinstance(leaf, Ref) else leaf

    kept: list[Op] = []
    for op in program.ops:
        op = op.replace_leaves(original)
        source = _copied(op, program.values)
        if source is None:
            kept.append(op)
        else:
            stand_for[op.name] = source
    return replace(program, ops=tuple(kept), outputs=map_leaves(program.outputs, original))


def remove_dead(program: Program) -> Program:
    """Drop ops whose value no op and no output reads, and the shapes of values that are gone."""
    needed = set(program.output_names())
    kept: list[Op] = []
    for op in reversed(program.ops):
        if op.name in needed:
            needed.update(op.refs())
            kept.append(op)
    names = {*program.inputs, *(op.name for op in kept)}
    values = {name: info for name, info in program.values.items() if name in names}
    return replace(program, ops=tuple(reversed(kept)), values=values)


def _copied(op: Op, values: Mapping[str, ValueInfo]) -> Ref | WeightRef | None:
    """What `op` copies unchanged, or None if it computes something."""
    if op.kind in _COPIES:
        source = op.args[0]
    elif op.kind == "aten.cat.default" and isinstance(op.args[0], tuple) and len(op.args[0]) == 1:
        source = op.args[0][0]
    elif op.kind == "aten.slice.Tensor" and (
        tuple(op.args[2:]) in ((0, _TO_THE_END), (0, _TO_THE_END, 1))
        or _is_like(op.args[0], op, values)
    ):
        source = op.args[0]
    elif op.kind in _WRITES and _is_like(op.args[1], op, values):
        source = op.args[1]
    else:
        return None
    assert all(isinstance(leaf, (Ref, WeightRef)) for leaf in leaves(source))
    return source if isinstance(source, (Ref, WeightRef)) else None


def _is_like(arg: Any, op: Op, values: Mapping[str, ValueInfo]) -> bool:
    """Whether `arg` is a value of the shape and dtype of the op's: a part of it is then all."""
    return isinstance(arg, Ref) and op.name in values and values.get(arg.name) == values[op.name]
