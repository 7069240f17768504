"""Whole trainings on a few hundred figures: they learn, resume with the same bits, and end well."""

from __future__ import annotations

import csv
import errno
import importlib
import importlib.util
import itertools
import json
import os
import shutil
from dataclasses import replace
from math import floor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import disco
import disco.sparsify
import disco_kernels as dk
from disco.errors import InputError, TrainingError
from disco.tasks import Classification
from disco.train import TrainConfig, evaluate_run, open_run, resume, train
from disco.train.loop import Training
from disco.zoo import read_state_dict
from tests.tasks.small_data import write_folder
from tests.train.conftest import Settings

# The figures are random, so that one moved by a pixel is another.
EASY = {"augment": False, "batch_size": 8, "lr": 0.1}


def silent(line: str) -> None:
    pass


def rows_of(path: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((path / "metrics.csv").open()))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("method", ["dense", "magnitude", "independent"])
def test_two_epochs_learn_and_leave_the_budget(
    settings: Settings, run_path: Path, method: str
) -> None:
    """Ten random figures with noise are easy: 0.9 of them is far above the 0.1 of guessing."""
    lines: list[str] = []
    result = train(settings(method=method, **EASY), run_path, lines.append)
    assert result.metric == "top1" and result.images == 60 and result.value >= 0.9
    run = open_run(run_path)
    assert run.is_finished and [int(row["epoch"]) for row in rows_of(run_path)] == [1, 2]
    assert rows_of(run_path)[0]["images"] == "240"
    assert len(run.checkpoints()) == 2
    assert sum(line.startswith("epoch ") for line in lines) == 2
    model = run.load_model()
    x = torch.randn(2, 3, 8, 8)
    plan = disco.partition(model, (x,), 2).plan  # from the zeros alone
    if method == "dense":
        assert not run.pattern.exists()
        return
    pattern = dk.Pattern.load(run.pattern)
    assert not pattern.contradictions(model.state_dict(), 0.0)
    density = run.config.target_density
    for layer in pattern.layers.values():
        for i, j in ((0, 1), (1, 0)):
            owned = layer.in_ownership.channels[j]
            assert len(layer.selected[i][j]) == floor(density * len(owned) + 1e-9)
    dense = disco.partition(model, (x,), 2, dense_exchange=True).plan
    out = plan.exchanges[-1].bytes_per_image
    ratio = (plan.bytes_per_image - out) / (dense.bytes_per_image - out)
    assert ratio <= density + 1e-9


