"""Super-resolution through the whole of it: learnt, resumed, cut, measured on the nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from disco.cli import main
from disco.errors import InputError
from disco.tasks import DataOptions, SuperResolution
from disco.tasks.super_resolution import bicubic
from disco.train import TrainConfig, evaluate, open_run, resume, train
from disco.train.loop import Training
from tests.tasks.small_photos import write_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four photographs and a damaged one, as `--data`."""
    folder = write_photos(tmp_path_factory.mktemp("photos") / "train", 3, (90, 70))
    (folder / "9.png").write_bytes((folder / "0.png").read_bytes()[:99])
    write_photos(folder.parent / "val", 1, (70, 90))
    return f"photos:{folder.parent}:train=64"


def config_of(photos: str, **changed: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "task": "super-resolution",
        "model": "edsr_small_x2-w8",
        "data": photos,
        "image_size": 8,
        "batch_size": 8,
        "epochs": 3,
        "optimizer": "adamw",
        "lr": 0.004,
        "weight_decay": 0.0,
        "method": "magnitude",
        "density": 0.5,
    }
    return TrainConfig(**{**usual, **changed})


def test_it_learns_is_cut_and_the_nodes_measure_the_same(
    photos: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    lines: list[str] = []
    longer = photos.replace("train=64", "train=400")
    config = config_of(longer, model="edsr_small_x2-w16", epochs=4, batch_size=4, lr=0.005)
    result = train(config, run, lines.append)
    assert [line for line in lines if line.startswith("left out:") and "9.png" in line]
    assert result.metric == "psnr" and list(result.others) == ["ssim"]
    data = SuperResolution().load_data(photos, DataOptions(image_size=8))
    plain = evaluate(bicubic(2), SuperResolution(), data.val, data.classes, print)
    # Half as many steps gain 0.37 dB on these sharp edges.
    assert result.value > plain.value + 0.2 and result.images == plain.images == 20

    def value_of(*args: object) -> dict[str, Any]:
        file = tmp_path / "value.json"
        assert main([*map(str, args), "--json", str(file)]) == 0, capfd.readouterr().err
        return json.loads(file.read_text())  # type: ignore[no-any-return]

    assert value_of("evaluate", run)["value"] == result.value
    assert main(["partition", str(run), "--out", str(out)]) == 0
    assert "recorded pattern" in capfd.readouterr().out
    nodes = value_of("evaluate", run, "--partition", out, "--threads", "1")
    assert nodes["value"] == pytest.approx(result.value, abs=1e-3)
    assert nodes["others"]["ssim"] == pytest.approx(result.others["ssim"], abs=1e-5)
    assert main(["evaluate", str(run), "--data", photos.replace("train=64", "scale=3")]) == 2
    assert "enlarges by the scale of the data" in capfd.readouterr().err

    low = data.val.load(0, None)[0]
    with torch.no_grad():
        whole = open_run(run).load_model()(low[None])
    assert whole.shape == (1, 3, 16, 16)


def test_resuming_gives_the_same_bits(
    photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(photos, model="srresnet_small_x2-w8", noise=0.02)
    whole = train(config, tmp_path / "whole", lambda line: None)
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_step", _ending_after(11))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", lambda line: None)
    assert resume(tmp_path / "cut", {}, lambda line: None) == whole
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert files[0] == files[1]


def _ending_after(steps: int) -> Any:
    before, left = Training._step, iter(range(steps))

    def step(self: Training, *args: Any) -> float:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return before(self, *args)

    return step


def test_a_teacher_is_imitated(photos: str, tmp_path: Path) -> None:
    train(config_of(photos, epochs=1, method="dense"), tmp_path / "teacher", lambda line: None)
    config = config_of(
        photos, epochs=1, teacher=str(tmp_path / "teacher"), distill_weight=1.0, method="dense",
        init=str(tmp_path / "teacher"), lr=1e-12,
    )  # fmt: skip
    train(config, tmp_path / "pupil", lambda line: None)
    loss = (tmp_path / "pupil" / "metrics.csv").read_text().splitlines()[1].split(",")[2]
    assert float(loss) < 1e-6  # it began as the teacher


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "edsr_small_x3-w8"}, "enlarges by the scale of the data"),
        ({"model": "resnet8_thin"}, "enlarges by the scale of the data"),
        ({"label_smoothing": 0.1}, "has no labels"),
        ({"model": "edsr_small"}, "did you mean edsr_small_x"),
        ({"model": "sr_transformer_small_x2", "image_size": 12}, "a multiple of 8 pixels"),
        ({"image_size": 64}, "none of 4 photographs can be used"),
        ({"data": "digits"}, "are unknown: give photographs"),
    ],
)
def test_what_does_not_fit_is_said_before_a_folder_is_made(
    photos: str, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(config_of(photos, **changed), tmp_path / "x", lambda line: None)
    assert not (tmp_path / "x").exists()
