"""Cells side by side, in processes: trainings first, since others wait for them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch

from disco.bench.accuracy.cells import Cell
from disco.bench.accuracy.results import Results
from disco.bench.accuracy.work import Place, Say, is_trained, measured, trained


def side_by_side(left: Sequence[Cell], results: Results, place: Place, jobs: int, say: Say) -> None:
    """Train and measure cells, `jobs` at a time.

    Args:
        left: what the results do not have; each after those that it needs.
        results: added to as cells are measured.
        place: where they are trained.
        jobs: processes, each with one thread.
        say: takes lines on progress.

    Raises:
        What training or measuring raised first, when the cells that run then have ended.
    """
    to_train = [cell for cell in _with_needed(left) if not is_trained(cell, place)]
    to_measure = list(left)
    running: dict[Future[dict[str, Any] | None], Cell] = {}
    busy: set[Cell] = set()
    with _pool(jobs) as pool:
        while to_train or to_measure or running:
            while len(running) < jobs:
                cell = _next(to_train, {*to_train, *busy}, ready=lambda c: c.needs)
                if cell is not None:
                    running[pool.submit(_train, cell, place)] = cell
                    busy.add(cell)
                    continue
                cell = _next(to_measure, {*to_train, *busy}, ready=lambda c: (c,))
                if cell is None:
                    break
                running[pool.submit(_measure, cell, place)] = cell
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                found = future.result()
                if found is None:
                    busy.discard(cell)
                    say(f"{cell.key} is trained ({len(to_train)} trainings wait)")
                else:
                    results.add(cell.key, found)
                    say(
                        f"{cell.key}: {found['metric']} {found['value']:.4f} "
                        f"({len(to_measure)} measurements wait)"
                    )


def _pool(jobs: int) -> Executor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin)


def _begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process of a pool whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _next(
    waiting: list[Cell], unfinished: set[Cell], ready: Callable[[Cell], Iterable[Cell]]
) -> Cell | None:
    """Take out the first cell that waits for none of `unfinished`."""
    for index, cell in enumerate(waiting):
        if not unfinished.intersection(ready(cell)):
            return waiting.pop(index)
    return None


def _with_needed(cells: Sequence[Cell]) -> list[Cell]:
    found: dict[Cell, None] = {}

    def add(cell: Cell) -> None:
        for needed in cell.needs:
            add(needed)
        found.setdefault(cell)

    for cell in cells:
        add(cell)
    return list(found)


def _train(cell: Cell, place: Place) -> None:
    trained(cell, place)


def _measure(cell: Cell, place: Place) -> dict[str, Any]:
    return measured(cell, place, _silent)


def _silent(line: str) -> None:
    """Takes a line and drops it."""
