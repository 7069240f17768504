"""Cells side by side, in processes: trainings before measurements, since others wait for them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch

from disco.bench.accuracy.cells import Cell
from disco.bench.accuracy.results import Results
from disco.bench.accuracy.work import Place, Say, is_trained, measured, trained
from disco.errors import TrainingError
from disco.train.log import silent


def side_by_side(left: Sequence[Cell], results: Results, place: Place, jobs: int, say: Say) -> None:
    """Train and measure cells, `jobs` at a time.

    Args:
        left: what the results do not have; each after those that it needs.
        results: added to as cells are measured.
        place: where they are trained.
        jobs: processes, each with one thread.
        say: takes lines on progress.

    Raises:
        TrainingError: a process ended by itself.
        What training or measuring raised first; cells that are under way then are finished first.
    """
    try:
        with _pool(jobs) as pool:
            _run(pool, left, results, place, jobs, say)
    except BrokenProcessPool as error:
        raise TrainingError(
            "a process of --jobs was ended from outside, perhaps because memory ran out: give the "
            "command again, with fewer --jobs; it goes on from the last checkpoints"
        ) from error


def _run(
    pool: Executor, left: Sequence[Cell], results: Results, place: Place, jobs: int, say: Say
) -> None:
    to_train, to_measure = _to_train(left, place), list(left)
    untrained = set(to_train)
    running: dict[Future[dict[str, Any] | None], Cell] = {}
    failed: Exception | None = None
    while True:
        while len(running) < jobs and failed is None:
            if (cell := _taken(to_train, untrained)) is not None:
                running[pool.submit(_train, cell, place)] = cell
            elif (cell := _taken(to_measure, untrained, itself=True)) is not None:
                running[pool.submit(_measure, cell, place)] = cell
            else:
                break
        if not running:
            break
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            cell = running.pop(future)
            try:
                found = future.result()
            except Exception as error:  # noqa: BLE001 - raised when the others are done
                failed = failed or error
                continue
            if found is None:
                untrained.discard(cell)
                say(f"{cell.key} is trained ({len(to_train)} trainings wait)")
            else:
                results.add(cell.key, found)
                say(
                    f"{cell.key}: {found['metric']} {found['value']:.4f} "
                    f"({len(to_measure)} measurements wait)"
                )
    if failed is not None:
        raise failed


def _to_train(left: Sequence[Cell], place: Place) -> list[Cell]:
    """The cells without a finished run, and those that they need, each after what it needs."""
    found: dict[Cell, None] = {}

    def add(cell: Cell) -> None:
        if is_trained(cell, place):
            return
        for needed in cell.needs:
            add(needed)
        found.setdefault(cell)

    for cell in left:
        add(cell)
    return list(found)


def _taken(waiting: list[Cell], untrained: Collection[Cell], itself: bool = False) -> Cell | None:
    """Take out the first cell whose needs (with `itself`, which itself) is trained."""
    for index, cell in enumerate(waiting):
        if not any(needed in untrained for needed in ((cell,) if itself else cell.needs)):
            return waiting.pop(index)
    return None


@contextmanager
def _pool(jobs: int) -> Iterator[Executor]:
    """Processes that end at once when this one is interrupted or killed."""
    context = multiprocessing.get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(watched,))
    try:
        yield pool
    except BaseException:
        held.close()  # what still runs is not wanted any more
        raise
    finally:
        # Processes that have nothing left to do end by themselves, and give back what they share.
        pool.shutdown(cancel_futures=True)
        held.close()
        watched.close()


def _begin(watched: Connection) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(watched: Connection) -> None:
    """End when the other end of a pipe is closed: a pool's processes would wait for ever."""
    wait_for([watched])
    os._exit(1)


def _train(cell: Cell, place: Place) -> None:
    trained(cell, place)


def _measure(cell: Cell, place: Place) -> dict[str, Any]:
    return measured(cell, place, silent)
