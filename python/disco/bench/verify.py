"""Sharded against whole, on the user's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from disco.bench.compare import Comparison, compare, whole_model
from disco.images import Preprocessing, load_image
from disco.runtime import RankProcesses


@dataclass(frozen=True)
class ImageCheck:
    """One image: each rank's output against the whole model's, planned against counted bytes."""

    image: Path
    comparisons: tuple[Comparison, ...]
    bytes_planned: int
    bytes_counted: int

    @property
    def passed(self) -> bool:
        """True if every rank's output is equal up to rounding and the bytes are as planned."""
        equal = all(comparison.equal for comparison in self.comparisons)
        return equal and self.bytes_planned == self.bytes_counted

    def __str__(self) -> str:
        worst = max(self.comparisons, key=lambda c: (not c.equal, c.max_abs_error))
        verdict = "DIFFERENT"
        if all(c.equal for c in self.comparisons):
            verdict = f"equal up to {self.comparisons[0].allowed_by}"
        text = f"{self.image}: {verdict}, {worst}"
        if self.bytes_planned != self.bytes_counted:
            text += f"; {self.bytes_planned} bytes planned but {self.bytes_counted} counted"
        return text


def verify(
    processes: RankProcesses,
    model: nn.Module,
    images: Sequence[Path],
    preprocessing: Preprocessing,
    say: Callable[[str], None],
    max_error: float | None = None,
) -> list[ImageCheck]:
    """Run each image through the processes and through the whole model in this process.

    Outputs have to be equal up to rounding or, with `max_error`, up to this part of the largest.
    """
    checks = []
    for image in images:
        x = load_image(image, preprocessing)
        reference = whole_model(model, x)
        run = processes.run(x)
        check = ImageCheck(
            image=image,
            comparisons=tuple(
                _allowing(compare(output, reference), max_error) for output in run.outputs
            ),
            bytes_planned=processes.manifest.plan.bytes_per_image,
            bytes_counted=sum(run.bytes_sent),
        )
        say(str(check))
        checks.append(check)
    return checks


def _allowing(comparison: Comparison, max_error: float | None) -> Comparison:
    if max_error is None:
        return comparison
    return replace(
        comparison, tolerance=max_error * comparison.scale, allowed_by=f"{max_error:g} of the scale"
    )
