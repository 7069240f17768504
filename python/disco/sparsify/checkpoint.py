"""A sparsifier's state as tensors, numbers and strings, flat, so that any format can hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from disco.errors import InputError
from disco.sparsify.groups import Group
from disco.sparsify.settings import Settings
from disco_kernels.pattern import Ownership

State = Mapping[str, Tensor | int | float | str]

_FORMAT = "disco-sparsifier"
_VERSION = 1


def header(settings: Settings, world_size: int) -> dict[str, Tensor | int | float | str]:
    """What a state has to agree on with the sparsifier that takes it."""
    found: dict[str, Tensor | int | float | str] = {"format": _FORMAT, "version": _VERSION}
    found["settings.nodes"] = world_size
    found.update({f"settings.{name}": value for name, value in settings.as_numbers().items()})
    return found


def check_header(state: State, expected: State) -> None:
    """Raise InputError unless the state is of such a sparsifier."""
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
        raise InputError("this is no state of a Sparsifier: give what state_dict returned")
    given = {k: v for k, v in state.items() if k in expected or k.startswith("settings.")}
    for name in sorted({*given, *expected}):
        if given.get(name) != expected.get(name):
            raise InputError(
                f"the state was saved with {name.removeprefix('settings.')}="
                f"{given.get(name)!r}, and this Sparsifier has {expected.get(name)!r}: resume with "
                "the settings of the training that was interrupted"
            )


def of_groups(
    groups: Sequence[Group], kept: Sequence[Tensor]
) -> dict[str, Tensor | int | float | str]:
    """Who owns what, and what is selected. The ownership was chosen for the weights at attach."""
    state: dict[str, Tensor | int | float | str] = {}
    for number, (group, table) in enumerate(zip(groups, kept, strict=True)):
        state[f"kept.{number}"] = table
        _put(state, f"in.{number}", group.in_ownership)
        for name, out in group.out_ownership.items():
            _put(state, f"out.{number}.{name}", out)
    return state


def groups_from(state: State, attached: Sequence[Group]) -> tuple[list[Group], list[Tensor]]:
    """The groups of the state, which have to be of the layers that were found, and its selections.

    Raises:
        InputError: a state of another model, or a damaged one.
    """
    names = [f"out.{n}.{name}" for n, group in enumerate(attached) for name in group.out_ownership]
    saved = [key for key in state if key.startswith("out.")]
    if set(names) != set(saved):
        strange = sorted(set(names) ^ set(saved))[0].split(".", 2)[2]
        raise InputError(
            f"the state is of another model: it and this one do not agree on layer {strange!r}; "
            "resume with the model that was trained"
        )
    groups, kept = [], []
    for number, group in enumerate(attached):
        inputs = _get(state, f"in.{number}", group.in_ownership)
        out = {
            name: _get(state, f"out.{number}.{name}", owned)
            for name, owned in group.out_ownership.items()
        }
        table = tensor(state, f"kept.{number}").cpu().bool()
        if table.shape != (group.world_size, inputs.num_channels):
            raise InputError(f"the state is damaged: kept.{number} has shape {tuple(table.shape)}")
        groups.append(Group(inputs, out, group.bytes_per_channel))
        kept.append(table)
    return groups, kept


def tensors(state: State, prefix: str) -> dict[str, Tensor]:
    """All tensors whose names begin so, without the beginning."""
    return {k.removeprefix(prefix): tensor(state, k) for k in state if k.startswith(prefix)}


def like(state: State, prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tensor for each weight, on its device, or none at all."""
    found = tensors(state, prefix)
    for name, value in found.items():
        if name not in weights or value.shape != weights[name].shape:
            raise InputError(f"the state is damaged: {prefix}{name} fits no weight")
    if found and len(found) != len(weights):
        raise InputError(f"the state is damaged: {prefix} is not there for every weight")
    return {name: value.to(weights[name].device) for name, value in found.items()}


def tensor(state: State, key: str) -> Tensor:
    """One tensor. InputError if it is missing."""
    value = state.get(key)
    if not isinstance(value, Tensor):
        raise InputError(f"the state is damaged: {key} is {type(value).__name__}, not a tensor")
    return value


def number(state: State, key: str) -> int:
    """One whole number. InputError if it is missing."""
    value = state.get(key)
    if not isinstance(value, int):
        raise InputError(f"the state is damaged: {key} is {value!r}, not a whole number")
    return value


def _put(state: dict[str, Tensor | int | float | str], key: str, ownership: Ownership) -> None:
    """Channels, rank after rank, and where each rank's end."""
    channels = [c for owned in ownership.channels for c in owned]
    state[key] = torch.tensor([*ownership.counts, *channels], dtype=torch.int64)


def _get(state: State, key: str, like: Ownership) -> Ownership:
    values = tensor(state, key).tolist()
    counts, channels = values[: like.world_size], values[like.world_size :]
    owned, first = [], 0
    for count in counts:
        owned.append(tuple(channels[first : first + count]))
        first += count
    try:
        found = Ownership(tuple(owned))
    except ValueError as error:
        raise InputError(f"the state is damaged: {key}: {error}") from None
    if found.num_channels != like.num_channels:
        raise InputError(
            f"the state is of another model: {key} has {found.num_channels} channels, and this "
            f"model {like.num_channels} there"
        )
    return found
