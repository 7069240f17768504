"""The commands, end to end: train, evaluate, partition, and real ranks with the same metric."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import disco
from disco.cli import main
from disco.runtime import RankProcesses
from disco.tasks import Classification, DataOptions
from disco.train import evaluate, open_run
from disco.zoo import read_state_dict
from tests.tasks.small_data import write_folder

QUICK = ("--model", "resnet8_thin", "--batch-size", "8", "--lr", "0.1", "--no-augment")


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*args: str | Path) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as end:  # argparse
            code = end.code if isinstance(end.code, int) else 1
        return Outcome(code, *capfd.readouterr())

    return run


def test_train_evaluate_partition_and_ranks(command: Any, digits: str, tmp_path: Path) -> None:
    run, out = tmp_path / "runs" / "x", tmp_path / "out"
    budget = ("--nodes", "2", "--density", "0.25", "--epochs", "2", "--warmup-epochs", "0.2")
    trained = command(
        "train", "classification", *QUICK, *budget, "--data", digits, "--out", run,
        "--json", tmp_path / "trained.json",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert "epoch 2/2: loss" in trained.out and "TensorBoard" in trained.out
    value = json.loads((tmp_path / "trained.json").read_text())["value"]
    assert value >= 0.9

    evaluated = command("evaluate", run, "--json", tmp_path / "evaluated.json")
    assert evaluated.code == 0 and f"top1 {value:.4f} on 60 images" in evaluated.out
    assert json.loads((tmp_path / "evaluated.json").read_text())["value"] == value
    assert "on 240 images" in command("evaluate", run, "--split", "train").out
    assert "on 60 images" in command("evaluate", run, "--data", digits).out

    cut = command("partition", run, "--out", out)
    assert cut.code == 0 and "recorded pattern" in cut.out, cut.err
    ranks = command("evaluate", run, "--partition", out, "--threads", "1")
    assert ranks.code == 0 and f"top1 {value:.4f} on 60 images" in ranks.out, ranks.err
    assert "2 nodes over tcp" in ranks.out

    # The plan's bytes are the budget's, and a whole model made again is the ranks'.
    model = open_run(run).load_model()
    dense = disco.partition(model, (torch.randn(2, 3, 8, 8),), 2, dense_exchange=True).plan
    plan = disco.load(out).plan
    output = plan.exchanges[-1].bytes_per_image
    assert 4 * (plan.bytes_per_image - output) == dense.bytes_per_image - output
    data = Classification().load_data(digits, DataOptions())
    with RankProcesses(out, threads=1) as processes:
        found = evaluate(
            lambda x: processes.run(x).answer,
            Classification(),
            data.val,
            data.classes,
            print,
            batch_size=7,
        )
        inputs = torch.stack([data.val.load(index, None)[0] for index in range(5)])
        answer = processes.run(inputs).answer
    assert found.value == value
    with torch.no_grad():
        exact = model.double()(inputs.double())
    assert float((answer - exact).abs().max()) <= 2e-5 * float(exact.abs().max())

    image = tmp_path / "digit.png"
    digit = data.val.whole.pixels[int(data.val.indices[0])]  # type: ignore[attr-defined]
    Image.fromarray(np.asarray(digit)).save(image)
    ran = command("run", out, "--input", image, "--top", "1", "--json", tmp_path / "run.json")
    assert ran.code == 0, ran.err
    assert f"class {int(exact[0].argmax())}" in ran.out
    verified = command("verify", out, "--input", image, "--weights", run / "model.safetensors")
    assert verified.code == 0 and "1 of 1 images equal up to rounding" in verified.out


@pytest.fixture(scope="module")
def finished(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of one epoch. Copy it to change it."""
    out = tmp_path_factory.mktemp("finished") / "dense"
    args = ("--method", "dense", "--epochs", "1", "--data", digits, "--out", str(out))
    assert main(["train", "classification", *QUICK, *args]) == 0
    return out


