"""What is shown and written down while a run trains."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Progress:
    """A line that is overwritten within an epoch, on a terminal only."""

    def __init__(self, epochs: int, steps: int) -> None:
        self._epochs, self._steps = epochs, steps
        self._shows = sys.stderr.isatty()

    def at(self, epoch: int, step: int, loss: float) -> None:
        if self._shows:
            text = f"epoch {epoch + 1}/{self._epochs}, step {step + 1}/{self._steps}"
            print(f"\r{text}, loss {loss:.4f}   ", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the line."""
        if self._shows:
            print("\r" + " " * 72 + "\r", end="", file=sys.stderr, flush=True)


class TensorBoard:
    """Scalars for TensorBoard, where it is installed; it says where they are, or that it is not."""

    def __init__(self, folder: Path, first_epoch: int, say: Callable[[str], None]) -> None:
        self._writer: Any = None
        if importlib.util.find_spec("tensorboard") is None:
            say("TensorBoard is not installed: metrics go to metrics.csv only")
            return
        module = importlib.import_module("torch.utils.tensorboard")
        # What an interrupted run wrote after its last checkpoint is hidden.
        self._writer = module.SummaryWriter(str(folder), purge_step=first_epoch + 1)
        say(f"TensorBoard: {folder}")

    def add(self, row: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        for name, value in row.items():
            if name != "epoch" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def describe(row: Mapping[str, Any], epochs: int, metric: str) -> str:
    """An epoch's row as a line."""
    value = "" if row[metric] is None else f"{metric} {row[metric]:.4f}, "
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}, {value}"
        f"density {row['density']:.3f}, lr {row['lr']:.2e}, {row['seconds']:.1f} s"
    )


def silent(line: str) -> None:
    """Takes a line and drops it."""
