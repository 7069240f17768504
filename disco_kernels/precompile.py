"""Kernels that are compiled at first use, compiled before it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Precompiled:
    """What `precompile` did.

    Attributes:
        batches: sizes that the model was called with.
        first_seconds, second_seconds: of the first and the second call with each, the device waited
            for. Where kernels were compiled the first took longer.
    """

    batches: tuple[int, ...]
    first_seconds: tuple[float, ...]
    second_seconds: tuple[float, ...]

    def __str__(self) -> str:
        lines = [
            f"batch {batch}: {first:.2f} s, then {second:.4f} s"
            for batch, first, second in zip(
                self.batches, self.first_seconds, self.second_seconds, strict=True
            )
        ]
        return "\n".join(lines)


def precompile(
    model: nn.Module,
    example_inputs: Sequence[Any],
    batches: Sequence[int] = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Precompiled:
    """Compile the kernels that a model needs for inputs like these, and keep them on disk.

    Triton's kernels, and the CUDA kernels for messages where CuPy compiles them, are compiled when
    they are first launched: seconds for a layer, a minute or more for a model. Their caches
    (``TRITON_CACHE_DIR``, ``DISCO_KERNELS_CACHE``) outlast the process, so this is to be called
    once a machine, after an installation or an update. It calls the model, because only then the
    kernels are exactly those that are used later: which they are depends on dtypes, sizes, memory
    formats, and the device. Kernels for the CPU are compiled already; there it does no more than
    call the model.

    Args:
        model: in evaluation mode, with operators of this package in it (`swap_`, `disco.compile`),
            on the device that it will run on.
        example_inputs: as the model takes them, tensors with the batch first, on its device.
        batches: sizes to compile for, in place of the examples' own: tiles are chosen by size. Each
            is 1 or more; inputs are repeated to it.
        example_kwargs: inputs by name, like the others.

    Returns:
        How long the calls took.

    Raises:
        ValueError: a model in training mode, no tensor among the inputs or one without images, a
            size that is no whole number above 0.
    """
    if isinstance(example_inputs, Tensor):
        raise ValueError("the example inputs are one tensor: give a tuple of all inputs, as (x,)")
    if any(module.training for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode, in which a call may change it: call "
            "eval() on it first"
        )
    given = (tuple(example_inputs), dict(example_kwargs or {}))
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor) and x.dim()]
    if not tensors:
        raise ValueError("the example inputs hold no tensor with a batch: give at least one")
    if empty := [list(x.shape) for x in tensors if not x.shape[0]]:
        raise ValueError(
            f"an example input of {empty[0]} has nothing in its batch: give one or more"
        )
    if isinstance(batches, int):
        raise ValueError(f"batches are a sequence of sizes, given {batches}: write ({batches},)")
    sizes = tuple(batches) or (tensors[0].shape[0],)
    if wrong := [size for size in sizes if not isinstance(size, int) or size < 1]:
        raise ValueError(f"batches are whole numbers of 1 or more, given {wrong[0]}")
    seconds = [_called(model, given, size) for size in sizes]
    return Precompiled(
        sizes, tuple(first for first, _ in seconds), tuple(second for _, second in seconds)
    )


def _called(model: nn.Module, given: tuple[Any, Any], batch: int) -> tuple[float, float]:
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: _repeated(x, batch), given)
    devices = {x.device for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        with torch.inference_mode():
            model(*args, **kwargs)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds[0], seconds[1]


def _repeated(x: Tensor, batch: int) -> Tensor:
    """Of so many images, in the same memory format; an alike layout is an alike kernel."""
    if not x.dim() or x.shape[0] == batch:
        return x
    found = x[torch.arange(batch, device=x.device) % x.shape[0]]
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return found.contiguous(memory_format=torch.channels_last)
    return found
