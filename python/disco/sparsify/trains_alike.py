"""Whether a model's training pass is what a capture of its evaluation shows, but for batch norms,
dropout and stochastic depth, which a simulation knows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from disco.capture import device_of, noise_modules
from disco.errors import InputError


def check_trains_alike(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise InputError for what a captured model, which is one in evaluation mode, leaves out:
    other random numbers, and outputs that it has in training only. The model is not changed."""
    tried = _copied(model)
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    found = []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for training in (True, False):
            tried.train(training)
            for _, module in noise_modules(tried):
                module.eval()
            before = _random_states(device)
            result = tried(*args, **kwargs)
            drew = any(
                not torch.equal(a, b) for a, b in zip(before, _random_states(device), strict=True)
            )
            if training and drew:
                raise InputError(
                    f"{type(model).__name__} draws random numbers in training elsewhere than in "
                    "modules of torch.nn.Dropout and its like, StochasticDepth and DropPath"
                    f"{_suspects(tried)}, which cannot be simulated: set these rates to 0"
                )
            found.append(pytree.tree_structure(result))
    if found[0] != found[1]:
        raise InputError(
            f"{type(model).__name__} returns something else in training ({found[0]}) than in "
            f"evaluation ({found[1]}), which a captured model does not: leave out its auxiliary "
            "outputs"
        )


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _suspects(model: nn.Module) -> str:
    """Modules that have a rate, and are none of those."""
    known = {module for _, module in noise_modules(model)}
    names = []
    for name, module in model.named_modules():
        rates = {k: v for k, v in vars(module).items() if "drop" in k.lower() or k == "p"}
        if module not in known and any(isinstance(v, float) and v > 0 for v in rates.values()):
            names.append(name or type(module).__name__)
    return (
        f" (perhaps in {', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
    )


def _copied(model: nn.Module) -> nn.Module:
    """A copy with the `forward` of its class, whatever the instance has been given."""
    given = vars(model).get("forward")
    owner = getattr(given, "__self__", None)
    copied = copy.deepcopy(model, {} if owner is None else {id(owner): owner})
    vars(copied).pop("forward", None)
    return copied
