"""Models of which only parts can be captured: those parts are partitioned, the rest stays in torch.

A detector's backbone and head are plain networks; what follows them (anchors, thresholds,
non-maximum suppression) depends on the data, which no exported graph can. So the parts run on the
nodes, each node has a part's whole outputs, and the rest goes on from there as it always did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from disco.api import Partitioned, partition
from disco.errors import InputError
from disco_kernels import Pattern


class CallInputs(NamedTuple):
    """What a module was called with: `args` by position and `kwargs` by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def submodule_inputs(
    model: nn.Module,
    names: Sequence[str],
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, CallInputs]:
    """What each of these submodules is given first when the model runs in evaluation mode.

    Args:
        model: is run once, without gradients, and left as it is.
        names: as in ``model.named_modules()``: "backbone", "head".
        example_inputs, example_kwargs: of the whole model, in whatever form it takes.

    Raises:
        InputError: a name that is no submodule, or one that the model does not call.
    """
    modules = _find(model, names)
    found: dict[str, CallInputs] = {}
    handles = []
    for name, module in modules.items():

        def record(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
        ) -> None:
            found.setdefault(name, CallInputs(args, kwargs))

        handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(*example_inputs, **(example_kwargs or {}))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    for name in names:
        if name not in found:
            raise InputError(
                f"{type(model).__name__} does not call its submodule {name!r} with these inputs: "
                "name the ones whose forward runs"
            )
    return found


def partition_submodules_(
    model: nn.Module,
    names: Sequence[str],
    example_inputs: Sequence[Any],
    nodes: int = 2,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    tolerance: float = 0.0,
    dense_exchange: bool = False,
    dynamic_size: bool = False,
    wire_dtype: torch.dtype | None = None,
) -> dict[str, Partitioned]:
    """Replace submodules by their partitions, in place: afterwards ``model(...)`` gives the same.

        parts = disco.partition_submodules_(ssd, ["backbone", "head"], ([image],), nodes=2)
        print(parts["backbone"].plan)
        detections = ssd([image])[0]

    Args:
        model: put it into evaluation mode before it is used, as the parts are.
        names: of the submodules, none inside another.
        example_inputs, example_kwargs: of the whole model, in whatever form it takes.
        nodes, tolerance, dense_exchange, dynamic_size, wire_dtype: as for `partition`.
        patterns: submodule -> recorded pattern of its layers.

    Returns:
        the partitions by name, for their plans and to save them. To undo, set the submodules back.

    Raises:
        InputError: as `submodule_inputs` and `partition`; the model is then left as it was.
    """
    inputs = submodule_inputs(model, names, example_inputs, example_kwargs)
    parts = {
        name: partition(
            module,
            inputs[name].args,
            nodes,
            example_kwargs=inputs[name].kwargs,
            pattern=(patterns or {}).get(name),
            tolerance=tolerance,
            dense_exchange=dense_exchange,
            dynamic_size=dynamic_size,
            wire_dtype=wire_dtype,
        ).eval()
        for name, module in _find(model, names).items()
    }
    for name, part in parts.items():
        model.set_submodule(name, part)
    return parts


def _find(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    if isinstance(names, str) or not names:
        raise InputError(f"names must be a list of submodules, e.g. ['backbone'], given {names!r}")
    known = dict(model.named_modules())
    children = ", ".join(name for name, _ in model.named_children()) or "none"
    for name in names:
        if name == "" or name not in known:
            raise InputError(
                f"{type(model).__name__} has no submodule {name!r}; its own are {children}"
            )
        inside = [outer for outer in names if name.startswith(f"{outer}.")]
        if inside:
            raise InputError(f"submodule {name!r} is inside {inside[0]!r}: name one of the two")
    return {name: known[name] for name in names}
