"""The table of accuracies: cells and their order, statistics worked out here, a small one whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from disco.bench.accuracy import cells as cells_module
from disco.bench.accuracy import side_by_side as side_by_side_module
from disco.bench.accuracy import summary, work
from disco.bench.accuracy.cells import Cell, cells_of
from disco.bench.accuracy.command import AccuracyOptions, bench_accuracy
from disco.bench.accuracy.report import text_of
from disco.bench.accuracy.results import Results
from disco.bench.accuracy.side_by_side import side_by_side
from disco.bench.accuracy.studies import METHODS, STUDIES, Study
from disco.bench.accuracy.summary import lines_of, paired
from disco.bench.accuracy.work import Place, _plain, current
from disco.errors import InputError, TrainingError
from tests.kernels.process import python
from tests.tasks.small_data import write_digits


def test_cells_come_after_what_they_need_and_once() -> None:
    cells = cells_of((), (), range(2))
    assert len(set(cells)) == len(cells)
    seen: set[Cell] = set()
    for cell in cells:
        assert set(cell.needs) <= seen, cell
        seen.add(cell)
    for name, study in STUDIES.items():
        trained = {(c.method_name, c.nodes) for c in cells if c.study_name == name}
        assert {("first", 1), ("dense", 1)} <= trained
        assert len({n for _, n in trained} - {1}) == len(study.methods)


def test_every_cell_is_a_training_that_the_settings_allow(tmp_path: Path) -> None:
    for cell in cells_of((), (), [3]):
        config = cell.config(tmp_path, "resnet8-w8" if cell.is_thin else None)
        assert (config.seed, config.split_seed) == (3, 3)
        epochs = config.epochs + (cell.study.first_epochs if config.init else 0)
        if not cell.is_first:  # the same number of epochs for all
            assert epochs == cell.study.first_epochs + cell.study.epochs
        assert (config.teacher is not None) == cell.method.taught


def test_names_that_there_are_none_of() -> None:
    with pytest.raises(InputError, match="no study 'x': digits-resnet"):
        cells_of(("x",), (), [0])
    with pytest.raises(InputError, match="no method 'x': first, dense"):
        cells_of((), ("x",), [0])


def test_paired_differences_and_their_interval() -> None:
    ours, theirs = {0: 0.91, 1: 0.93, 2: 0.92, 7: 0.1}, {0: 0.90, 1: 0.90, 2: 0.90, 8: 0.2}
    found = paired(ours, theirs, 0.01)
    assert found is not None and found.seeds == 3
    assert math.isclose(found.mean, 2.0)
    # Deviation 1 of three; t of 2 degrees of freedom is 4.302653 (tables).
    assert math.isclose(found.half, 4.302653 / math.sqrt(3), rel_tol=1e-6)
    assert math.isclose(found.low, found.mean - found.half)
    assert paired({0: 1.0}, {1: 1.0}, 1.0) is None
    single = paired({0: 1.0}, {0: 0.5}, 1.0)
    assert single is not None and math.isinf(single.half) and str(single) == "+0.50"


def _cell(value: float, sent: int = 200, **more: Any) -> dict[str, Any]:
    exchange = {
        "bytes": sent, "bytes_dense": 1000,
        "bytes_wire": {"int8": 60}, "bytes_outputs_wire": {"int8": 22},
        "flops": 50, "flops_dense": 100, "flops_most": 30,
    }  # fmt: skip
    return {"metric": "top1", "value": value, "seconds": 36.0, "exchange": exchange, **more}


def test_lines_compare_the_same_seeds() -> None:
    cells: dict[str, Mapping[str, Any]] = {
        f"digits-resnet/{method}/{nodes}/{seed}": _cell(
            value + 0.01 * seed, sent, value_int8=value - 0.1
        )
        for method, nodes, value, sent in (
            ("dense", 1, 0.9, 0),
            ("independent", 4, 0.8, 50),
            ("magnitude", 4, 0.89, 200),
        )
        for seed in (0, 1)
    }
    lines = {(line.method.name, line.nodes, line.wire): line for line in lines_of(cells)}
    assert set(lines) == {
        ("dense", 1, "float32"),
        ("independent", 4, "float32"),
        ("magnitude", 4, "float32"),
        ("magnitude", 4, "int8"),
    }
    found = lines["magnitude", 4, "float32"]
    assert found.to_dense is not None and math.isclose(found.to_dense.mean, -1.0)
    assert found.to_independent is not None and math.isclose(found.to_independent.mean, 9.0)
    assert found.times_less == 5.0 and found.flops_share == 0.3
    assert found.times_less_inside == 950 / 150
    narrow = lines["magnitude", 4, "int8"]
    assert (narrow.bytes, narrow.times_less, narrow.times_less_inside) == (60, 1000 / 60, 25.0)
    independent = lines["independent", 4, "float32"]
    assert independent.times_less == 20.0 and independent.times_less_inside is None
    for cell in cells.values():
        del cell["exchange"]["bytes_outputs_wire"]  # as before it was counted
    (narrow,) = [line for line in lines_of(cells) if line.wire == "int8"]
    assert narrow.times_less_inside is None
    text = text_of(cells)
    assert "89.50 ±0.71" in text and "5.0x" in text and "6 cells, 0.06 hours" in text


def test_results_are_shared_by_processes_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    first, second = Results(path), Results(path)
    first.add("a", {"value": 1})
    second.add("b", {"value": 2})
    assert set(Results(path).cells) == {"a", "b"}
    path.write_text("{}")
    with pytest.raises(InputError, match="holds no results of `disco bench accuracy`"):
        Results(path)
    path.write_text('{"format": "disco-accuracy", "version": 9, "cells": {}}')
    with pytest.raises(InputError, match="of another version"):
        Results(path)


@pytest.fixture
def small_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    data = write_digits(tmp_path / "digits.csv.gz")
    settings = {
        "data": f"digits:{data}", "model": "resnet8-w8", "batch_size": 32, "warmup_epochs": 0.2,
    }  # fmt: skip
    names = ("thin", "magnitude", "node-dropout")
    study = Study("small", "small digits", settings, 1, 1, {2: names})
    for module in (cells_module, summary):
        monkeypatch.setattr(module, "STUDIES", {"small": study})
    return "small"


def test_a_small_table_is_made_and_gone_on_with(
    small_study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = AccuracyOptions(
        json=tmp_path / "a.json", runs=tmp_path / "runs", plots=tmp_path,
        studies=(), methods=(), seeds=1, device="cpu",
    )  # fmt: skip
    trained = []
    train = work.train
    monkeypatch.setattr(
        work, "train", lambda c, p, *a, **k: (trained.append(p), train(c, p, *a, **k))
    )
    threads = torch.get_num_threads()
    text = bench_accuracy(options, lambda line: None)
    assert torch.get_num_threads() == threads
    assert len(trained) == 5  # and those that they begin with
    cells = json.loads(options.json.read_text())["cells"]
    assert "5 cells" in text and len(cells) == 5
    found = cells["small/magnitude/2/0"]
    assert found["value_on_ranks"] == {"float32": found["value"], "int8": found["value_int8"]}
    assert found["exchange"]["bytes"] < found["exchange"]["bytes_dense"]
    assert found["exchange"]["bytes_wire"]["int8"] < found["exchange"]["bytes"]
    # Of the small residual network the logits alone, five of ten of each to the other.
    assert found["exchange"]["bytes_outputs_wire"] == {"int8": 2 * 5 * 4}
    assert len(cells["small/node-dropout/2/0"]["value_without"]) == 2
    assert found["trained_on"] == f"CPU, torch {torch.__version__}"
    thin = cells["small/thin/2/0"]["config"]["model"]
    assert thin.startswith("resnet8-w") and 4 <= int(thin[9:]) < 8
    assert (tmp_path / "accuracy-small.png").stat().st_size > 1000

    # A cell that is gone is made again, from runs that are there; others are not touched.
    plain = json.loads(options.json.read_text())
    del plain["cells"]["small/magnitude/2/0"]
    options.json.write_text(json.dumps(plain))
    bench_accuracy(options, lambda line: None)
    again = json.loads(options.json.read_text())["cells"]
    assert len(trained) == 5
    assert again["small/magnitude/2/0"]["value"] == found["value"]

    # So it is from runs that were moved, and without those that they began with.
    options.runs.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "small" / "first")
    options.json.write_text(json.dumps(plain))
    moved = replace(options, runs=tmp_path / "moved", methods=("magnitude",))
    bench_accuracy(moved, lambda line: None)
    cells = json.loads(options.json.read_text())["cells"]
    assert len(trained) == 5 and cells["small/magnitude/2/0"]["value"] == found["value"]


@contextmanager
def _threads(jobs: int) -> Iterator[Executor]:
    with ThreadPoolExecutor(jobs + 5) as pool:  # so that it is not the pool that limits
        yield pool


def test_cells_side_by_side_wait_for_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(("digits-resnet", "scenes-ssd"), ("disco", "thin", "independent"), range(2))
    lock, trained, measured, most, now = threading.Lock(), [], [], 0, 0

    def work_on(cell: Cell, done: list[Cell]) -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1
            done.append(cell)

    def train(cell: Cell, place: Place) -> None:
        assert set(cell.needs) <= set(trained), cell
        work_on(cell, trained)

    def measure(cell: Cell, place: Place) -> dict[str, Any]:
        assert cell in trained or cell in finished
        work_on(cell, measured)
        return {"metric": "top1", "value": 0.5}

    finished = {cell for cell in cells if cell.study_name == "scenes-ssd" and not cell.needs}
    finished |= {c for c in cells if c.study_name == "scenes-ssd" and c.method_name == "disco"}
    monkeypatch.setattr(side_by_side_module, "_pool", _threads)
    monkeypatch.setattr(side_by_side_module, "_train", train)
    monkeypatch.setattr(side_by_side_module, "_measure", measure)
    monkeypatch.setattr(side_by_side_module, "is_trained", lambda cell, place: cell in finished)
    trained.extend(finished)
    results = Results(tmp_path / "a.json")
    # Runs of first parts are not there although their results may be: others begin with them. The
    # dense one of scenes is not: what imitated it is finished.
    left = [c for c in cells if c.method_name not in ("first", "thin-first")]
    left = [c for c in left if (c.study_name, c.method_name) != ("scenes-ssd", "dense")]
    side_by_side(left, results, Place(tmp_path, "cpu"), 3, lambda line: None)
    unneeded = {c for c in cells if (c.study_name, c.method_name) == ("scenes-ssd", "dense")}
    assert sorted(map(str, trained)) == sorted(str(c) for c in cells if c not in unneeded)
    assert set(results.cells) == {cell.key for cell in left}
    assert most == 3


def test_a_cell_that_fails_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(("digits-resnet",), ("dense",), range(2))

    def measure(cell: Cell, place: Place) -> dict[str, Any]:
        if cell.method_name == "first" and cell.seed == 0:
            raise InputError(cell.key)
        time.sleep(0.1)
        return {"metric": "top1", "value": 0.5}

    monkeypatch.setattr(side_by_side_module, "_pool", _threads)
    monkeypatch.setattr(side_by_side_module, "_measure", measure)
    monkeypatch.setattr(side_by_side_module, "is_trained", lambda cell, place: True)
    results = Results(tmp_path / "a.json")
    with pytest.raises(InputError, match="digits-resnet/first/1/0"):
        side_by_side(cells, results, Place(tmp_path, "cpu"), 2, lambda _: None)
    assert set(results.cells) == {"digits-resnet/dense/1/0"}  # and nothing was begun after it


def _dies(cell: Cell, place: Place) -> None:
    os._exit(3)


def test_a_process_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side_module, "_train", _dies)
    cells = cells_of(("digits-resnet",), ("dense",), range(1))
    with pytest.raises(TrainingError, match="ended from outside"):
        side_by_side(cells, Results(tmp_path / "a.json"), Place(tmp_path, "cpu"), 2, print)


def test_processes_have_one_thread_and_end_with_an_interruption() -> None:
    with side_by_side_module._pool(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        process = pool.submit(os.getpid).result()
    assert not Path(f"/proc/{process}").exists()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), side_by_side_module._pool(1) as pool:
        pool.submit(os.getpid).result()
        pool.submit(time.sleep, 600)
        time.sleep(0.5)
        raise KeyboardInterrupt
    assert time.monotonic() - begin < 300


def test_processes_that_end_leave_nothing() -> None:
    """Killed ones would: multiprocessing warns of locks, such as tqdm's, that nobody gave back."""
    code = (
        "from disco.bench.accuracy.side_by_side import _pool\n"
        "lock = 'import builtins, multiprocessing as m; builtins.lock = m.RLock()'\n"
        "with _pool(2) as pool:\n"
        "    print(pool.submit(exec, lock).result())\n"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "None", "")


