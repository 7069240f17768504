"""Models on other devices are captured from a copy in CPU memory: a program names no device."""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from disco.errors import InputError

_CPU = torch.device("cpu")
_Tree = TypeVar("_Tree")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU if it has none."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return _CPU if first is None else first.device


def on_cpu(model: nn.Module, inputs: _Tree) -> tuple[nn.Module, _Tree]:
    """The same objects if everything is in CPU memory already, else copies there.

    Args:
        inputs: tensors in any nesting.

    Raises:
        InputError: no module, or one whose parameters have no values ("meta").
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, given {type(model).__name__}")
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    if any(t.is_meta for t in tensors):
        raise InputError(
            f"{type(model).__name__} is on the device 'meta', where parameters have no values: "
            "make it on the CPU, or load its weights with assign=True"
        )
    if any(t.device != _CPU for t in tensors):
        model = copy.deepcopy(model).cpu()
    return model, pytree.tree_map_only(Tensor, Tensor.cpu, inputs)
