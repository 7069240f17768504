"""`disco bench accuracy`: cell after cell, each trained, measured and written down."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from disco.bench.accuracy.cells import Cell, cells_of
from disco.bench.accuracy.report import plot, text_of
from disco.bench.accuracy.results import Results
from disco.bench.accuracy.side_by_side import side_by_side
from disco.bench.accuracy.work import Place, current, is_done, measured
from disco.errors import InputError
from disco.train.device import training_device

Say = Callable[[str], None]


@dataclass(frozen=True)
class AccuracyOptions:
    """What `disco bench accuracy` was asked for.

    Attributes:
        json: the file of results, added to.
        runs: the folder of the trainings.
        plots: a folder for PNGs, None for none.
        studies, methods: names, none for all.
        seeds: how many, from 0.
        device: to train on.
        jobs: cells trained or measured side by side, each in a process with one thread.
    """

    json: Path
    runs: Path
    plots: Path | None
    studies: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    device: str
    jobs: int = 1


def bench_accuracy(options: AccuracyOptions, say: Say = print) -> str:
    """Train and measure what the file of results does not have, and tell all that it has.

    A cell is trained on one thread, so that on CPUs of a kind it is the same with any number of
    jobs. Killed at any moment, a cell goes on after its last epoch when the command is given again.

    Args:
        options: what to do.
        say: takes lines on progress.

    Returns:
        The tables.

    Raises:
        InputError: unknown names or device, a file that is no results, runs of other settings.
        TrainingError: see `disco.train.train` and `side_by_side`.
    """
    if options.seeds < 1:
        raise InputError(f"{options.seeds} seeds were asked for: ask for 1 or more")
    if options.jobs < 1:
        raise InputError(f"{options.jobs} jobs were asked for: ask for 1 or more")
    training_device(options.device)
    results = Results(options.json)
    cells = cells_of(options.studies, options.methods, range(options.seeds))
    place = Place(options.runs, options.device)
    left = [cell for cell in cells if not is_done(results, cell, place)]
    if options.jobs > 1:
        side_by_side(left, results, place, options.jobs, say)
    else:
        _one_by_one(left, results, place, say)
    shown = current(results.cells)
    if len(shown) < len(results.cells):
        say(
            f"{len(results.cells) - len(shown)} cells of {options.json} were trained with other "
            "settings than their studies have now, and are left out"
        )
    if options.plots is not None:
        for path in plot(shown, options.plots):
            say(f"wrote {path}")
    return text_of(shown)


def _one_by_one(left: Sequence[Cell], results: Results, place: Place, say: Say) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, cell in enumerate(left):
            say(f"{number + 1}/{len(left)} {cell.key}{_time_left(results, left[number:])}")
            results.add(cell.key, measured(cell, place, say))
    finally:
        torch.set_num_threads(threads)


def _time_left(results: Results, cells: Sequence[Cell]) -> str:
    """How long the rest will take, by what cells of the same studies took."""
    seconds = 0.0
    for cell in cells:
        took = [
            float(found["seconds"])
            for key, found in results.cells.items()
            if key.startswith(f"{cell.study_name}/")
        ]
        if cell.key not in results.cells and took:
            seconds += statistics.fmean(took)
    return f" (about {seconds / 3600:.1f} h left)" if seconds else ""
