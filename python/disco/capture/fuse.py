"""Convolutions and linears as fused ops: residual additions and activations in their epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from disco.program import Arg, Op, Program, Ref, WeightRef

_MATRIX_OPS = ("disco.conv2d", "disco.linear")
_WITH_ACTIVATION = (*_MATRIX_OPS, "disco.channel_affine")
# Ops without parameters, as captured graphs name them, and the activation that each is.
_PLAIN_ACTIVATIONS = {
    "aten.relu.default": "relu",
    "aten.relu6.default": "relu6",
    "aten.silu.default": "silu",
    "aten.hardswish.default": "hardswish",
    "aten.hardsigmoid.default": "hardsigmoid",
    "aten.sigmoid.default": "sigmoid",
}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
# Ops that cut values off, with their parameters' defaults; and the limits that are activations.
_CLAMPS: dict[str, dict[str, Arg]] = {
    "aten.hardtanh.default": {"min_val": -1, "max_val": 1},
    "aten.clamp.default": {"min": None, "max": None},
    "aten.clamp_min.default": {"min": None},
}
_LIMITS: dict[tuple[Arg, ...], str] = {(0, 6): "relu6", (0, None): "relu", (0,): "relu"}


def lower_convolutions_and_linears(program: Program) -> Program:
    """``aten.conv2d`` and ``aten.linear`` with constant weights as ``disco`` ops.

    Others (weights that are computed, padding by name) stay as they are and run replicated.
    """
    return replace(program, ops=tuple(_lower(op) for op in program.ops))


def fuse_epilogues(program: Program) -> Program:
    """Take residual additions, then activations, into the op before whose only reader they are."""
    return _fuse_activations(_fuse_residual(program))


def _lower(op: Op) -> Op:
    defaults: dict[str, tuple[Arg, ...]] = {
        "aten.conv2d.default": (None, None, None, (1, 1), (0, 0), (1, 1), 1),
        "aten.linear.default": (None, None, None),
    }
    if op.kind not in defaults or op.kwargs:
        return op
    args = (*op.args, *defaults[op.kind][len(op.args) :])
    x, weight, bias = args[:3]
    if not isinstance(x, Ref) or not isinstance(weight, WeightRef) or isinstance(bias, Ref):
        return op
    if op.kind == "aten.linear.default":
        return Op("disco.linear", op.name, (x, weight, bias, None), {"activation": "none"})
    attributes: dict[str, Arg] = {
        "stride": _pair(args[3]),
        "padding": _pair(args[4]),
        "dilation": _pair(args[5]),
        "groups": args[6],
        "activation": "none",
    }
    return Op("disco.conv2d", op.name, (x, weight, bias, None), attributes)


def _pair(value: Arg) -> tuple[Arg, ...]:
    values = (
        tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    )
    return values * 2 if len(values) == 1 else values


def _fuse_residual(program: Program) -> Program:
    """``add(conv, x)`` becomes the convolution with residual x, at the place of the addition."""
    position = {op.name: i for i, op in enumerate(program.ops)}
    ops: dict[str, Op] = {op.name: op for op in program.ops}
    gone: set[str] = set()
    for op in program.ops:
        operands = _added(op, program)
        if operands is None:
            continue
        # Of two candidates the later one is taken: the other then exists when it is needed.
        for name in sorted(operands, key=lambda n: position.get(n, -1), reverse=True):
            other = operands[1 - operands.index(name)]
            source = ops.get(name)
            if source is not None and _takes_residual(source, name, program):
                ops[op.name] = Op(
                    source.kind, op.name, (*source.args[:3], Ref(other)), source.kwargs
                )
                gone.add(name)
                break
    return replace(
        program,
        ops=tuple(ops[op.name] for op in program.ops if op.name not in gone),
        values={name: info for name, info in program.values.items() if name not in gone},
    )


def _added(op: Op, program: Program) -> tuple[str, str] | None:
    """The two values of equal shape and dtype that `op` adds, if that is what it does."""
    if op.kind != "aten.add.Tensor" or op.kwargs or len(op.args) != 2:
        return None
    a, b = op.args
    if not isinstance(a, Ref) or not isinstance(b, Ref) or a.name == b.name:
        return None
    return (a.name, b.name) if program.values[a.name] == program.values[b.name] else None


def _takes_residual(op: Op, name: str, program: Program) -> bool:
    free = op.kind in _MATRIX_OPS and op.args[3] is None and op.kwargs["activation"] == "none"
    return free and _read_once(name, program)


def _fuse_activations(program: Program) -> Program:
    ops: dict[str, Op] = {op.name: op for op in program.ops}
    gone: set[str] = set()
    for op in program.ops:
        source = ops.get(op.args[0].name) if op.args and isinstance(op.args[0], Ref) else None
        if source is None or source.kind not in _WITH_ACTIVATION:
            continue
        activation = _activation_of(op)
        if activation is None or source.kwargs["activation"] != "none":
            continue
        if _read_once(source.name, program):
            attributes = {**source.kwargs, "activation": activation}
            ops[op.name] = Op(source.kind, op.name, source.args, attributes)
            gone.add(source.name)
    return replace(
        program,
        ops=tuple(ops[op.name] for op in program.ops if op.name not in gone),
        values={name: info for name, info in program.values.items() if name not in gone},
    )


def _activation_of(op: Op) -> str | None:
    """Which activation of the epilogue `op` is, if it is one."""
    if op.kind in _CLAMPS:
        limits = _CLAMPS[op.kind].copy()
        limits.update(zip(limits, op.args[1:], strict=False))
        limits.update(op.kwargs)
        return _LIMITS.get(tuple(limits.values()))
    if op.kind == "aten.gelu.default":
        return _GELU.get(str(op.kwargs.get("approximate", "none")))
    return _PLAIN_ACTIVATIONS.get(op.kind)


def _read_once(name: str, program: Program) -> bool:
    readers = sum(list(op.refs()).count(name) for op in program.ops)
    return readers == 1 and name not in program.output_names()
