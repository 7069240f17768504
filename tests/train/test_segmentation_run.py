"""A segmenter from the first command to the last, and a run that was interrupted."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from disco.cli import main
from disco.train import TrainConfig, resume, train
from disco.train.loop import Training
from disco.zoo import read_state_dict
from tests.tasks.test_masks import write_voc


def silent(line: str) -> None:
    pass


@pytest.mark.parametrize(
    "model",
    [
        "deeplab_small-w4",
        # Its outputs are a dict.
        pytest.param("torchvision:lraspp_mobilenet_v3_large", marks=pytest.mark.slow),
    ],
)
def test_train_evaluate_partition_and_ranks(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    data = f"voc:{write_voc(tmp_path / 'voc', ('a', 'b', 'c', 'd', 'e'))}"
    train_args = ["--model", model, "--data", data, "--image-size", "32", "--batch-size", "2"]
    budget = ["--epochs", "1", "--nodes", "2", "--density", "0.25", "--out", str(run)]

    def command(*args: str) -> str:
        capfd.readouterr()
        code = main(list(args))
        found = capfd.readouterr()
        assert code == 0, found.err
        return found.out

    command("train", "segmentation", *train_args, *budget, "--json", str(tmp_path / "trained.json"))
    trained = json.loads((tmp_path / "trained.json").read_text())
    assert (trained["metric"], trained["images"], trained["refused"]) == ("mIoU", 1, 0)
    assert f"mIoU {trained['value']:.4f} on 1 images" in command("evaluate", str(run))
    assert "recorded pattern" in command("partition", str(run), "--out", str(out))
    ranks = command("evaluate", str(run), "--partition", str(out), "--threads", "1")
    assert f"mIoU {trained['value']:.4f} on 1 images" in ranks


def test_a_run_on_scenes_resumes_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(
        task="segmentation", data="scenes:train=64,val=24", image_size=24, model="deeplab_small-w8",
        epochs=2, batch_size=8, optimizer="adamw", lr=4e-3, warmup_epochs=0.2, density=0.25,
    )  # fmt: skip
    result = train(config, tmp_path / "whole", silent)
    first_epoch, second_epoch = csv.DictReader((tmp_path / "whole" / "metrics.csv").open())
    assert float(second_epoch["loss"]) < float(first_epoch["loss"])

    steps, before = 0, Training._step

    class Stop(Exception):
        pass

    def stopping(*args: object) -> float:
        nonlocal steps
        steps += 1
        if steps > 11:
            raise Stop
        return before(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_step", stopping)
        with pytest.raises(Stop):
            train(config, tmp_path / "cut", silent)
    assert resume(tmp_path / "cut", None, silent).value == result.value
    first, second = (
        read_state_dict(tmp_path / name / "model.safetensors") for name in ("whole", "cut")
    )
    assert all(first[name].equal(second[name]) for name in first)
