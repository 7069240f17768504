"""The axes of a model's parameters and buffers whose entries may change places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from disco.capture import Source, capture_source
from disco.errors import InputError
from disco.sparsify.permute import layer_rules, shape_rules
from disco.sparsify.permute.axes import Axes, Indices
from disco.sparsify.permute.inference import Inference

assert layer_rules and shape_rules  # imported for their rules


@dataclass(frozen=True)
class Axis:
    """Entries that change places together, wherever they are.

    Attributes:
        number: of a plain axis.
        name: the first layer whose outputs they are.
        size: how many.
        reason: why they have to stay; empty if they may move.
    """

    number: int
    name: str
    size: int
    reason: str


@dataclass(frozen=True)
class Permutable:
    """What is known of a model's axes.

    Attributes:
        axes: all of them.
        dims: per parameter and buffer the axes of its dimensions; tensors with several names under
            the first one.
        first_name: per name that one.
    """

    axes: Axes
    dims: Mapping[str, tuple[int, ...]]
    first_name: Mapping[str, str]

    def axis_of(self, parameter: str, dim: int) -> int:
        """That of a dimension, which may be made of several plain ones."""
        return self.dims[self.first_name[parameter]][dim]

    def plain_axes(self, dims: Sequence[tuple[str, int]]) -> list[Axis]:
        """What these dimensions (parameter, dim) are made of, in order, each once."""
        found: dict[int, Axis] = {}
        for parameter, dim in dims:
            for number in self.axes.plain_axes(self.axis_of(parameter, dim)):
                if number not in found and self.axes.size(number) > 1:
                    size, reason = self.axes.size(number), self.axes.reason(number)
                    found[number] = Axis(number, self._name_of(number), size, reason)
        return list(found.values())

    def order(self, parameter: str, dim: int, orders: Mapping[int, Indices]) -> Indices:
        """Old places by new place, of a dimension."""
        return self.axes.order(self.axis_of(parameter, dim), orders)

    def _name_of(self, number: int) -> str:
        having = [
            (len(dims) < 2 or number not in self.axes.plain_axes(dims[0]), name)
            for name, dims in self.dims.items()
            if any(number in self.axes.plain_axes(dim) for dim in dims)
        ]
        best = min((other for other, _ in having), default=True)
        name = next((name for other, name in having if other == best), f"axis {number}")
        return name.removesuffix(".weight")


def find_permutable(
    model: nn.Module,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
) -> Permutable:
    """Which entries of which dimensions may change places without changing the model's function.

    Args:
        model: is not changed.
        example_inputs, example_kwargs: as for `disco.partition`.

    Raises:
        InputError: the model cannot be captured, or has parameters that it does not read in
            evaluation mode: what they go with is not seen.
    """
    source = capture_source(model, example_inputs, example_kwargs=example_kwargs)
    return permutable_in(source, model)


def permutable_in(source: Source, model: nn.Module) -> Permutable:
    """`find_permutable` for a model that was captured before.

    Args:
        source: what `model` was captured as.
        model: is not changed.

    Raises:
        InputError: it has parameters that it does not read in evaluation mode.
    """
    first_name = _first_names(model)
    inference = Inference(source.program, source.weights, first_name)
    _check_all_read(model, inference.dims_of_weight, first_name)
    for name in _in_shared_memory(model):
        inference.fix(
            inference.dims_of_weight.get(first_name[name], ()), f"{name} shares another's memory"
        )
    for dims in inference.dims_of_weight.values():
        for axis in dims:
            for repeated in inference.axes.repeats(axis):
                inference.axes.fix(repeated, "meets itself in one dimension")
    found = inference.dims_of_weight
    in_order = [name for name in dict.fromkeys(first_name.values()) if name in found]
    dims_of = {name: tuple(found[name]) for name in in_order}
    return Permutable(inference.axes, dims_of, first_name)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _first_names(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in _named_tensors(model).items()}


def _in_shared_memory(model: nn.Module) -> list[str]:
    """Tensors that are views of one memory: what is written to one, the other has, too."""
    owner: dict[int, dict[int, str]] = {}
    for name, tensor in _named_tensors(model).items():
        if tensor.numel():
            owner.setdefault(tensor.untyped_storage().data_ptr(), {}).setdefault(id(tensor), name)
    return [name for names in owner.values() if len(names) > 1 for name in names.values()]


def _check_all_read(
    model: nn.Module, read: Mapping[str, Sequence[int]], first_name: Mapping[str, str]
) -> None:
    unread = [n for n, _ in model.named_parameters() if first_name[n] not in read]
    if unread:
        raise InputError(
            f"{type(model).__name__} does not read {len(unread)} of its parameters in evaluation "
            f"mode ({unread[0]!r}), so what they go with is not known, and they would no longer "
            "fit after channels were permuted: remove their modules (set an auxiliary head to "
            "None) first"
        )
