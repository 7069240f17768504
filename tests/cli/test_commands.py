"""`disco partition`, `inspect`, `run`, `verify` on ResNet-18 at 32 pixels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from disco import api
from disco.zoo import build_model
from tests.cli.conftest import MODEL, Command


def test_partition_writes_one_shard_a_node(partitioned: Path) -> None:
    names = sorted(path.name for path in partitioned.iterdir())
    assert names == ["manifest.json", "rank-0.safetensors", "rank-1.safetensors"]


def test_partition_is_the_same_every_time(
    disco: Command, partitioned: Path, tmp_path: Path
) -> None:
    again = disco("partition", *MODEL, "--density", "0.2", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert "no --weights: random weights of seed 0" in again.out
    for path in partitioned.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_inspect(disco: Command, partitioned: Path, tmp_path: Path) -> None:
    done = disco("inspect", partitioned, "--json", tmp_path / "plan.json")
    assert done.code == 0, done.err
    assert "layer4.1.conv2" in done.out and "2 nodes" in done.out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["world_size"] == 2 and len(plan["layers"]) == 22


def test_inspect_draws(disco: Command, partitioned: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = disco("inspect", partitioned, "--draw", tmp_path / "plan.svg")
    assert done.code == 0, done.err
    assert "layer4.1.conv2" in (tmp_path / "plan.svg").read_text()


def test_another_image_size(disco: Command, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = disco("partition", *MODEL, "--image-size", "64", "--dynamic-size", "--out", out)
    assert made.code == 0, made.err
    done = disco("run", out, "--input", photo, "--image-size", "80")
    assert done.code == 0, done.err


def test_channels_in_groups(disco: Command, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = disco("partition", *MODEL, "--density", "0.2", "--group-size", "4", "--out", out)
    assert made.code == 0, made.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"]["group_size"] == 4
    done = disco("verify", out, "--input", photo)  # the model made again is this one
    assert done.code == 0, done.err
    refused = disco("partition", *MODEL, "--group-size", "4", "--out", tmp_path / "other")
    assert refused.code == 2 and "--density: give that too" in refused.err


def test_run_classifies_every_image_of_a_folder(
    disco: Command, partitioned: Path, photo: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(photo, folder / name)
    result = tmp_path / "run.json"
    done = disco("run", partitioned, "--input", folder, "--top", "3", "--json", result)
    assert done.code == 0, done.err
    assert "the weights are random" in done.out
    stream = json.loads(result.read_text())
    images = stream["images"]
    assert [Path(image["image"]).name for image in images] == ["a.jpg", "b.jpg"]
    assert stream["in_flight"] == 1 and stream["refused"] == []
    assert stream["images_per_s"] >= stream["images_per_s_with_loading"] > 0
    plan = api.load(partitioned).plan
    for image in images:
        assert len(image["top"]) == 3 and image["top"][0]["name"]
        assert image["bytes_exchanged"] == plan.bytes_per_image
        for rank, sent in zip(image["ranks"], plan.bytes_matrix, strict=True):
            assert rank["bytes_sent"] == sum(sent)
            parts = rank["compute_ms"] + rank["pack_ms"] + rank["wait_ms"]
            assert 0 < rank["compute_ms"] < parts <= rank["latency_ms"] <= image["latency_ms"]
    assert images[0]["top"] == images[1]["top"]


@pytest.mark.parametrize("ending", ["json", "png"])
def test_run_keeps_several_in_flight_and_profiles(
    disco: Command, partitioned: Path, photo: Path, tmp_path: Path, ending: str
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "d.jpg"):
        shutil.copy(photo, folder / name)
    (folder / "c.jpg").write_text("no image")
    profile, result = tmp_path / f"profile.{ending}", tmp_path / "run.json"
    outputs = ["--profile", profile, "--json", result]
    done = disco("run", partitioned, "--input", folder, "--in-flight", "2", *outputs)
    assert done.code == 1 and "1 of 4 images could not be used" in done.out, done.err
    assert done.out.index("b.jpg") < done.out.index("c.jpg is not") < done.out.index("d.jpg")
    assert "3 images, 2 in flight" in done.out
    stream = json.loads(result.read_text())
    assert [Path(image["image"]).name for image in stream["refused"]] == ["c.jpg"]
    assert [Path(image["image"]).name for image in stream["images"]] == ["a.jpg", "b.jpg", "d.jpg"]
    if ending == "png":
        assert profile.read_bytes().startswith(b"\x89PNG")
    else:
        trace = json.loads(profile.read_text())
        assert trace["otherData"]["requests"] == ["a.jpg", "b.jpg", "d.jpg"]
    assert not list(tmp_path.glob("*.part"))


def test_profiles_and_numbers_that_cannot_be(
    disco: Command, partitioned: Path, photo: Path, tmp_path: Path
) -> None:
    for options, message in (
        (["--profile", tmp_path / "a.svg"], "a profile ends in .json or .png"),
        (["--profile", tmp_path / "none" / "a.json"], "give a file in a folder that exists"),
        (["--profile", tmp_path], "ends in .json or .png"),
        (["--in-flight", "0"], "0 requests in flight were asked for; give 1 to 16"),
        (["--in-flight", "17"], "17 requests in flight were asked for; give 1 to 16"),
    ):
        done = disco("run", partitioned, "--input", photo, *options)
        assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_verify_accepts_what_is_equal(
    disco: Command, partitioned: Path, photo: Path, tmp_path: Path
) -> None:
    result = tmp_path / "verify.json"
    done = disco("verify", partitioned, "--input", photo, "--json", result)
    assert done.code == 0, done.err
    assert "1 of 1 images equal up to rounding" in done.out
    (image,) = json.loads(result.read_text())
    assert image["passed"] and len(image["max_abs_error_per_rank"]) == 2
    assert image["bytes_exchanged_planned"] == image["bytes_exchanged_counted"] > 0


def test_verify_rejects_what_differs(
    disco: Command, partitioned: Path, photo: Path, tmp_path: Path
) -> None:
    """Shards of slightly other weights, with digests of their own: only the result can tell."""
    model = build_model("torchvision", "resnet18")
    example = (torch.zeros(1, 3, 32, 32),)
    api.sparsify_(model, 2, 0.2, example)
    with torch.no_grad():
        model.get_parameter("layer3.0.conv1.weight").mul_(1.01)  # zeros stay zeros
    description = json.loads((partitioned / "manifest.json").read_text())["model"]
    api.partition(model, example).save(tmp_path / "out", model_description=description)
    done = disco("verify", tmp_path / "out", "--input", photo)
    assert done.code == 1
    assert "DIFFERENT" in done.out and "0 of 1 images equal" in done.out


def test_weights_of_a_file_and_their_recorded_pattern(
    disco: Command, photo: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "w.safetensors"
    model = build_model("torchvision", "resnet18", seed=9)
    pattern = api.sparsify_(model, 2, 0.1, (torch.zeros(1, 3, 32, 32),))
    safetensors.torch.save_file(model.state_dict(), weights)
    pattern.save(f"{weights}.pattern.json")
    out = tmp_path / "out"
    made = disco("partition", *MODEL, "--weights", weights, "--out", out)
    assert made.code == 0, made.err
    assert "recorded pattern" in made.out and "random" not in made.out
    done = disco("verify", out, "--input", photo, "--weights", weights)
    assert done.code == 0, done.err + done.out

    refused = disco("verify", out, "--input", photo)
    assert refused.code == 2 and "give the same with --weights FILE" in refused.err
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(build_model("torchvision", "resnet18").state_dict(), other)
    refused = disco("verify", out, "--input", photo, "--weights", other)
    assert refused.code == 2 and "is not the one that the model" in refused.err


def test_without_density_the_zeros_of_the_weights_count(
    disco: Command, partitioned: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "w.pth"
    model = build_model("torchvision", "resnet18")
    api.sparsify_(model, 2, 0.2, (torch.zeros(1, 3, 32, 32),))
    torch.save(model.state_dict(), weights)
    made = disco("partition", *MODEL, "--weights", weights, "--out", tmp_path / "out")
    assert made.code == 0, made.err
    assert api.load(tmp_path / "out").plan == api.load(partitioned).plan


@pytest.mark.parametrize("module", ["disco", "disco.cli"])
def test_the_command_as_a_module_ends_with_its_code(module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("disco: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["demo", "partition", "inspect", "run", "verify"])
def test_help(disco: Command, command: str) -> None:
    done = disco(command, "--help")
    assert done.code == 0 and "usage: disco" in done.out
