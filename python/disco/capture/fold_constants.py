"""What a model computes from its weights alone is computed once, when it is captured.

Weights that are standardised, biases put together of parts, tables of relative positions: a layer
that reads such a value then has a weight like any other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from disco.program import Dtype, Op, Program, Ref, WeightRef, leaves, map_leaves, pure_function
from disco.program.interpret import dtype_of


def fold_constants(program: Program, weights: dict[str, Tensor]) -> Program:
    """The program without ops that read nothing but weights and each other.

    Their results that other ops read are added to `weights`, by the name of the layer whose weight
    they are made of first, and their own.
    """
    known: dict[str, Any] = {}
    layer: dict[str, str] = {}
    for op in program.ops:
        if _is_constant(op, known):
            known[op.name] = _evaluated(op, known, weights)
            layer[op.name] = _layer_of(op, layer)
    stored: dict[str, WeightRef] = {}

    def folded(leaf: Any) -> Any:
        if not isinstance(leaf, Ref) or leaf.name not in known:
            return leaf
        value = known[leaf.name]
        if not isinstance(value, Tensor):
            return value
        if leaf.name not in stored:
            name = f"{layer[leaf.name]}.{leaf.name}"
            # A view of a weight would keep all of it.
            weights[name] = value.clone(memory_format=torch.contiguous_format)
            stored[leaf.name] = WeightRef(name)
        return stored[leaf.name]

    ops = tuple(op.replace_leaves(folded) for op in program.ops if op.name not in known)
    values = {name: info for name, info in program.values.items() if name not in known}
    outputs = map_leaves(program.outputs, folded)
    return replace(program, ops=ops, outputs=outputs, values=values)


def _is_constant(op: Op, known: dict[str, Any]) -> bool:
    refs = list(op.refs())
    if any(name not in known for name in refs):
        return False
    return bool(refs) or next(op.weight_refs(), None) is not None


def _evaluated(op: Op, known: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    def resolve(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return known[leaf.name]
        if isinstance(leaf, WeightRef):
            return weights[leaf.name]
        return dtype_of(leaf) if isinstance(leaf, Dtype) else leaf

    arguments = {key: map_leaves(value, resolve) for key, value in op.kwargs.items()}
    with torch.no_grad():
        return pure_function(op.kind)(*map_leaves(op.args, resolve), **arguments)


def _layer_of(op: Op, layer: dict[str, str]) -> str:
    """The layer of the first weight that a value is made of."""
    for leaf in leaves((op.args, tuple(op.kwargs.values()))):
        if isinstance(leaf, WeightRef):
            return leaf.name.rpartition(".")[0] or leaf.name
        if isinstance(leaf, Ref):
            return layer[leaf.name]
    raise AssertionError(f"{op.name!r} reads nothing")
