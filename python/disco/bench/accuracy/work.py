"""What is done for one cell: its model is trained, then measured."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disco.bench.accuracy.cells import Cell, cells_of
from disco.bench.accuracy.measure import bytes_dense, measure
from disco.bench.accuracy.results import Results, made_by
from disco.bench.accuracy.studies import DENSE
from disco.bench.accuracy.thin import thin_model
from disco.errors import InputError
from disco.train import Run, TrainConfig, open_run, resume, train
from disco.train.log import silent
from disco.train.run_folder import is_run

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where cells are trained.

    Attributes:
        runs: the folder of the trainings.
        device: to train on.
    """

    runs: Path
    device: str


def trained(cell: Cell, place: Place) -> Run:
    """The finished run of a cell: as it is there, gone on with, or trained.

    Before that, the runs that it needs: they may be gone where only results were kept.

    Raises:
        InputError: the run that is there has other settings.
        TrainingError: see `disco.train.train`.
    """
    config = config_of(cell, place)
    path = place.runs / cell.key
    if is_run(path) and not _same(open_run(path), config):
        raise InputError(
            f"the run in {path} has other settings than the cell {cell.key} has now: remove it, or "
            "give another --runs"
        )
    if not is_trained(cell, place):
        for needed in cell.needs:
            trained(needed, place)
    if not is_run(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        train(config, path, silent, device=place.device)
    elif not open_run(path).is_finished:
        resume(path, None, silent, device=place.device)
    # Of a finished run they only take room: hundreds of runs would be gigabytes.
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    return open_run(path)


def is_trained(cell: Cell, place: Place) -> bool:
    """Whether the cell's run is there and finished."""
    path = place.runs / cell.key
    return is_run(path) and open_run(path).is_finished


def _same(run: Run, config: TrainConfig) -> bool:
    """Whether it has these settings; a finished one may have begun in another folder of runs."""
    return _plain(run.config) == _plain(config) if run.is_finished else run.config == config


def measured(cell: Cell, place: Place, say: Say) -> dict[str, Any]:
    """Train the cell if need be, measure it, and return what its results hold.

    Args:
        cell: which.
        place: where its run is.
        say: takes lines on progress.
    """
    # The processor's time: others may share the cores, or stop the process. Of a training by
    # another process only the clock's is known.
    before = open_run(place.runs / cell.key).seconds if is_trained(cell, place) else 0.0
    begin = time.process_time()
    run = trained(cell, place)
    found = measure(cell, run, place.device, say)
    if cell.method_name == DENSE:
        found["bytes_dense"] = {n: bytes_dense(run, n) for n in cell.study.methods}
    seconds = round(before + time.process_time() - begin, 1)
    say(f"  {cell.key}: {found['metric']} {found['value']:.4f} in {seconds:.0f} s")
    return {
        **found,
        "seconds": seconds,
        "trained_on": run.trained_on,
        "config": _plain(run.config),
        **made_by(),
    }


def is_done(results: Results, cell: Cell, place: Place) -> bool:
    """Whether the results have it, trained as it would be now."""
    found = results.cells.get(cell.key)
    return found is not None and bool(found["config"] == _plain(config_of(cell, place)))


def current(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Those of some results that a study has, with the settings that it has now.

    The width of a thin model is not looked at: finding it takes long.
    """
    seeds = sorted({int(key.rpartition("/")[2]) for key in cells})
    found = {}
    for cell in cells_of((), (), seeds):
        if cell.key in cells:
            config = cells[cell.key]["config"]
            model = config["model"] if cell.is_thin else None
            if config == _plain(cell.config(Path("runs"), model)):
                found[cell.key] = cells[cell.key]
    return found


def config_of(cell: Cell, place: Place) -> TrainConfig:
    """The cell's training."""
    model = thin_model(cell.study, cell.nodes) if cell.is_thin else None
    return cell.config(place.runs, model)


def _plain(config: TrainConfig) -> dict[str, Any]:
    """Settings without the places of other runs, which say nothing about them."""
    plain = config.to_json()
    for name in ("init", "teacher"):
        if plain[name] is not None:
            plain[name] = "/".join(Path(plain[name]).parts[-4:])
    plain["method_options"] = dict(plain["method_options"])
    return plain
