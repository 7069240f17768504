"""`disco bench accuracy`: cell after cell, each trained, measured and written down."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from disco import api
from disco.bench.accuracy.cells import Cell, cells_of
from disco.bench.accuracy.measure import bytes_dense, measure
from disco.bench.accuracy.report import plot, text_of
from disco.bench.accuracy.results import Results, made_by
from disco.bench.accuracy.studies import DENSE, Study
from disco.errors import InputError
from disco.small_models import base_name
from disco.tasks import task_named
from disco.train import Run, TrainConfig, open_run, resume, train
from disco.train.run_folder import is_run

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
    """

    json: Path
    runs: Path
    plots: Path | None
    studies: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    device: str


def bench_accuracy(options: AccuracyOptions, say: Say = print) -> str:
    """Train and measure what the file of results does not have, and tell all that it has.

    Cells go one after the other on one thread, so that they are the same wherever they are trained.
    Killed at any moment, a cell goes on after its last epoch when the command is given again.

    Args:
        options: what to do.
        say: takes lines on progress.

    Returns:
        The tables.

    Raises:
        InputError: unknown names, a file that is no results, runs of other settings.
        TrainingError: see `disco.train.train`.
    """
    if options.seeds < 1:
        raise InputError(f"{options.seeds} seeds were asked for: ask for 1 or more")
    results = Results(options.json)
    cells = cells_of(options.studies, options.methods, range(options.seeds))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, cell in enumerate(cells):
            config = _config(cell, options.runs)
            if _is_done(results, cell, config):
                continue
            say(f"{number + 1}/{len(cells)} {cell.key}{_left(results, cells[number:])}")
            results.add(cell.key, _one(cell, config, options, say))
    finally:
        torch.set_num_threads(threads)
    if options.plots is not None:
        for path in plot(results.cells, options.plots):
            say(f"wrote {path}")
    return text_of(results.cells)


def _one(cell: Cell, config: TrainConfig, options: AccuracyOptions, say: Say) -> dict[str, Any]:
    begin = time.process_time()  # others may share the cores, or stop the process
    run = _trained(cell, config, options)
    found = measure(cell, run, say)
    if cell.method_name == DENSE:
        found["bytes_dense"] = {n: bytes_dense(run, n) for n in cell.study.methods}
    seconds = round(time.process_time() - begin, 1)
    say(f"  {found['metric']} {found['value']:.4f} in {seconds:.0f} s of one core")
    return {**found, "seconds": seconds, "config": _plain(config), **made_by()}


def _trained(cell: Cell, config: TrainConfig, options: AccuracyOptions) -> Run:
    """The finished run of a cell: as it is there, gone on with, or trained."""
    for needed in cell.needs:  # their weights may be gone where only the results were kept
        _trained(needed, _config(needed, options.runs), options)
    path = options.runs / cell.key
    if is_run(path) and open_run(path).config != config:
        raise InputError(
            f"the run in {path} has other settings than the cell {cell.key} has now: remove it, or "
            "give another --runs"
        )
    if not is_run(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        train(config, path, _silent, device=options.device)
    elif not open_run(path).is_finished:
        resume(path, None, _silent, device=options.device)
    # Of a finished run they only take room: hundreds of runs would be gigabytes.
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    return open_run(path)


def _config(cell: Cell, runs: Path) -> TrainConfig:
    model = _thin(cell.study, cell.nodes) if cell.is_thin else None
    return cell.config(runs, model)


_THIN: dict[tuple[str, int], str] = {}


def _thin(study: Study, nodes: int) -> str:
    """The study's model, as wide as makes its FLOPs nearest to those of DISCO at d=0.2, all nodes
    together."""
    key = study.name, nodes
    if key not in _THIN:
        config = TrainConfig(**study.settings)
        example, model = _untrained(config, config.model_name)
        api.sparsify_(model, nodes, 0.2, (example,))
        target = sum(api.partition(model, (example,), nodes).plan.flops_per_rank)
        widths = range(study.width_step, _width(config.model_name) + 1, study.width_step)

        def distance(width: int) -> int:
            name = f"{base_name(config.model_name)}-w{width}"
            example, thin = _untrained(config, name)
            return abs(api.partition(thin, (example,), 1).plan.flops_dense - target)

        low, high = 0, len(widths) - 1
        while high - low > 2:  # the distance falls and rises once
            middle = (low + high) // 2
            if distance(widths[middle]) <= distance(widths[middle + 1]):
                high = middle + 1
            else:
                low = middle
        best = min(widths[low : high + 1], key=distance)
        _THIN[key] = f"{base_name(config.model_name)}-w{best}"
    return _THIN[key]


def _untrained(config: TrainConfig, name: str) -> tuple[torch.Tensor, torch.nn.Module]:
    task = task_named(config.task)
    data = task.load_data(config.data, config.data_options)
    size = data.preprocessing.size
    model = task.build_model("disco", name, len(data.classes), size, 0)
    return torch.zeros(1, 3, size, size), model


def _width(name: str) -> int:
    return int(name.rpartition("-w")[2])


def _is_done(results: Results, cell: Cell, config: TrainConfig) -> bool:
    """Whether the results have it, trained as it would be now."""
    found = results.cells.get(cell.key)
    if found is None:
        return False
    return bool(found["config"] == _plain(config))


def _plain(config: TrainConfig) -> dict[str, Any]:
    """Settings without the places of other runs, which say nothing about them."""
    plain = config.to_json()
    for name in ("init", "teacher"):
        if plain[name] is not None:
            plain[name] = "/".join(Path(plain[name]).parts[-4:])
    plain["method_options"] = dict(plain["method_options"])
    return plain


def _left(results: Results, cells: Sequence[Cell]) -> str:
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


def _silent(line: str) -> None:
    """Takes a line and drops it."""
