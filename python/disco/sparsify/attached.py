"""The model and the optimizer that a sparsifier works on, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from disco.errors import InputError


def check_optimizer(optimizer: Optimizer | None, tensors: Sequence[Tensor], score: str) -> None:
    """Raise InputError unless it trains any of the tensors, or is None and the score allows it."""
    if optimizer is None:
        if score == "taylor":
            raise InputError(
                "score 'taylor' reads gradients just before the optimizer's step; give "
                "attach(model, example_inputs, optimizer)"
            )
        return
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            f"optimizer must be a torch.optim.Optimizer or None; given {type(optimizer).__name__}"
        )
    trained = {id(p) for settings in optimizer.param_groups for p in settings["params"]}
    if not any(id(tensor) in trained for tensor in tensors):
        raise InputError(
            f"the optimizer has none of the {len(tensors)} weights that are to be sparsified; "
            "give the one that trains this model"
        )


def weights_now(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The weights by name, as they are now: loading may have replaced them.

    Raises:
        InputError: one is gone, or has another shape.
    """
    weights = {}
    for name, shape in shapes.items():
        tensor = _find(model, name)
        if tensor is None or tuple(tensor.shape) != shape:
            now = "gone" if tensor is None else f"{list(tensor.shape)}"
            raise InputError(
                f"the model changed since attach: {name!r} was {list(shape)} and is {now}; "
                "attach another Sparsifier to the model as it is now"
            )
        weights[name] = tensor
    return weights


def _find(model: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(path), leaf, None)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None
