"""Detection through the commands: trained, resumed, cut, measured on nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from disco.cli import main
from disco.errors import InputError
from disco.train import TrainConfig, evaluate_run, open_run, resume, train
from disco.train.loop import Training
from disco.zoo import read_state_dict
from tests.tasks.small_boxes import write_coco


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**changed: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "task": "detection",
        "data": "scenes:train=64,val=32",
        "model": "ssd_small-w8",
        "image_size": 32,
        "epochs": 2,
        "batch_size": 16,
        "optimizer": "adamw",
        "density": 0.25,
        "nodes": 2,
    }
    return TrainConfig(**{**usual, **changed})


def _quiet(line: str) -> None:
    """Drops a line."""


def test_commands_from_training_to_nodes(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, cut, found = tmp_path / "x", tmp_path / "cut", tmp_path / "found.json"
    data = f"coco:{write_coco(tmp_path / 'coco')}"
    options = ["--epochs", "12", "--batch-size", "4", "--image-size", "32", "--warmup-epochs", "1"]
    options += ["--model", "ssd_small-w8", "--optimizer", "adamw", "--lr", "0.01", "--no-augment"]
    options += ["--data", data, "--nodes", "2", "--density", "0.25", "--threads", "1"]
    assert main(["train", "detection", *options, "--out", str(run)]) == 0
    # The images it learnt from, so that there is something to find.
    on_train = ["evaluate", str(run), "--split", "train", "--threads", "1", "--json", str(found)]
    assert main(on_train) == 0
    whole = json.loads(found.read_text())
    assert whole["metric"] == "mAP" and whole["images"] == 3 and 0.1 < whole["value"] <= 1
    assert set(whole["others"]) == {"mAP50", "mAP75"}
    assert main(["partition", str(run), "--out", str(cut)]) == 0
    capfd.readouterr()
    assert main([*on_train, "--partition", str(cut)]) == 0
    assert "2 nodes over tcp" in capfd.readouterr().out
    ranks = json.loads(found.read_text())
    assert ranks["value"] == pytest.approx(whole["value"], abs=1e-3)


class Interrupted(Exception):
    """A stop in the middle of a training."""


@pytest.mark.parametrize(
    ("name", "method"), [("ssd_small-w8", "magnitude"), ("vit_ssd_small-w16", "dense")]
)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model=name, method=method)
    whole = train(config, tmp_path / "whole", _quiet)
    real = Training._step

    def stop(self: Training, inputs: Any, targets: Any, number: int) -> float:
        if self.epoch == 1 and number == 2:
            raise Interrupted
        return real(self, inputs, targets, number)

    monkeypatch.setattr(Training, "_step", stop)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", _quiet)
    monkeypatch.undo()
    assert resume(tmp_path / "cut", {}, _quiet) == whole
    states = [read_state_dict(tmp_path / run / "model.safetensors") for run in ("whole", "cut")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    again = evaluate_run(open_run(tmp_path / "cut"), _quiet, batch_size=7)
    assert again.value == pytest.approx(whole.value, abs=1e-6) and again.images == 32


def test_a_teacher_is_imitated(tmp_path: Path) -> None:
    train(settings(method="dense", epochs=1), tmp_path / "teacher", _quiet)
    config = settings(epochs=1, teacher=str(tmp_path / "teacher"), seed=3)
    assert train(config, tmp_path / "x", _quiet).images == 32


def test_models_and_data_that_do_not_fit(tmp_path: Path) -> None:
    for changed, message in (
        ({"model": "resnet8_thin"}, "in place of class logits .* choose ssd_small"),
        ({"data": "digits"}, "are unknown: give scenes"),
        ({"task": "classification", "data": "digits"}, "a tuple in place of logits"),
        ({"model": "vit_ssd_small", "image_size": 36}, "a multiple of 8 pixels"),
        (
            {"model": "torchvision:ssdlite320_mobilenet_v3_large"},
            "whole detector.*torchvision:ssdlite320_mobilenet_v3_large:heads",
        ),
    ):
        with pytest.raises(InputError, match=message):
            train(settings(**changed), tmp_path / "x", _quiet)
        assert not (tmp_path / "x").exists()


def test_images_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "coco")
    (data / "train2017" / "train0.png").unlink()
    (data / "val2017" / "val2.png").write_bytes(b"no image")
    lines: list[str] = []
    result = train(settings(data=f"coco:{data}", epochs=1), tmp_path / "x", lines.append)
    assert (result.images, result.refused) == (2, 1)
    assert sum(line.startswith("left out: ") for line in lines) == 2
