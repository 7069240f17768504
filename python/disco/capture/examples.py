"""The example inputs of a capture: checked, and laid out as the model's `forward` takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from disco.errors import InputError
from disco.program import Parameter

_CONSTANTS = (bool, int, float, str)


@dataclass(frozen=True)
class Examples:
    """One call of the model.

    Attributes:
        args, kwargs: what to call it with; everything that can be is positional.
        parameters: the same, described: names, and which of them may be left out.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: tuple[Parameter, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        flat, _ = pytree.tree_flatten((self.args, self.kwargs))
        return [leaf for leaf in flat if isinstance(leaf, Tensor)]

    def with_batch_of_two(self) -> Examples:
        """Batches of one repeated: a size of 1 would be taken for a constant."""
        args, kwargs = pytree.tree_map(_at_least_two, (self.args, self.kwargs))
        return Examples(args, kwargs, self.parameters)


def read_examples(
    model: nn.Module, example_inputs: Sequence[Any], example_kwargs: Mapping[str, Any] | None
) -> Examples:
    """Check a user's example inputs.

    Raises:
        InputError: no tensor, inputs that `forward` does not take, or batches that differ.
    """
    if isinstance(example_inputs, (Tensor, Mapping)):
        raise InputError(
            f"example_inputs is a {'tensor' if isinstance(example_inputs, Tensor) else 'dict'}; "
            "pass a tuple of the model's inputs, e.g. (x,)"
        )
    if not isinstance(example_inputs, Sequence) or isinstance(example_inputs, str):
        raise InputError(
            f"example_inputs must be a tuple of the model's inputs, e.g. (x,); given "
            f"{type(example_inputs).__name__}"
        )
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise InputError(
            "example_kwargs must be a dict of inputs by name, given "
            f"{type(example_kwargs).__name__}"
        )
    if not tuple(example_inputs) and not example_kwargs:
        raise InputError("example_inputs is empty; pass a tuple with the model's inputs, e.g. (x,)")
    examples = _laid_out(model, tuple(example_inputs), dict(example_kwargs or {}))
    for parameter in examples.parameters:
        flat, _ = pytree.tree_flatten(parameter.value)
        for leaf in flat:
            if not isinstance(leaf, Tensor) and not _is_constant(leaf):
                raise InputError(
                    f"example input {parameter.name!r} holds a {type(leaf).__name__}; only tensors "
                    "and constants are supported, in tuples, lists and dicts: wrap the model in a "
                    "module whose forward takes these"
                )
    _check_batches(examples.tensors)
    return examples


def _laid_out(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Examples:
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"{type(model).__name__}.forward{signature} does not take these example inputs: {error}"
        ) from None
    for name, described in signature.parameters.items():
        # Left out here, a default may still be given in a call.
        if name not in bound.arguments and _is_constant(described.default):
            bound.arguments[name] = described.default
    parameters: list[Parameter] = []
    for name, described in signature.parameters.items():
        if name not in bound.arguments:
            continue
        value = bound.arguments[name]
        if described.kind is inspect.Parameter.VAR_POSITIONAL:
            parameters += [Parameter(f"{name}[{i}]", item) for i, item in enumerate(value)]
        elif described.kind is inspect.Parameter.VAR_KEYWORD:
            parameters += [Parameter(k, item, keyword_only=True) for k, item in value.items()]
        else:
            parameters.append(
                Parameter(
                    name,
                    value,
                    keyword_only=described.kind is inspect.Parameter.KEYWORD_ONLY
                    or name in bound.kwargs,
                    optional=_is_default(value, described.default),
                )
            )
    by_name = [p for p in parameters if p.keyword_only]
    return Examples(
        bound.args,
        {p.name: p.value for p in by_name},
        (*(p for p in parameters if not p.keyword_only), *by_name),
    )


def _is_default(value: Any, default: Any) -> bool:
    return _is_constant(value) and type(value) is type(default) and value == default


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, _CONSTANTS)


def _check_batches(tensors: Sequence[Tensor]) -> None:
    batched = [x for x in tensors if x.dim()]
    if not batched:
        raise InputError(
            "example_inputs hold no tensor whose first dimension must be the batch: give one"
        )
    for x in batched:
        if x.shape[0] == 0:
            raise InputError(
                f"an example input has shape {tuple(x.shape)}; its first dimension must be the "
                "batch, with 1 or more entries"
            )
    if len({x.shape[0] for x in batched}) > 1:
        sizes = ", ".join(str(tuple(x.shape)) for x in batched)
        raise InputError(f"example inputs differ in batch size: {sizes}; give all the same")


def _at_least_two(x: Any) -> Any:
    repeated = isinstance(x, Tensor) and x.dim() and x.shape[0] == 1
    return torch.cat((x, x)) if repeated else x
