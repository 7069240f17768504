"""Models of the same structure are exported once in a process: `torch.export` is most of the time
of the tests that capture a model on their way to something else.

What is kept is the program; the weights are those of the model that was given. Two models count as
the same if all that an export could see is: types, plain attributes, functions that modules hold,
names, shapes and dtypes of parameters and buffers and which of them are one, and the inputs. A
model with anything else (hooks, a `forward` of its own, lists of things) is exported as always.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from disco.capture import Exported
from disco.program import Program

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type)
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
# What every module has, and what says nothing about its graph in evaluation mode.
_OWN = set(vars(nn.Module()))

_capture = importlib.import_module(
    "disco.capture.capture"
)  # the package has a function of that name
_export = _capture._functional
# Program, names of its weights, and those that are constants of the graph.
_kept: dict[Hashable, tuple[Program, Sequence[str], Mapping[str, Tensor]]] = {}


class _NotPlainError(Exception):
    """A model has something that may or may not show in its graph."""


def _plain(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        raise _NotPlainError
    if isinstance(value, (*_PLAIN, *_FUNCTIONS)):
        return (type(value), value)
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_plain, value))
    if isinstance(value, dict):
        return (dict, *((_plain(k), _plain(v)) for k, v in value.items()))
    raise _NotPlainError


def _structure(model: nn.Module) -> Hashable:
    modules: list[Hashable] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise _NotPlainError
        attributes = [
            (key, _plain(value)) for key, value in vars(module).items() if key not in _OWN
        ]
        modules.append((name, type(module), *attributes))
    first: dict[int, str] = {}
    tensors = [
        (name, first.setdefault(id(t), name), t.shape, t.stride(), t.dtype, t.device)
        for name, t in _tensors(model).items()
    ]
    return (*modules, *tensors)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _described(inputs: Any) -> Hashable:
    leaves, spec = pytree.tree_flatten(inputs)
    return (
        str(spec),
        *(
            (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else _plain(x)
            for x in leaves
        ),
    )


def functional(
    model: nn.Module,
    example_inputs: Sequence[Any],
    dynamic_batch: bool,
    example_kwargs: Mapping[str, Any] | None,
    dynamic_size: bool,
) -> Exported:
    """In place of `disco.capture.capture._functional`."""
    given = (model, example_inputs, dynamic_batch, example_kwargs, dynamic_size)
    if not isinstance(model, nn.Module) or not isinstance(example_kwargs or {}, dict):
        return Exported(*_export(*given))  # which refuses them
    try:
        key = (
            _structure(model),
            _described((example_inputs, example_kwargs or {})),
            dynamic_batch,
            dynamic_size,
            torch.get_default_dtype(),
        )
    except _NotPlainError:
        return Exported(*_export(*given))
    live = _tensors(model)
    if key not in _kept:
        exported: Exported = _export(*given)
        constants = {name: t for name, t in exported.weights.items() if name not in live}
        _kept[key] = (exported.program, tuple(exported.weights), constants)
        return exported
    program, names, constants = _kept[key]
    return Exported(
        program, {n: constants[n] if n in constants else live[n].detach() for n in names}
    )


def install(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone."""
    patch.setattr(_capture, "_functional", functional)
