"""Sharded against whole, on the user's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        verdict = "equal up to rounding" if all(c.equal for c in self.comparisons) else "DIFFERENT"
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
) -> list[ImageCheck]:
    """Run each image through the processes and through the whole model in this process."""
    checks = []
    for image in images:
        x = load_image(image, preprocessing)
        reference = whole_model(model, x)
        run = processes.run(x)
        check = ImageCheck(
            image=image,
            comparisons=tuple(compare(output, reference) for output in run.outputs),
            bytes_planned=processes.manifest.plan.bytes_per_image,
            bytes_counted=sum(run.bytes_sent),
        )
        say(str(check))
        checks.append(check)
    return checks
