"""Fold batch norms (evaluation mode) into the convolution before them, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from disco.program import Op, Program, Ref, WeightRef

# Results of folding get the name of the parameter with this behind it; "@" is in no module path.
FOLDED = "@folded"

_BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"


@dataclass
class _BatchNorm:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` as a scale and a shift per channel."""

    x: Ref
    parameter: str
    scale: Tensor
    shift: Tensor


def fold_batch_norm(
    program: Program, weights: dict[str, Tensor], origins: dict[str, str]
) -> Program:
    """Fold batch norms into the convolution before, where nobody else reads that one.

    Args:
        program: with convolutions lowered to ``disco.conv2d``.
        weights: gains the folded tensors, named like the parameter with `FOLDED` behind.
        origins: gains, for each of them, that parameter's name.

    The arithmetic is float64, rounded once at the end, so that folding costs no accuracy.
    """
    consumers = program.consumers()
    producers = {op.name: op for op in program.ops}
    returned = set(program.output_names())
    folded: dict[str, Op] = {}
    dropped: set[str] = set()

    for op in program.ops:
        norm = _read(op, producers, consumers, weights)
        if norm is None:
            continue
        source = producers.get(norm.x.name)
        alone = len(consumers[norm.x.name]) == 1 and norm.x.name not in returned
        if source is not None and source.kind == "disco.conv2d" and alone:
            folded[op.name] = _into_convolution(op.name, source, norm, weights, origins)
            dropped.add(source.name)
        else:
            folded[op.name] = _alone(op.name, norm, weights, origins)
    # The batch norms themselves, tuples now unread, fall to the removal of dead ops.
    ops = tuple(folded.get(op.name, op) for op in program.ops if op.name not in dropped)
    batch_norms = {
        op.args[0].name for op in program.ops if op.name in folded and isinstance(op.args[0], Ref)
    }
    return replace(program, ops=tuple(op for op in ops if op.name not in batch_norms))


def _read(
    op: Op,
    producers: dict[str, Op],
    consumers: dict[str, list[Op]],
    weights: dict[str, Tensor],
) -> _BatchNorm | None:
    """The batch norm whose result (entry 0) `op` takes out, if it is one we can fold."""
    if op.kind != "operator.getitem" or op.args[1] != 0 or not isinstance(op.args[0], Ref):
        return None
    norm = producers[op.args[0].name]
    if norm.kind != _BATCH_NORM or len(consumers[norm.name]) != 1:
        return None
    x, weight, bias, mean, variance, _, eps = norm.args
    constants = [a for a in (weight, bias) if a is not None] + [mean, variance]
    if not isinstance(x, Ref) or not all(isinstance(a, WeightRef) for a in constants):
        return None
    assert isinstance(mean, WeightRef) and isinstance(eps, float)

    def read(reference: Any, default: float) -> Tensor:
        if reference is None:
            return torch.full_like(weights[mean.name], default, dtype=torch.float64)
        return weights[reference.name].double()

    scale = read(weight, 1.0) / torch.sqrt(read(variance, 1.0) + eps)
    shift = read(bias, 0.0) - read(mean, 0.0) * scale
    parameter = weight.name if isinstance(weight, WeightRef) else mean.name
    return _BatchNorm(x, parameter, scale, shift)


def _into_convolution(
    name: str,
    convolution: Op,
    norm: _BatchNorm,
    weights: dict[str, Tensor],
    origins: dict[str, str],
) -> Op:
    x, weight, bias, residual = convolution.args
    assert isinstance(weight, WeightRef) and residual is None
    kernel = weights[weight.name]
    shape = (-1, *([1] * (kernel.dim() - 1)))
    folded = (kernel.double() * norm.scale.view(shape)).to(kernel.dtype)
    shift = norm.shift
    if isinstance(bias, WeightRef):
        shift = weights[bias.name].double() * norm.scale + shift
    bias_parameter = bias.name if isinstance(bias, WeightRef) else norm.parameter
    new_weight = _store(weight.name, folded, weights, origins)
    new_bias = _store(bias_parameter, shift.to(kernel.dtype), weights, origins)
    return Op(convolution.kind, name, (x, new_weight, new_bias, None), convolution.kwargs)


def _alone(name: str, norm: _BatchNorm, weights: dict[str, Tensor], origins: dict[str, str]) -> Op:
    dtype = weights[norm.parameter].dtype
    scale = _store(norm.parameter, norm.scale.to(dtype), weights, origins)
    shift = _store(norm.parameter, norm.shift.to(dtype), weights, origins)
    return Op("disco.channel_affine", name, (norm.x, scale, shift), {"activation": "none"})


def _store(
    parameter: str, tensor: Tensor, weights: dict[str, Tensor], origins: dict[str, str]
) -> WeightRef:
    """Keep a folded tensor under a name of its own: one module may be called, and folded, twice."""
    for name in _names(parameter, taken=weights):
        weights[name] = tensor
        origins[name] = parameter
        return WeightRef(name)
    raise AssertionError("names never run out")


def _names(parameter: str, taken: dict[str, Tensor]) -> Sequence[str]:
    number = 1
    while (name := parameter + FOLDED + (str(number) if number > 1 else "")) in taken:
        number += 1
    return (name,)
