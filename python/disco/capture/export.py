"""`torch.export` with a dynamic batch and, if asked, image size; its failures in one line."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from disco.capture.examples import Examples
from disco.errors import InputError

_LONGEST_REASON = 200


def export(
    model: nn.Module, examples: Examples, *, dynamic_batch: bool, dynamic_size: bool
) -> ExportedProgram:
    """The functional ATen graph of `model` in evaluation mode; InputError if there is none."""
    if dynamic_batch:
        examples = examples.with_batch_of_two()
    shapes = _shapes(examples, dynamic_batch, dynamic_size)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), _quiet():
            exported = torch.export.export(
                model, examples.args, examples.kwargs, dynamic_shapes=shapes, strict=False
            )
            return exported.run_decompositions({})
    except Exception as error:  # noqa: BLE001 - it is raised again, as what the user can act on
        # Whatever export raises, the answer to the user is the same: the model, the reason, the way
        # out.
        name = type(model).__name__
        if dynamic_size:
            raise InputError(
                f"{name} cannot be captured by torch.export with a dynamic image size: "
                f"{_one_line(error)}; capture it without dynamic_size, once for each size, or make "
                f"its forward compute sizes from its input's"
            ) from _short(error)
        raise InputError(
            f"{name} cannot be captured by torch.export: {_one_line(error)}; "
            f"capture the part of it that has no data-dependent control flow (for a detector: "
            f"disco.partition_submodules_ with its backbone and heads)"
        ) from _short(error)
    finally:
        for module, training in modes.items():
            module.training = training


def _shapes(examples: Examples, dynamic_batch: bool, dynamic_size: bool) -> Any:
    """Which sizes are open: the batch, and height and width of ``[B, C, H, W]``."""
    shapes = ShapesCollection()
    batch = Dim("batch")
    is_open = False
    for x in examples.tensors:
        dims: dict[int, Any] = {0: batch} if dynamic_batch and x.dim() else {}
        if dynamic_size and x.dim() == 4:
            # Not named: torch would refuse a size below which the graph would be another, and the
            # program checks such conditions itself.
            dims.update({2: Dim.DYNAMIC, 3: Dim.DYNAMIC})
            is_open = True
        if dims:
            shapes[x] = dims
    if dynamic_size and not is_open:
        raise InputError(
            "dynamic_size was asked for, and no example input is an image [B, C, H, W]: leave it "
            "out, or give one"
        )
    return shapes if len(shapes) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Before it raises, torch prints the whole graph it has so far; what matters it raises."""
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
        # torch warns about its own tree types while it copies the graph.
        warnings.simplefilter("ignore", FutureWarning)
        yield
    sys.stderr.write(printed.getvalue())


def _short(error: Exception) -> Exception | None:
    """The cause to show in a traceback: not one that prints the whole exported program."""
    return error if len(str(error)) <= 20 * _LONGEST_REASON else None


def _one_line(error: Exception) -> str:
    """What torch's message says, without its hints on logging."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.startswith("Constraints violated"):
        # The reasons are a list below.
        text = " ".join([text.partition("!")[0], *(li for li in lines if li.startswith("- "))][:2])
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."