def test_only_cells_of_the_studies_settings_are_shown(tmp_path: Path) -> None:
    cells = cells_of(("digits-resnet",), ("thin", "magnitude"), range(1))
    found = {
        cell.key: {"config": _plain(cell.config(tmp_path, "resnet8-w9" if cell.is_thin else None))}
        for cell in cells
    }
    assert set(current(found)) == {cell.key for cell in cells}
    changed = cells[-1].key
    other = {**found[changed]["config"], "epochs": 1}
    assert set(current({**found, changed: {"config": other}})) == set(found) - {changed}
    orphan = "digits-resnet/nothing/2/0"
    assert set(current({**found, orphan: found[changed]})) == set(found)


def test_runs_of_other_settings_are_refused(small_study: str, tmp_path: Path) -> None:
    options = AccuracyOptions(
        json=tmp_path / "a.json", runs=tmp_path / "runs", plots=None,
        studies=(), methods=("node-dropout",), seeds=1, device="cpu",
    )  # fmt: skip
    bench_accuracy(options, lambda line: None)
    path = tmp_path / "runs" / "small/node-dropout/2/0/config.json"
    path.write_text(path.read_text().replace('"epochs": 1', '"epochs": 3'))
    options.json.unlink()
    with pytest.raises(InputError, match="has other settings than the cell"):
        bench_accuracy(options, lambda line: None)
    with pytest.raises(InputError, match="0 jobs were asked for"):
        bench_accuracy(replace(options, jobs=0))
    with pytest.raises(InputError, match="the device 'mps' is not supported"):
        bench_accuracy(replace(options, device="mps"))


def test_methods_have_names_of_their_own() -> None:
    assert len({method.text for method in METHODS.values()}) == len(METHODS)
