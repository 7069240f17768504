"""`torch.export` with a dynamic batch, and its failures in one line."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from disco.errors import InputError


def export(model: nn.Module, example_inputs: Sequence[Any], dynamic_batch: bool) -> ExportedProgram:
    """The functional ATen graph of `model` in evaluation mode; InputError if there is none."""
    examples = _check_examples(example_inputs)
    dynamic_shapes = None
    if dynamic_batch:
        examples = tuple(_at_least_two(x) for x in examples)
        batch = Dim("batch")
        dynamic_shapes = tuple({0: batch} for _ in examples)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), warnings.catch_warnings():
            # torch warns about its own tree types while it copies the graph; nothing for the user.
            warnings.simplefilter("ignore", FutureWarning)
            exported = torch.export.export(
                model, examples, dynamic_shapes=dynamic_shapes, strict=False
            )
            return exported.run_decompositions({})
    except Exception as error:
        # Whatever export raises, the answer to the user is the same: the model, the reason, the way
        # out.
        raise InputError(
            f"{type(model).__name__} cannot be captured by torch.export: {_one_line(error)}; "
            f"capture the part of it that has no data-dependent control flow (for a detector: "
            f"backbone and heads)"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def _check_examples(example_inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    if isinstance(example_inputs, Tensor):
        raise InputError(
            "example_inputs is a tensor; pass a tuple of the model's inputs, e.g. (x,)"
        )
    examples = tuple(example_inputs)
    if not examples:
        raise InputError("example_inputs is empty; pass a tuple with the model's inputs, e.g. (x,)")
    for position, x in enumerate(examples):
        if not isinstance(x, Tensor):
            raise InputError(
                f"example input {position} is {type(x).__name__}; only tensors are supported: wrap "
                f"the model in a module whose forward takes tensors"
            )
        if x.dim() == 0 or x.shape[0] == 0:
            raise InputError(
                f"example input {position} has shape {tuple(x.shape)}; its first dimension must be "
                f"the batch, with 1 or more entries"
            )
    if len({x.shape[0] for x in examples}) > 1:
        sizes = ", ".join(str(tuple(x.shape)) for x in examples)
        raise InputError(f"example inputs differ in batch size: {sizes}; give all the same")
    return examples


def _at_least_two(x: Tensor) -> Tensor:
    return torch.cat((x, x)) if x.shape[0] == 1 else x


def _one_line(error: Exception) -> str:
    """The first line of torch's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
