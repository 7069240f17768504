"""Artifacts that older versions wrote, as they wrote them: they load, and run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import disco
from disco.errors import InputError
from disco.partition.shards import load_manifest

ARTIFACTS = Path(__file__).parent / "artifacts"


@pytest.mark.parametrize(
    ("name", "version"),
    [("plan-1.0", (1, 0)), ("plan-1.1", (1, 1)), ("plan-1.2", (1, 2)), ("plan-1.3", (1, 3))],
)
@torch.no_grad()
def test_they_load_and_run(name: str, version: tuple[int, int]) -> None:
    """Two convolutions for two nodes, from the random weights of seed 0."""
    plan = load_manifest(ARTIFACTS / name).plan
    assert plan.version == version
    assert plan.latency is None and bool(plan.memory) == (version >= (1, 2))
    assert plan.bytes_for(3) == 3 * plan.bytes_per_image, "each value in its own dtype"
    assert "2 nodes, 2 exchanged tensors" in str(plan)
    written = json.loads((ARTIFACTS / name / "manifest.json").read_text())["plan"]
    assert json.loads(plan.to_json()) == written, "a plan that was read is written as it came"

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(disco.load(ARTIFACTS / name)(x), model(x))


@pytest.mark.parametrize(
    ("key", "version", "reads"),
    [("version", [1, 2], "1.0 to 1.1"), ("version", [2, 0], "1.0 to 1.1")],
)
def test_newer_manifests_are_refused_with_both_versions(
    tmp_path: Path, key: str, version: list[int], reads: str
) -> None:
    shutil.copytree(ARTIFACTS / "plan-1.1", tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {key: version}))
    given = ".".join(map(str, version))
    with pytest.raises(InputError, match=rf"format version {given}; this release reads {reads}"):
        load_manifest(tmp_path / "out")


@pytest.mark.parametrize("version", [[1, 5], [2, 0]])
def test_newer_plans_are_refused_with_both_versions(tmp_path: Path, version: list[int]) -> None:
    shutil.copytree(ARTIFACTS / "plan-1.1", tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["plan"]["version"] = version
    manifest.write_text(json.dumps(content))
    given = ".".join(map(str, version))
    with pytest.raises(InputError, match=rf"plan of version {given}; this release reads 1\.4"):
        load_manifest(tmp_path / "out")
