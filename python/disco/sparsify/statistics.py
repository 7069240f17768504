"""What scores need to know of the training, gathered while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from disco.errors import InputError
from disco.sparsify.groups import Group


class RunningMeans:
    """Exponential means, by key: m <- decay m + (1 - decay) x, beginning with the first x."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {}

    def add(self, key: str, value: Tensor) -> None:
        """Count one observation, a float32 tensor."""
        old = self.values.get(key)
        if old is None:
            self.values[key] = value
        else:
            self.values[key] = old.to(value.device).mul(self.decay).add(value, alpha=1 - self.decay)


@torch.no_grad()
def taylor_scores(weights: Mapping[str, Tensor], group: Group) -> Tensor | None:
    """(sum of gradient x weight)^2 over all that a channel is multiplied with on its way into a
    receiver: the squared change of the loss without it, to first order (Molchanov et al.,
    "Importance estimation for neural network pruning", 2019, equation 8, with a channel's
    weights in the receiver's rows as the set).

    Returns:
        float32 ``[receivers, channels]``, or None where no weight has a gradient.
    """
    total: Tensor | None = None
    for name, out in group.out_ownership.items():
        weight = weights[name]
        if weight.grad is None:
            continue
        products = weight.float() * weight.grad.float()
        columns = products.flatten(2).sum(2) if weight.dim() > 2 else products
        sums = torch.stack([columns[list(owned)].sum(0) for owned in out.channels])
        total = sums if total is None else total + sums
    return None if total is None else total.square()


class InputWatch:
    """Mean magnitudes of the inputs of layers, channel by channel, in training mode.

    Hooks are on the modules from construction to `remove`.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[str], means: RunningMeans) -> None:
        self._handles: list[RemovableHandle] = []
        for parameter in parameters:
            path, _, leaf = parameter.rpartition(".")
            tensor = getattr(model.get_submodule(path), leaf)
            for module in model.modules():  # all that share the parameter
                if any(own is tensor for own in module.parameters(recurse=False)):
                    self._watch(module, parameter, means)

    def _watch(self, module: nn.Module, parameter: str, means: RunningMeans) -> None:
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            self.remove()
            raise InputError(
                f"score 'activation' watches the inputs of Conv2d and Linear modules; "
                f"{parameter!r} is of a {type(module).__name__}: take another score"
            )
        hook = _hook(module, parameter, means)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _hook(
    watched: nn.Linear | nn.Conv2d, parameter: str, means: RunningMeans
) -> Callable[[nn.Module, Any, Any], None]:
    dim = 1 if isinstance(watched, nn.Conv2d) else -1

    @torch.no_grad()
    def observe(module: nn.Module, args: Any, kwargs: Any) -> None:
        # A copy of the model has this hook, too, but is another module.
        if module is not watched or not module.training:
            return
        x: Tensor = (args[0] if args else kwargs["input"]).detach()
        if isinstance(watched, nn.Conv2d) and x.dim() == 3:
            x = x[None]
        others = [d for d in range(x.dim()) if d != dim % x.dim()]
        magnitudes = x.abs().float()
        means.add(parameter, magnitudes.mean(others) if others else magnitudes)

    return observe
