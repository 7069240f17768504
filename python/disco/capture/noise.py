"""Where a model multiplies by random numbers in training, and by nothing in evaluation.

Exported in evaluation mode a graph does not show it. So while it is exported, such modules leave an
op of ours behind, which is taken out again before anything else looks at the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from disco.capture.prune import remove_copies
from disco.program import Op, Program, Ref, WeightRef, map_leaves

# The op that a module leaves, in exported graphs and in the programs made of them.
NOISE = "disco_capture.noise.default"

# Of torchvision and of timm, neither of which has to be installed.
_STOCHASTIC_DEPTHS = ("StochasticDepth", "DropPath")

torch.library.define("disco_capture::noise", "(Tensor x, str module) -> Tensor")


@torch.library.impl("disco_capture::noise", "CompositeExplicitAutograd")
def _noise(x: Tensor, module: str) -> Tensor:
    return x.clone()


@torch.library.register_fake("disco_capture::noise")
def _noise_fake(x: Tensor, module: str) -> Tensor:
    return torch.empty_like(x)


def noise_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of dropout (of values or channels) and stochastic depth.

    In training their result is their input times random numbers that do not depend on it. Those of
    `torch.nn.AlphaDropout` are not, because it adds something.
    """
    for name, module in model.named_modules():
        is_dropout = isinstance(module, _DropoutNd) and not isinstance(
            module, (nn.AlphaDropout, nn.FeatureAlphaDropout)
        )
        if is_dropout or type(module).__name__ in _STOCHASTIC_DEPTHS:
            yield name, module


@contextmanager
def marked_noise(model: nn.Module) -> Iterator[None]:
    """Within it, `noise_modules` are the op `NOISE`, which hands on its input."""
    found = list(noise_modules(model))
    before = {module: vars(module).get("forward") for _, module in found}
    try:
        for name, module in found:
            module.forward = partial(_mark, name)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def _mark(name: str, x: Tensor) -> Tensor:
    marked: Tensor = torch.ops.disco_capture.noise(x, name)
    return marked


def draws(module: nn.Module) -> bool:
    """Whether one of `noise_modules` multiplies by anything but ones now."""
    rate = getattr(module, "p", getattr(module, "drop_prob", None))
    return module.training and rate != 0


class Noise(NamedTuple):
    """Where noise is in a program.

    Attributes:
        modules: for each value that is multiplied, the names of the modules that do it, in order.
        elsewhere: modules whose input is read without them, too, or is not computed: no value can
            stand for their result.
    """

    modules: dict[str, tuple[str, ...]]
    elsewhere: tuple[str, ...]


def take_out_noise(program: Program) -> tuple[Program, Noise]:
    """The program, as it was converted, without its ops `NOISE`, and where these were."""
    program = remove_copies(program)
    consumers = program.consumers()
    own = {op.name for op in program.ops if len(consumers[op.name]) == 1}
    own -= set(program.output_names())
    modules: dict[str, tuple[str, ...]] = {}
    elsewhere: list[str] = []
    stand_for: dict[str, Ref | WeightRef] = {}
    kept: list[Op] = []

    def original(leaf: Any) -> Any:
        return stand_for.get(leaf.name, leaf) if isinstance(leaf, Ref) else leaf

    for op in program.ops:
        if op.kind != NOISE:
            kept.append(op.replace_leaves(original))
            continue
        x, module = op.args
        assert isinstance(x, (Ref, WeightRef)) and isinstance(module, str)
        root = stand_for[op.name] = original(x)
        if isinstance(x, Ref) and x.name in own:
            modules[root.name] = (*modules.get(root.name, ()), module)
        else:
            elsewhere.append(module)
            own.discard(op.name)  # what multiplies its result has no value of its own either
    outputs = map_leaves(program.outputs, original)
    return replace(program, ops=tuple(kept), outputs=outputs), Noise(modules, tuple(elsewhere))
