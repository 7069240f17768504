"""The folder of a run: config.json, checkpoints/, metrics.csv, and model.safetensors at the end."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from disco.errors import InputError
from disco.images import Preprocessing
from disco.train.checkpoint import load_state, save_state
from disco.train.config import TrainConfig
from disco.train.files import PART, remove_parts, write_text, write_whole
from disco.zoo import build_model, save_weights

CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE = "config.json", "model.safetensors", "metrics.csv"
_VERSION = 1
_KEPT = 2  # checkpoints; the older one serves if the disk damages the newer


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        path: of the folder.
        config: what it was asked to do.
        classes: names, in the order of the outputs.
        preprocessing: how an image file becomes an input.
        trained_on: the device that it began on and torch's version, in words; "" if unknown.
    """

    path: Path
    config: TrainConfig
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    trained_on: str = ""

    @property
    def weights(self) -> Path:
        """The final weights; there once the run is finished."""
        return self.path / WEIGHTS_FILE

    @property
    def pattern(self) -> Path:
        """The recorded pattern beside the weights; not there for a dense run."""
        return self.path / f"{WEIGHTS_FILE}.pattern.json"

    @property
    def is_finished(self) -> bool:
        return self.weights.is_file()

    def require_finished(self) -> None:
        """InputError unless the run is finished."""
        if not self.is_finished:
            raise InputError(
                f"the run in {self.path} is not finished (it has {len(self.checkpoints())} "
                "checkpoints and no final weights): go on with `disco train "
                f"{self.config.task} --out {self.path} --resume`"
            )

    @contextmanager
    def made(self) -> Iterator[None]:
        """Make the folder and its config.json, and hold the lock.

        Raises:
            InputError: that cannot be done, or another process has begun a run there meanwhile.
        """
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the folder {self.path} cannot be made ({error.strerror}): choose another --out"
            ) from error
        plain = {
            "version": _VERSION,
            "config": self.config.to_json(),
            "classes": list(self.classes),
            "input": self.preprocessing.to_json(),
            "trained_on": self.trained_on,
        }
        with self.locked():
            check_new(self.path)
            write_text(self.path / CONFIG_FILE, json.dumps(plain, indent=2) + "\n")
            yield

    def load_model(self) -> nn.Module:
        """The finished model in `eval()` mode, on the CPU. Raises InputError."""
        self.require_finished()
        return self.new_model(self.weights)

    def new_model(self, weights: Path | None = None) -> nn.Module:
        """The model with the weights of a file, or with the seed's random ones."""
        return build_model(
            self.config.source,
            self.config.model_name,
            weights=weights,
            seed=self.config.seed,
            num_classes=len(self.classes),
            image_size=self.preprocessing.size,
        )

    def checkpoints(self) -> list[Path]:
        """In order of epoch."""
        return sorted((self.path / "checkpoints").glob("epoch-*.safetensors"))

    def save_checkpoint(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Write the state after `epoch` epochs, then remove those that are not kept."""
        save_state(self.path / "checkpoints" / f"epoch-{epoch:06d}.safetensors", dict(state))
        for old in self.checkpoints()[:-_KEPT]:
            old.unlink(missing_ok=True)

    def newest_checkpoint(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest state that can be read, None if there is no checkpoint, and what is damaged.

        Raises InputError if there are checkpoints and all are damaged.
        """
        damaged: list[str] = []
        paths = self.checkpoints()
        for path in reversed(paths):
            try:
                return load_state(path), damaged
            except InputError as error:
                damaged.append(str(error))
        if paths:
            raise InputError(damaged[0])
        return None, damaged

    def save_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all epochs' numbers as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / METRICS_FILE, text.getvalue())

    @property
    def seconds(self) -> float:
        """That its epochs took, by the clock. InputError if metrics.csv does not tell."""
        try:
            with open(self.path / METRICS_FILE, newline="", encoding="utf-8") as file:
                return sum(float(row["seconds"]) for row in csv.DictReader(file))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path / METRICS_FILE} is damaged ({error!r}): restore it, or train again"
            ) from error

    def save_final(self, model: nn.Module) -> None:
        """Write the final weights, which makes the run a finished one."""
        write_whole(self.weights, lambda part: save_weights(model, part))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in the same folder; the lock ends with the process."""
        # Of the folder: files in it are replaced.
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another process is training in {self.path}: wait for it, or choose another "
                    "folder"
                ) from error
            remove_parts(self.path)
            remove_parts(self.path / "checkpoints")
            yield
        finally:
            os.close(folder)


def check_new(path: Path) -> None:
    """Raise InputError unless a new run can be put there."""
    if (path / CONFIG_FILE).is_file():
        raise InputError(
            f"there is a run in {path} already: go on with it with --resume, or choose another "
            "--out"
        )
    begun = {"checkpoints", PART}  # left by a process killed at once
    if path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - begun):
        raise InputError(f"{path} exists and is not an empty folder: choose another --out")
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        raise InputError(f"{place} may not be written: choose another --out, or allow writing")


def is_run(path: Path) -> bool:
    """True if it is the folder of a run."""
    return (path / CONFIG_FILE).is_file()


def open_run(path: Path) -> Run:
    """A run's folder. InputError if it is none, or of another version, or damaged."""
    file = path / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{path} is no run of `disco train`: it has no {CONFIG_FILE}")
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        if plain["version"] != _VERSION:
            raise InputError(
                f"{file} has version {plain['version']!r}, and {_VERSION} is read: use the version "
                "of disco that wrote it"
            )
        config = TrainConfig.from_json(plain["config"])
        classes = tuple(str(name) for name in plain["classes"])
        trained_on = str(plain.get("trained_on", ""))
        return Run(path, config, classes, Preprocessing.from_json(plain["input"]), trained_on)
    except InputError as error:
        raise InputError(f"{file} cannot be used: {error}") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error!r}): restore it, or train again") from error


def weights_of(place: str) -> Path:
    """The weights file that `init` names: itself, or that of a finished run's folder."""
    path = Path(place)
    if not path.is_dir():
        return path
    run = open_run(path)
    run.require_finished()
    return run.weights