def test_wrong_command_lines_are_one_line(
    command: Any, finished: Path, digits: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "pets")
    other = tmp_path / "other"
    assert command("partition", "resnet8", "--source", "disco", "--out", other).code == 0
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("train",), "the following arguments are required: task, --out"),
        (("train", "chess", "--out", "x"), "invalid choice: 'chess'"),
        (("train", "classification", "--data", "mnist", "--out", tmp_path / "x"), "are unknown"),
        (("train", "classification", "--epochs", "0", "--out", tmp_path / "x"), "epochs must be"),
        (("train", "classification", "--out", finished), "there is a run in"),
        (("train", "classification", "--out", finished, "--resume"), "is finished"),
        (("train", "classification", "--out", tmp_path / "x", "--resume"), "is no run of"),
        (
            ("train", "classification", "--out", tmp_path / "x", "--method-option", "rho"),
            "is not of the form NAME=NUMBER",
        ),
        (("train", "classification", "--out", tmp_path / "x", "--threads", "0"), "at least 1"),
        (("evaluate", tmp_path), "is no run of `disco train`"),
        (("evaluate", finished, "--data", f"folder:{tmp_path / 'pets'}"), "have other classes"),
        (("evaluate", finished, "--partition", tmp_path), "manifest.json"),
        (("evaluate", finished, "--partition", other), "is not of the run in"),
        (("evaluate", finished, "--batch-size", "0"), "--batch-size 0 was given"),
        (("partition", finished, "--seed", "1", "--out", tmp_path / "x"), "--seed 1 was given"),
        (
            ("partition", finished, "--image-size", "8", "--out", tmp_path / "x"),
            "says that itself: leave it out",
        ),
        (("partition", tmp_path / "none", "--out", tmp_path / "x"), "is no run of `disco train`"),
    ]
    for args, message in cases:
        outcome = command(*args)
        assert outcome.code == 2, args
        assert message in outcome.err, (args, outcome.err)
        assert outcome.err.startswith("disco: error: ") and outcome.err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_run_that_is_not_finished(command: Any, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").unlink()
    for args in (("evaluate", tmp_path / "x"), ("partition", tmp_path / "x", "--out", "y")):
        outcome = command(*args)
        assert outcome.code == 2
        assert "is not finished (it has 1 checkpoints and no final weights)" in outcome.err
    resumed = command("train", "classification", "--out", tmp_path / "x", "--resume")
    assert resumed.code == 0 and "going on after epoch 1 of 1" in resumed.out
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == (
        finished / "model.safetensors"
    ).read_bytes()


def test_a_dense_run_is_cut_by_one_shot_on_request(
    command: Any, finished: Path, tmp_path: Path
) -> None:
    assert command("partition", finished, "--nodes", "3", "--out", tmp_path / "a").code == 0
    args = ("--density", "0.25", "--group-size", "2", "--out", tmp_path / "b")
    assert command("partition", finished, *args).code == 0
    first, second = (disco.load(tmp_path / name).plan for name in "ab")
    assert (first.world_size, second.world_size) == (3, 2)
    assert second.bytes_per_image < first.bytes_per_image


def test_training_that_diverges_is_one_line_and_code_1(
    command: Any, digits: str, tmp_path: Path
) -> None:
    args = ("--method", "dense", "--lr", "1e30", "--data", digits, "--out", tmp_path / "x")
    outcome = command("train", "classification", *QUICK, *args)
    assert outcome.code == 1
    assert outcome.err.startswith("disco: error: training diverged: ")
    assert "in epoch 1, " in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.slow
def test_a_killed_process_loses_at_most_an_epoch(digits: str, tmp_path: Path) -> None:
    """The command as a process, killed three times at chance moments, ends with the same bits."""
    train = [sys.executable, "-m", "disco.cli", "train", "classification", "--threads", "1"]
    settings = [*QUICK, "--method", "dense", "--epochs", "12", "--data", digits]
    resume = [*train, "--out", str(tmp_path / "cut"), "--resume"]
    command = [*train, *settings, "--out", str(tmp_path / "cut")]
    killed = []
    for pause in (0.0, 0.31, 0.17):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            shown = 0
            for line in process.stdout:
                shown += line.startswith("epoch ")
                if shown == 2:
                    break
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        state, damaged = open_run(tmp_path / "cut").newest_checkpoint()
        assert state is not None and not damaged
        killed.append(state["epoch"])
        command = resume
    assert killed[0] >= 2 and killed[1] >= killed[0] + 2 and killed[2] >= killed[1] + 2
    subprocess.run(resume, check=True, stdout=subprocess.DEVNULL)
    whole = [*train, *settings, "--out", str(tmp_path / "whole")]
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)
    first, second = (
        read_state_dict(tmp_path / run / "model.safetensors") for run in ("whole", "cut")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert open_run(tmp_path / "cut").is_finished


def test_training_for_what_nodes_do(command: Any, digits: str, tmp_path: Path) -> None:
    run = tmp_path / "x"
    trained = command(
        "train", "classification", *QUICK, "--nodes", "2", "--density", "0.25", "--epochs", "2",
        "--warmup-epochs", "0.2", "--wire-dtype", "int8", "--node-dropout", "0.3",
        "--data", digits, "--out", run,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    found = command("evaluate", run, "--wire-dtype", "int8", "--lose", "1")
    assert found.code == 0, found.err
    assert "2 nodes, simulated: payloads in int8, without 1" in found.out + found.err
    for given, text in (("2", "ranks are 0 to 1"), ("0,1", "leave at least one"), ("a", "'a'")):
        wrong = command("evaluate", run, "--lose", given)
        assert wrong.code != 0 and text in wrong.err
    both = command("evaluate", run, "--lose", "1", "--partition", tmp_path / "none")
    assert both.code != 0 and "leave them out" in both.err
