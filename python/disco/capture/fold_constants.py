"""What depends on weights alone is computed once, when the model is captured.

Standardised weights, tables of relative positions and biases put together of parts are written as
computations in a model; to the nodes they are weights like others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from disco.program import Op, Program, Ref, WeightRef, leaves, map_leaves, pure_function
from disco.program.interpret import dtype_of
from disco.program.ir import Dtype

# Results get the name of the first parameter behind them, this, and the name of the value.
COMPUTED = "@"
# What is repeated (expand, zeros) stays an op where keeping it would cost more than computing it.
_LARGEST_GROWTH = 4
_SMALL = 1 << 19


def fold_constants(program: Program, weights: dict[str, Tensor]) -> Program:
    """Replace ops that read no value by weights.

    Args:
        weights: gains the results.
    """
    known: dict[str, Any] = {}
    root: dict[str, str] = {}
    kept: list[Op] = []
    for op in program.ops:
        if any(ref not in known for ref in op.refs()):
            kept.append(op)
            continue
        found = _compute(op, weights, known)
        if found is None:
            kept.append(op)
            continue
        known[op.name] = found
        roots = [*op.weight_refs(), *(root[ref] for ref in op.refs() if ref in root)]
        root[op.name] = roots[0] if roots else "constant"

    def constant(leaf: Any) -> Any:
        if not isinstance(leaf, Ref) or leaf.name not in known:
            return leaf
        return _as_weights(known[leaf.name], root[leaf.name], leaf.name, weights)

    # In order, so that equal captures give equal names.
    ops = tuple(op.replace_leaves(constant) for op in kept)
    outputs = map_leaves(program.outputs, constant)
    values = {name: info for name, info in program.values.items() if name not in known}
    return replace(program, ops=ops, outputs=outputs, values=values)


def _compute(op: Op, weights: dict[str, Tensor], known: dict[str, Any]) -> Any:
    """The value of an op, or None if it is better kept."""

    def resolve(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return known[leaf.name]
        if isinstance(leaf, WeightRef):
            return weights[leaf.name]
        return dtype_of(leaf) if isinstance(leaf, Dtype) else leaf

    args, kwargs = map_leaves((op.args, dict(op.kwargs)), resolve)
    with torch.no_grad():
        found = pure_function(op.kind)(*args, **kwargs)
    read = sum(tensor.numel() for tensor in _tensors((args, kwargs)))
    size = sum(tensor.numel() for tensor in _tensors(found))
    return found if size <= max(_SMALL, _LARGEST_GROWTH * read) else None


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in leaves(tree) if isinstance(leaf, Tensor))


def _as_weights(value: Any, root: str, name: str, weights: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        parameter = root if root == "constant" else root.partition(COMPUTED)[0]
        key = f"{parameter}{COMPUTED}{name}"
        weights.setdefault(key, value.detach())
        return WeightRef(key)
    if isinstance(value, (tuple, list)):
        return tuple(
            _as_weights(item, root, f"{name}_{i}", weights) for i, item in enumerate(value)
        )
    return value
