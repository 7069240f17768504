"""An exported graph as a program: names of weights, symbols of sizes, attributes that matter."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from disco.errors import InputError
from disco.program import Dtype, Op, Output, Program, Ref, ValueInfo, WeightRef, is_allowed

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


def convert(exported: ExportedProgram) -> tuple[Program, dict[str, Tensor]]:
    """The program of an exported model and its weights by the model's own names.

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

    for spec in exported.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind == InputKind.USER_INPUT:
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
    program = Program(tuple(inputs), _outputs_of(exported, output, stand_for), tuple(ops), values)
    return program, weights


class _Symbols:
    """Names s0, s1, ... for torch's symbols, whose own names vary with where they come from."""

    def __init__(self) -> None:
        self._names: dict[Any, Any] = {}

    def dim(self, size: int | torch.SymInt) -> int | str:
        if isinstance(size, int):
            return size
        import sympy  # type: ignore[import-untyped]  # a dependency of torch, which has loaded it to export

        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self._names.setdefault(symbol, sympy.Symbol(f"s{len(self._names)}", integer=True))
        renamed = expression.xreplace(self._names)
        return int(renamed) if renamed.is_number else str(renamed)

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
    if not is_allowed(kind):
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
        f"the model returns a {type(tree).__name__}; return tensors in tuples, lists or dicts: "
        f"wrap the model in a module that does"
    )


assert operator.getitem.__module__ == "_operator"  # what _kind_of relies on