class Stop(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the training end, as if killed, before its step of this number."""
    count = itertools.count()
    before = Training._step

    def stopping(self: Training, *args: Any) -> float:
        if next(count) == step:
            raise Stop
        return before(self, *args)

    monkeypatch.setattr(Training, "_step", stopping)


@pytest.mark.parametrize(
    ("method", "optimizer", "step"),
    [
        ("dense", "sgd", 0),
        ("magnitude", "adamw", 20),
        ("magnitude", "sgd", 37),
        ("dense", "adamw", 50),
    ],
)
def test_resuming_gives_the_same_bits(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    optimizer: str,
    step: int,
) -> None:
    """15 steps an epoch: stopped in the first, second, third and fourth of four epochs."""
    config = settings(
        epochs=4, method=method, optimizer=optimizer, label_smoothing=0.1, clip_norm=1.0
    )
    whole = train(config, tmp_path / "whole", silent)
    with monkeypatch.context() as patched:
        stop_at(patched, step)
        with pytest.raises(Stop):
            train(config, tmp_path / "cut", silent)
    lines: list[str] = []
    torch.rand(3)  # the caller's generator is another one by now
    result = resume(tmp_path / "cut", {}, lines.append)
    assert result == whole
    assert (f"going on after epoch {step // 15} of 4" in lines) == (step >= 15)
    assert sum(line.startswith("epoch ") for line in lines) == 4 - step // 15
    names = ["model.safetensors", "config.json"]
    if method != "dense":
        names.append("model.safetensors.pattern.json")
    for name in names:
        first, second = (tmp_path / run / name for run in ("whole", "cut"))
        assert first.read_bytes() == second.read_bytes(), name
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "cut")


@pytest.mark.parametrize(
    ("changed", "step"),
    [
        ({"method": "group_lasso", "method_options": {"strength": 1e-3}}, 17),
        ({"method": "admm", "every": 3}, 33),
        ({"method": "magnitude", "score": "taylor", "method_options": {"decay": 0.5}}, 25),
        ({"method": "magnitude", "score": "activation", "allocation": "global"}, 25),
    ],
)
def test_every_method_resumes_with_the_same_bits(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    step: int,
) -> None:
    """15 steps an epoch, sparsification from step 4 to 27 of 45."""
    config = settings(epochs=3, optimizer="adamw", **changed)
    whole = train(config, tmp_path / "whole", silent)
    with monkeypatch.context() as patched:
        stop_at(patched, step)
        with pytest.raises(Stop):
            train(config, tmp_path / "cut", silent)
    assert resume(tmp_path / "cut", {}, silent) == whole
    for name in ("model.safetensors", "model.safetensors.pattern.json"):
        first, second = (tmp_path / run / name for run in ("whole", "cut"))
        assert first.read_bytes() == second.read_bytes(), name
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "cut")
    densities = [float(row["density"]) for row in rows_of(tmp_path / "whole")]
    assert densities[-1] < densities[0]
    if config.allocation == "uniform":  # the others' budget is one of bytes
        assert densities[-1] <= 0.25 + 1e-9


class _Dropout(Classification):
    """Draws from torch's generator in training, so its state matters."""

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super().build_model(*args, **kwargs)
        model.fc = torch.nn.Sequential(torch.nn.Dropout(0.5), model.fc)
        return model


def test_the_state_of_the_generator_is_resumed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("start", "evaluation"):
        monkeypatch.setattr(f"disco.train.{module}.task_named", lambda name: _Dropout())
    build = _Dropout().build_model
    monkeypatch.setattr(
        "disco.train.run_folder.build_model",
        lambda source, name, weights, seed, num_classes, image_size: build(
            source, name, num_classes, image_size, seed
        ),
    )
    config = settings(epochs=3)
    train(config, tmp_path / "whole", silent)
    with monkeypatch.context() as patched:
        stop_at(patched, 31)
        with pytest.raises(Stop):
            train(config, tmp_path / "cut", silent)
    resume(tmp_path / "cut", {}, silent)
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert files[0] == files[1]
    other = train(settings(epochs=3, seed=1), tmp_path / "other", silent)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != files[0], other


def test_the_callers_generator_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(settings(epochs=1), tmp_path / "x", silent)
    assert torch.equal(torch.get_rng_state(), before)


def test_killed_between_its_last_checkpoint_and_its_end(settings: Settings, tmp_path: Path) -> None:
    whole = train(settings(method="magnitude"), tmp_path / "whole", silent)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("model.safetensors", "metrics.csv", "model.safetensors.pattern.json"):
        (tmp_path / "cut" / name).unlink()
    for folder in (tmp_path / "cut", tmp_path / "cut" / "checkpoints"):
        (folder / ".part").mkdir()
        (folder / ".part" / "model.safetensors").write_bytes(b"half")
    assert resume(tmp_path / "cut", {}, silent) == whole
    files = [
        sorted(p.name for p in (tmp_path / run).rglob("*") if "tensorboard" not in str(p))
        for run in ("whole", "cut")
    ]
    assert files[0] == files[1]


def test_a_damaged_checkpoint_is_named_and_an_older_one_serves(
    settings: Settings, tmp_path: Path
) -> None:
    whole = train(settings(epochs=3), tmp_path / "x", silent)
    (tmp_path / "x" / "model.safetensors").unlink()
    newest = open_run(tmp_path / "x").checkpoints()[-1]
    newest.write_bytes(newest.read_bytes()[:-5])
    lines: list[str] = []
    assert resume(tmp_path / "x", {}, lines.append) == whole
    assert any(line.startswith(f"left out: the checkpoint {newest}") for line in lines)
    assert "going on after epoch 2 of 3" in lines
    for path in open_run(tmp_path / "x").checkpoints():
        path.write_bytes(b"")
    (tmp_path / "x" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="is missing or damaged"):
        resume(tmp_path / "x", {}, silent)


def test_what_can_not_be_resumed(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run of `disco train`: it has no config.json"):
        resume(tmp_path / "absent", {}, silent)
    train(settings(), tmp_path / "x", silent)
    with pytest.raises(InputError, match="is finished: see `disco evaluate"):
        resume(tmp_path / "x", {}, silent)
    (tmp_path / "x" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"lr 0.3 was given, and the run in .* has None"):
        resume(tmp_path / "x", {"lr": 0.3, "nodes": 2}, silent)
    with open_run(tmp_path / "x").locked(), pytest.raises(InputError, match="another process"):
        resume(tmp_path / "x", {"nodes": 2}, silent)
    # Two that found no run there and have both prepared one.
    runs = [replace(open_run(tmp_path / "x"), path=tmp_path / "y") for _ in range(2)]
    with runs[0].made(), pytest.raises(InputError, match="another process"), runs[1].made():
        pass
    with pytest.raises(InputError, match="there is a run in .* already"), runs[1].made():
        pass
    with pytest.raises(InputError, match="there is a run in .* already: go on"):
        train(settings(), tmp_path / "x", silent)
    config = tmp_path / "x" / "config.json"
    plain = json.loads(config.read_text())
    for changed, message in (
        ({**plain, "version": 9}, "has version 9, and 1 is read"),
        ({**plain, "classes": None}, "is damaged"),
        ({**plain, "config": {"epochs": 0}}, "cannot be used: epochs must be"),
        ([], "is damaged"),
    ):
        config.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            resume(tmp_path / "x", {}, silent)
    config.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        open_run(tmp_path / "x")


def test_a_loss_that_is_no_number_ends_with_epoch_and_step(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = itertools.count()

    # The first call tries whether the model fits; 15 are an epoch.
    def loss(self: Classification, outputs: Tensor, *rest: Any) -> Tensor:
        return outputs.sum() * (float("nan") if next(count) == 18 else 1e-3)

    monkeypatch.setattr(Classification, "loss", loss)
    with pytest.raises(TrainingError, match=r"the loss is nan in epoch 2, step 3\. The last check"):
        train(settings(), tmp_path / "x", silent)
    run = open_run(tmp_path / "x")
    assert not run.is_finished
    state, damaged = run.newest_checkpoint()
    assert state is not None and state["epoch"] == 1 and not damaged
    assert all(v.isfinite().all() for v in state["model"].values() if v.is_floating_point())


def test_weights_that_are_lost_are_never_checkpointed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Training._step

    def spoiling(self: Training, inputs: Tensor, targets: Tensor, number: int) -> float:
        value = before(self, inputs, targets, number)
        if self.epoch == 1 and number == 14:
            with torch.no_grad():
                self.model.fc.bias[0] = float("inf")
        return value

    monkeypatch.setattr(Training, "_step", spoiling)
    with pytest.raises(TrainingError, match=r"fc\.bias has values that are no numbers in epoch 2"):
        train(settings(), tmp_path / "x", silent)
    assert len(open_run(tmp_path / "x").checkpoints()) == 1


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, count = safetensors.torch.save_file, itertools.count()

    def filling(tensors: Any, path: Path, **rest: Any) -> None:
        save(tensors, path, **rest)
        if next(count) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = train(settings(epochs=3), tmp_path / "whole", silent)
    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", filling)
        with pytest.raises(
            TrainingError, match=r"epoch-000002.* \(No space left on device\): make"
        ):
            train(settings(epochs=3), tmp_path / "x", silent)
    assert [p.name for p in open_run(tmp_path / "x").checkpoints()] == ["epoch-000001.safetensors"]
    assert not list(tmp_path.rglob(".part"))
    assert resume(tmp_path / "x", {}, silent) == whole


def test_a_teacher_is_imitated_and_weights_are_begun_with(
    settings: Settings, tmp_path: Path
) -> None:
    train(settings(method="dense", **EASY), tmp_path / "dense", silent)
    dense = str(tmp_path / "dense")
    config = settings(teacher=dense, init=dense, distill_weight=1.0, **{**EASY, "lr": 0.01})
    assert train(config, tmp_path / "taught", silent).value >= 0.9
    wrong = settings(teacher=dense, image_size=16)
    with pytest.raises(InputError, match=r"the teacher .* \(10 classes, 8 pixels\) than this run"):
        train(wrong, tmp_path / "wrong", silent)
    with pytest.raises(InputError, match=r"is not one of disco resnet14"):
        train(settings(model="resnet14", init=dense), tmp_path / "wrong", silent)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("score", ["l2", "activation"])
def test_colocation_comes_once_before_training(
    settings: Settings, tmp_path: Path, score: str
) -> None:
    train(settings(**EASY), tmp_path / "dense", silent)
    dense = str(tmp_path / "dense")
    config = settings(method="magnitude", nodes=4, init=dense, colocate=True, epochs=1, score=score)
    said: list[str] = []
    train(config, tmp_path / "x", said.append)
    assert sum(line.startswith("co-location: lost score") for line in said) == 1
    first, final = (open_run(tmp_path / name).load_model() for name in ("dense", "x"))
    assert {n for n, _ in first.named_parameters()} == {n for n, _ in final.named_parameters()}
    assert TrainConfig.from_json(config.to_json()) == config


def test_unreadable_images_are_named_once_left_out_and_counted(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", count=20)
    broken = sorted((tmp_path / "data" / "cat").iterdir())[3:8]
    for path in broken:
        path.write_bytes(path.read_bytes()[:40])
    config = TrainConfig(
        data=f"folder:{tmp_path / 'data'}",
        image_size=16,
        model="resnet8_thin",
        epochs=2,
        batch_size=8,
        warmup_epochs=0.5,
    )
    lines: list[str] = []
    result = train(config, tmp_path / "x", lines.append)
    named = [line for line in lines if line.startswith("left out: ")]
    assert len(named) == len(set(named)) == 5
    assert all(any(str(path) in line for line in named) for path in broken)
    refused = int(rows_of(tmp_path / "x")[-1]["refused"])
    state, _ = open_run(tmp_path / "x").newest_checkpoint()
    assert state is not None and len(state["refused"]) == refused
    assert refused + result.refused == 5 and result.images + result.refused == 8
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of 32 training images could be read"):
        train(config, tmp_path / "y", silent)
    with pytest.raises(InputError, match="none of 8 images could be read"):
        evaluate_run(open_run(tmp_path / "x"), silent)


def test_worker_processes_change_nothing(settings: Settings, tmp_path: Path) -> None:
    train(settings(epochs=1), tmp_path / "none", silent)
    train(settings(epochs=1), tmp_path / "two", silent, workers=2)
    states = [read_state_dict(tmp_path / run / "model.safetensors") for run in ("none", "two")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({}, {"device": "gpu"}, "there is no device 'gpu': give cpu, cuda or cuda:N"),
        ({}, {"device": "meta"}, "the device 'meta' is not supported"),
        ({"amp": True}, {}, "--amp is for CUDA, and the device is cpu"),
        ({}, {"workers": -1}, "-1 workers were given"),
        ({"model": "resnet9"}, {}, "no model 'resnet9'"),
        ({"model": "hub:resnet50"}, {}, "source 'hub' is unknown"),
        ({"model": "torchvision:vit_b_16"}, {}, "cannot be trained on images of 8 x 8"),
        ({"model": "torchvision:ssd300_vgg16"}, {}, "ssd300_vgg16 cannot be trained"),
        ({"init": "absent.pth"}, {}, "there is no weights file absent.pth"),
        ({"teacher": "absent"}, {}, "absent is no run of `disco train`"),
        ({"method": "magnitude", "method_options": {"strength": 1}}, {}, "strength"),
    ],
)
def test_what_does_not_fit_is_said_before_a_folder_is_made(
    settings: Settings,
    run_path: Path,
    changed: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        train(settings(**changed), run_path, silent, **options)
    assert not run_path.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_not_there(settings: Settings, run_path: Path) -> None:
    with pytest.raises(InputError, match="torch finds no CUDA: give cpu"):
        train(settings(), run_path, silent, device="cuda")


def test_places_where_no_run_can_be_put(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(InputError, match="exists and is not an empty folder"):
            train(settings(), tmp_path / name, silent)
    with pytest.raises(InputError, match="cannot be made"):
        train(settings(), tmp_path / "file" / "x", silent)
    (tmp_path / "empty").mkdir()
    train(settings(epochs=1), tmp_path / "empty", silent)


def test_tensorboard_is_written_where_it_is_installed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder.endswith("tensorboard") and purge_step == 1

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            pass

        close = flush

    find, load = importlib.util.find_spec, importlib.import_module
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: n if n == "tensorboard" else find(n, *a)
    )
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda n, *a: (
            SimpleNamespace(SummaryWriter=Writer) if n.endswith("tensorboard") else load(n, *a)
        ),
    )
    train(settings(), tmp_path / "x", silent)
    assert {step for _, _, step in written} == {1, 2}
    assert {"loss", "top1", "density", "lr"} <= {name for name, _, _ in written}


@pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed"
)
def test_two_epochs_on_the_real_digits(settings: Settings, tmp_path: Path) -> None:
    config = settings(data="digits", batch_size=32, lr=0.1)
    assert train(config, tmp_path / "x", silent).value >= 0.8


def test_the_metric_is_measured_as_often_as_asked(settings: Settings, tmp_path: Path) -> None:
    lines: list[str] = []
    result = train(settings(epochs=5, evaluate_every=2), tmp_path / "x", lines.append)
    with open(tmp_path / "x" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["top1"]) for row in rows] == [False, True, False, True, False]
    assert [", top1 " in line for line in lines if line.startswith("epoch")] == [
        bool(row["top1"]) for row in rows
    ]
    every = train(settings(epochs=5), tmp_path / "y", silent)
    assert result == every
