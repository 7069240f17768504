"""Whatever is wrong with the input: one line, exit code 2, nothing written."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from disco import api
from disco.partition.manifest import manifest_bytes
from disco.zoo import build_model
from tests.cli.conftest import MODEL, Command

# Makes the bad input in a folder and returns the command's arguments.
Make = Callable[[Path, Path, Path], list[object]]


def resnet18_file(path: Path) -> Path:
    safetensors.torch.save_file(build_model("torchvision", "resnet18").state_dict(), path)
    return path


def no_image(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    (folder / "a.jpg").write_text("no image")
    return ["run", partitioned, "--input", folder / "a.jpg"]


def half_an_image(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    (folder / "a.jpg").write_bytes(photo.read_bytes()[:20000])
    return ["verify", partitioned, "--input", folder]


def no_image_for_the_demo(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    (folder / "a.jpg").write_text("no image")
    return ["demo", "--image", folder / "a.jpg", "--keep", folder / "kept"]


def no_input(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    return ["run", partitioned, "--input", folder / "absent"]


def folder_without_images(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    return ["run", partitioned, "--input", folder]


def weights_of_another_model(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    weights = resnet18_file(folder / "w.safetensors")
    return ["partition", "resnet34", "--weights", weights, "--out", folder / "out"]


def weights_of_another_model_for_the_demo(
    folder: Path, partitioned: Path, photo: Path
) -> list[object]:
    weights = resnet18_file(folder / "w.safetensors")
    return ["demo", "--weights", weights, "--keep", folder / "kept"]


def weights_that_are_code(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    torch.save(torch.nn.Linear(1, 1), folder / "w.pth")
    return ["partition", *MODEL, "--weights", folder / "w.pth", "--out", folder / "out"]


def no_weights(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    return ["partition", *MODEL, "--weights", folder / "absent.pth", "--out", folder / "out"]


def changed_byte(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    shutil.copytree(partitioned, folder / "cut")
    shard = folder / "cut" / "rank-1.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    return ["run", folder / "cut", "--input", photo]


def cut_shard(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    shutil.copytree(partitioned, folder / "cut")
    shard = folder / "cut" / "rank-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    return ["verify", folder / "cut", "--input", photo]


def shard_of_another_plan(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    shutil.copytree(partitioned, folder / "cut")
    model = build_model("torchvision", "squeezenet1_1")
    api.partition(model, (torch.zeros(1, 3, 32, 32),)).save(folder / "other")
    shutil.copy(folder / "other" / "rank-1.safetensors", folder / "cut")
    return ["run", folder / "cut", "--input", photo]


def another_world_size(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    return ["run", partitioned, "--nodes", "3", "--input", photo]


def unknown_format(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    shutil.copytree(partitioned, folder / "cut")
    manifest = json.loads((folder / "cut" / "manifest.json").read_text())
    manifest["version"] = [99, 0]
    (folder / "cut" / "manifest.json").write_text(json.dumps(manifest))
    return ["run", folder / "cut", "--input", photo]


def no_partition(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    return ["inspect", folder]


def contradicted_pattern(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    model = build_model("torchvision", "resnet18")
    weights = folder / "w.safetensors"
    pattern = api.sparsify_(model, 2, 0.2, (torch.zeros(1, 3, 32, 32),))
    pattern.save(f"{weights}.pattern.json")
    with torch.no_grad():
        model.get_parameter("layer2.0.conv2.weight").add_(0.25)
    safetensors.torch.save_file(model.state_dict(), weights)
    return ["partition", *MODEL, "--weights", weights, "--out", folder / "out"]


def pattern_and_density(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    weights = resnet18_file(folder / "w.safetensors")
    Path(f"{weights}.pattern.json").write_text("{}")
    return [
        *("partition", *MODEL, "--weights", weights),
        *("--density", "0.2", "--out", folder / "out"),
    ]


def damaged_pattern(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    (folder / "p.json").write_text("{")
    return ["partition", *MODEL, "--pattern", folder / "p.json", "--out", folder / "out"]


def existing_out(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("keep")
    return ["partition", *MODEL, "--out", folder / "out", "--overwrite"]


def no_folder_for_out(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    return ["partition", *MODEL, "--out", folder / "absent" / "out"]


def no_folder_for_json(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    return ["demo", "--json", folder / "absent" / "demo.json"]


def pattern_of_another_model(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    model = build_model("torchvision", "squeezenet1_1")
    path = folder / "p.json"
    api.sparsify_(model, 2, 0.2, (torch.zeros(1, 3, 32, 32),)).save(path)
    return ["partition", *MODEL, "--pattern", path, "--out", folder / "out"]


def op_outside_the_list(folder: Path, partitioned: Path, photo: Path) -> list[object]:
    """A shard that names another op, with digests that fit: what an attacker would send."""
    shutil.copytree(partitioned, folder / "cut")
    shard = folder / "cut" / "rank-1.safetensors"
    with safetensors.safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["disco"] = metadata["disco"].replace("aten.max_pool2d.default", "os.system")
    safetensors.torch.save_file(weights, shard, metadata=metadata)
    manifest = json.loads((folder / "cut" / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    manifest["shards"][1]["bytes"] = shard.stat().st_size
    (folder / "cut" / "manifest.json").write_bytes(manifest_bytes(manifest))
    return ["run", folder / "cut", "--input", photo]


def drawing(name: str) -> Make:
    return lambda folder, partitioned, photo: ["inspect", partitioned, "--draw", folder / name]


def plain(*words: str) -> Make:
    return lambda folder, partitioned, photo: [*words, "--out", folder / "out"]


def demo(*words: str) -> Make:
    return lambda folder, partitioned, photo: ["demo", *words, "--keep", folder / "kept"]


CASES: dict[str, tuple[Make, str]] = {
    "no image": (no_image, r"a\.jpg is not an image .*: give"),
    "half an image": (half_an_image, r"a\.jpg cannot be read"),
    "no image for the demo": (no_image_for_the_demo, r"a\.jpg is not an image"),
    "no input": (no_input, "there is no file or folder"),
    "folder without images": (folder_without_images, "has no image"),
    "weights of another model": (
        weights_of_another_model,
        r"w\.safetensors is not one of torchvision resnet34: \d+ missing \(layer1\.2\.conv1",
    ),
    "weights of another model for the demo": (
        weights_of_another_model_for_the_demo,
        "is not one of torchvision resnet50: .* of another shape",
    ),
    "weights that are code": (weights_that_are_code, "only plain tensors are loaded"),
    "no weights": (no_weights, "there is no weights file"),
    "changed byte": (changed_byte, r"rank-1\.safetensors is damaged: its sha256 is .* manifest"),
    "cut shard": (cut_shard, r"rank-0\.safetensors has \d+ of \d+ bytes"),
    "shard of another plan": (shard_of_another_plan, "is rank 1 of the plan .* wants rank 1"),
    "another world size": (another_world_size, "3 nodes were asked for, and the plan .* for 2"),
    "unknown format": (unknown_format, "format version 99.0; this release reads"),
    "no partition": (no_partition, r"there is no .*manifest\.json"),
    "contradicted pattern": (contradicted_pattern, r"layer2\.0\.conv2.*0\.2"),
    "pattern and density": (pattern_and_density, "leave --density out"),
    "pattern of another model": (
        pattern_of_another_model,
        r"pattern is of another model: it names \d+ layers that this one lacks",
    ),
    "op outside the list": (op_outside_the_list, r"op 'os\.system' .* is not in the allow-list"),
    "data-dependent control flow": (
        plain("partition", "ssdlite320_mobilenet_v3_large", "--image-size", "320"),
        r"SSD cannot be captured by torch\.export: .* disco\.partition_submodules_",
    ),
    "no dynamic size": (
        plain("partition", "vit_b_32", "--dynamic-size"),
        r"with a dynamic image size: .*\(224\).*; capture it without dynamic_size",
    ),
    "drawing": (drawing("a.pdf"), r"ends in \.png or \.svg, given 'a\.pdf'"),
    "no folder for the drawing": (drawing("absent/a.png"), "give a file in a folder that exists"),
    "damaged pattern": (damaged_pattern, r"p\.json"),
    "existing out": (existing_out, "is not a partitioned model, so it is not overwritten"),
    "no folder for out": (no_folder_for_out, "there is no directory"),
    "no folder for json": (no_folder_for_json, "cannot be written: give a file in a folder"),
    "nodes 0": (plain("partition", *MODEL, "--nodes", "0"), "nodes.*0"),
    "nodes -1": (plain("partition", *MODEL, "--nodes", "-1", "--density", "0.2"), "nodes.*-1"),
    "nodes for the demo": (demo("--nodes", "0"), "0 nodes were given"),
    "density 2": (plain("partition", *MODEL, "--density", "2"), "density.*2"),
    "density -0.1": (plain("partition", *MODEL, "--density", "-0.1"), "density.*-0.1"),
    "density nan": (plain("partition", *MODEL, "--density", "nan"), "density.*nan"),
    "density for the demo": (demo("--density", "1"), "density of 1 was given"),
    "rounds for the demo": (demo("--rounds", "0"), "0 rounds were given"),
    "image size": (plain("partition", "resnet18", "--image-size", "0"), "image size of 0"),
    "unknown model": (plain("partition", "resnet19"), "no model 'resnet19': did you mean"),
    "unknown source": (
        plain("partition", "resnet18", "--source", "hub"),
        "source 'hub' is unknown",
    ),
    "unknown command": (plain("cut", "resnet18"), r"invalid choice: 'cut'.*\(see disco --help\)"),
    "no number": (plain("partition", *MODEL, "--nodes", "two"), "invalid int value: 'two'"),
}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_code_2_and_nothing_written(
    case: str, disco: Command, partitioned: Path, photo: Path, tmp_path: Path
) -> None:
    make, expected = CASES[case]
    args = [str(arg) for arg in make(tmp_path, partitioned, photo)]
    before = tree(tmp_path)
    done = disco(*args)
    assert done.code == 2, done.err + done.out
    assert done.err.startswith("disco: error: ") and done.err.count("\n") == 1, done.err
    assert re.search(expected, done.err), done.err
    assert tree(tmp_path) == before, "something was written"
