"""An exported graph as a program: names of weights, symbols of sizes, attributes that matter."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from disco.capture.noise import NOISE
from disco.errors import InputError
from disco.program import (
    Dtype,
    Op,
    Output,
    Parameter,
    Program,
    Ref,
    Signature,
    ValueInfo,
    WeightRef,
    is_allowed,
)
from disco.program.symbols import first_failing

# Where and how a result lies in memory is for the executor to choose; values do not depend on it.
_PLACEMENT_ATTRIBUTES = frozenset({"device", "layout", "memory_format", "pin_memory"})

# Checks of export on sizes and dtypes, already made: they compute nothing.
_CHECKS = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_scalar.default",
        "aten.sym_constrain_range_for_size.default",
        "aten.sym_constrain_range.default",
    }
)


def convert(
    exported: ExportedProgram, parameters: Sequence[Parameter] = ()
) -> tuple[Program, dict[str, Tensor]]:
    """The program of an exported model and its weights by the model's own names.

    Args:
        parameters: the arguments that it was exported with, by position and then by name; their
            values are taken from the exported model.

    Raises:
        InputError: an op outside the allow-list, state that the model changes, or unusual outputs.
    """
    _refuse_mutation(exported)
    tensors = _weights_of(exported)
    naming = _Symbols()
    weights: dict[str, Tensor] = {}
    inputs: list[str] = []
    values: dict[str, ValueInfo] = {}
    ops: list[Op] = []
    stand_for: dict[str, Ref | WeightRef] = {}
    arguments: list[Any] = []

    for spec in exported.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind == InputKind.USER_INPUT and isinstance(spec.arg, ConstantArgument):
            arguments.append(spec.arg.value)
        elif spec.kind == InputKind.USER_INPUT:
            arguments.append(Ref(name))
            inputs.append(name)
            stand_for[name] = Ref(name)
        elif spec.target is not None and spec.target in tensors:
            weights[spec.target] = tensors[spec.target]
            stand_for[name] = WeightRef(spec.target)

    output: Node | None = None
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in inputs:
            values[node.name] = naming.value_info(node)
        elif node.op == "call_function":
            kind = _kind_of(node.target)
            if kind in _CHECKS:
                continue
            ops.append(_op_of(node, kind, stand_for))
            stand_for[node.name] = Ref(node.name)
            values[node.name] = naming.value_info(node)
        elif node.op == "output":
            output = node
    assert output is not None
    program = Program(
        tuple(inputs),
        _outputs_of(exported, output, stand_for),
        tuple(ops),
        values,
        signature=_signature_of(exported, arguments, parameters),
        **naming.open_sizes({values[name].shape[0] for name in inputs if values[name].shape}),
    )
    return program, weights


class _Symbols:
    """Names s0, s1, ... for torch's symbols, whose own names vary with where they come from."""

    def __init__(self) -> None:
        self._names: dict[Any, Any] = {}
        self._hints: dict[str, int] = {}
        self._environment: Any = None

    def dim(self, size: int | torch.SymInt) -> int | str:
        if isinstance(size, int):
            return size
        self._environment = size.node.shape_env
        renamed = self._renamed(size.node.expr)
        if renamed.is_symbol and size.node.has_hint():
            self._hints[str(renamed)] = int(size.node.hint)
        return int(renamed) if renamed.is_number else str(renamed)

    def open_sizes(self, batch: Set[int | str]) -> dict[str, Any]:
        """Of a program: the symbols beside the batch's, and what the graph takes for granted."""
        sizes = {name: hint for name, hint in sorted(self._hints.items()) if name not in batch}
        if not sizes:
            return {}
        conditions: dict[str, None] = {}
        for guard in self._environment.guards:
            # Sizes that turned out to be equal have one symbol by now.
            condition = self._environment.replace(guard.expr)
            names = {str(self._names.get(s, s)) for s in condition.free_symbols}
            # Others are of the batch alone, which is open to any size.
            if names & set(sizes):
                conditions[str(self._renamed(condition))] = None
        failing = first_failing(tuple(conditions), self._hints)
        assert failing is None, f"the example itself does not satisfy {failing}"
        return {"example_sizes": sizes, "conditions": tuple(conditions)}

    def _renamed(self, expression: Any) -> Any:
        import sympy  # type: ignore[import-untyped]  # a dependency of torch, which has loaded it to export

        for symbol in sorted(expression.free_symbols, key=str):
            self._names.setdefault(symbol, sympy.Symbol(f"s{len(self._names)}", integer=True))
        return expression.xreplace(self._names)

    def value_info(self, node: Node) -> ValueInfo:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            shape = tuple(self.dim(size) for size in value.shape)
            return ValueInfo(shape, str(value.dtype).removeprefix("torch."))
        if isinstance(value, (tuple, list)):
            return ValueInfo((), "tuple")
        return ValueInfo((), "int" if isinstance(value, (int, torch.SymInt)) else "number")


