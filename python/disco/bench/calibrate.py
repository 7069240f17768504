"""Which wire dtype will do: a partition run in every one of them, on the user's own inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from disco import api
from disco.bench.classes import is_logits
from disco.bench.tables import table
from disco.errors import InputError
from disco.program.message_layout import WIRE_DTYPES
from disco.runtime.messages import flatten


@dataclass(frozen=True)
class WireResult:
    """One wire dtype, against the same partition with every value in its own dtype.

    Attributes:
        bytes_per_image: that the plan has all ranks send together, for a batch of 1.
        max_abs_error: largest difference of an output, over all inputs and ranks.
        scale: largest absolute output.
        images: how many inputs there were.
        changed_classes: of how many the most probable class is another; None for no classifier.
    """

    wire_dtype: str
    bytes_per_image: int
    max_abs_error: float
    scale: float
    images: int
    changed_classes: int | None

    @property
    def relative_error(self) -> float:
        """`max_abs_error` over `scale`; NaN or infinity if an output is no number any more."""
        if self.max_abs_error == 0.0:
            return 0.0
        return self.max_abs_error / self.scale if self.scale else math.inf


@dataclass(frozen=True)
class Calibration:
    """All wire dtypes, and the choice among them.

    Attributes:
        chosen: of those within `max_error` the one with the fewest bytes, of equals the one with
            the smallest error; None if there is none.
    """

    results: tuple[WireResult, ...]
    max_error: float
    chosen: str | None

    def __str__(self) -> str:
        rows = [("wire dtype", "MB/image", "max |error|", "relative", "top class changed")]
        rows += [
            (
                result.wire_dtype,
                f"{result.bytes_per_image / 1e6:.3f}",
                f"{result.max_abs_error:.2e} of {result.scale:.3g}",
                f"{result.relative_error:.2e}",
                "-"
                if result.changed_classes is None
                else f"{result.changed_classes} of {result.images}",
            )
            for result in self.results
        ]
        if self.chosen is None:
            end = f"no wire dtype has a relative error of at most {self.max_error:g}"
        else:
            end = f"smallest with a relative error of at most {self.max_error:g}: {self.chosen}"
        return f"{table(rows)}\n{end}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; an error that is no number is null."""
        results = []
        for result in self.results:
            plain = {**asdict(result), "relative_error": result.relative_error}
            results.append(
                {
                    key: None if isinstance(v, float) and not math.isfinite(v) else v
                    for key, v in plain.items()
                }
            )
        return {"results": results, "max_error": self.max_error, "chosen": self.chosen}


def calibrate(
    partitioned: api.Partitioned,
    inputs: Sequence[Tensor],
    max_error: float,
    say: Callable[[str], None],
) -> Calibration:
    """Run all ranks in this process, with every wire dtype on every input.

    Args:
        partitioned: whatever it is in; its plan must be of version 1.3 or newer.
        inputs: of the model, one call each.
        max_error: allowed difference, as part of the largest absolute output.
        say: told what is under way.

    Raises:
        InputError: no input, or a `max_error` that is no number of 0 or more.
    """
    if not inputs:
        raise InputError("there is nothing to calibrate with: give at least one input")
    check_max_error(max_error)
    say(f"every value in its own dtype (inputs: {len(inputs)})")
    own = api.with_wire_dtype(partitioned, None)
    expected = [own(x) for x in inputs]
    results = []
    for name in WIRE_DTYPES:
        say(f"payloads in {name}")
        changed = api.with_wire_dtype(partitioned, getattr(torch, name))
        results.append(_result(name, changed, inputs, expected))
    allowed = [r for r in results if r.relative_error <= max_error]
    best = min(allowed, key=lambda r: (r.bytes_per_image, r.relative_error), default=None)
    return Calibration(tuple(results), max_error, None if best is None else best.wire_dtype)


def _result(
    name: str, changed: api.Partitioned, inputs: Sequence[Tensor], expected: Sequence[Any]
) -> WireResult:
    errors, scales, classes = [0.0], [0.0], []
    for x, wanted in zip(inputs, expected, strict=True):
        for found in changed.run_ranks(x):
            pairs = list(zip(_flat(found), _flat(wanted), strict=True))
            errors += [_largest(a.double() - b.double()) for a, b in pairs]
            scales += [_largest(b) for _, b in pairs]
        if is_logits(wanted):
            classes.append(bool(wanted.argmax() != found.argmax()))
    return WireResult(
        wire_dtype=name,
        bytes_per_image=changed.plan.bytes_per_image,
        max_abs_error=math.nan if any(map(math.isnan, errors)) else max(errors),
        scale=max(scales),
        images=len(inputs),
        changed_classes=sum(classes) if len(classes) == len(inputs) else None,
    )


def _flat(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    flatten(value, tensors)
    return tensors


def _largest(x: Tensor) -> float:
    """The largest absolute value; NaN if one is in it."""
    return float(x.abs().max()) if x.numel() else 0.0


def check_max_error(max_error: float) -> None:
    """Raise InputError unless it is a number, 0 or more."""
    if not 0 <= max_error < math.inf:
        raise InputError(
            f"the largest error must be a number, 0 or more, given {max_error}: it is a part of "
            "the largest output, for example 0.01"
        )