def _refuse_mutation(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            raise InputError(
                f"the model changes {spec.target!r} while it runs, which a partitioned model "
                f"cannot; make its forward free of in-place changes to buffers and inputs"
            )


def _weights_of(exported: ExportedProgram) -> Mapping[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in (*exported.state_dict.items(), *exported.constants.items()):
        if isinstance(value, Tensor):
            tensors.setdefault(name, value.detach())
    return tensors


def _kind_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", "") or ""
    return (
        f"{'operator' if module == '_operator' else module}.{getattr(target, '__name__', target)}"
    )


def _op_of(node: Node, kind: str, stand_for: Mapping[str, Ref | WeightRef]) -> Op:
    if kind != NOISE and not is_allowed(kind):
        raise InputError(
            f"the model uses op {kind!r} (value {node.name!r}), which is not in the allow-list; if "
            f"it is a pure function, allow it with disco.program.register_op({kind!r}, function)"
        )
    kwargs = {k: v for k, v in node.kwargs.items() if k not in _PLACEMENT_ATTRIBUTES}
    return Op(
        kind,
        node.name,
        tuple(_arg(a, node, stand_for) for a in node.args),
        {key: _arg(value, node, stand_for) for key, value in sorted(kwargs.items())},
    )


def _arg(value: Any, node: Node, stand_for: Mapping[str, Ref | WeightRef]) -> Any:
    if isinstance(value, Node):
        found = stand_for.get(value.name)
        if found is None:
            raise InputError(
                f"op {node.name!r} reads {value.name!r}, which is no tensor of the model"
            )
        return found
    if isinstance(value, (tuple, list)):
        return tuple(_arg(item, node, stand_for) for item in value)
    if isinstance(value, torch.dtype):
        return Dtype(str(value).removeprefix("torch."))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(
        f"op {node.name!r} ({node.target}) has an attribute of type {type(value).__name__} "
        f"({value!r}); programs hold tensors, numbers, strings and dtypes"
    )


def _outputs_of(
    exported: ExportedProgram, output: Node, stand_for: Mapping[str, Ref | WeightRef]
) -> Output:
    spec = exported.call_spec.out_spec
    flat = [_arg(item, output, stand_for) for item in output.args[0]]  # type: ignore[union-attr]
    assert spec is not None
    return _plain(pytree.tree_unflatten(flat, spec))


def _signature_of(
    exported: ExportedProgram, leaves: list[Any], parameters: Sequence[Parameter]
) -> Signature:
    """The parameters with the nesting that was exported."""
    spec = exported.call_spec.in_spec
    if not parameters or spec is None:
        return ()
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    values = [*args, *(kwargs[p.name] for p in parameters[len(args) :])]
    return tuple(replace(p, value=_plain(v)) for p, v in zip(parameters, values, strict=True))


def _plain(tree: Any) -> Output:
    """The user's nesting in plain tuples, lists and dicts."""
    if isinstance(tree, tuple):
        return tuple(_plain(item) for item in tree)
    if isinstance(tree, list):
        return [_plain(item) for item in tree]
    if isinstance(tree, Mapping):
        return {str(key): _plain(item) for key, item in tree.items()}
    if tree is None or isinstance(tree, (Ref, WeightRef, bool, int, float, str)):
        return tree
    raise InputError(
        f"the model takes or returns a {type(tree).__name__}; tensors in tuples, lists or dicts "
        f"can be captured: wrap the model in a module that has these"
    )


assert operator.getitem.__module__ == "_operator"  # what _kind_of relies on
