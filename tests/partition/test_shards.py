"""The artifact: complete or absent, byte-identical, and damaged files are told apart."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import disco
from disco.errors import InputError
from disco.partition.manifest import manifest_bytes
from disco.partition.shards import load_manifest, load_shard

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.Linear(216, 5),
    )


@pytest.fixture(scope="module")
def partitioned() -> disco.Partitioned:
    return disco.partition(_model(), (X,), 2)


@pytest.fixture(scope="module")
def baseline() -> disco.Partitioned:
    """Another plan of the same model."""
    return disco.partition(_model(), (X,), 2, dense_exchange=True)


@pytest.fixture
def saved(tmp_path: Path, partitioned: disco.Partitioned) -> Path:
    partitioned.save(tmp_path / "model", {"name": "small"})
    return tmp_path / "model"


def test_round_trip(saved: Path, partitioned: disco.Partitioned) -> None:
    loaded = disco.load(saved)
    assert loaded.plan == partitioned.plan
    assert torch.equal(loaded(X), partitioned(X))
    manifest = load_manifest(saved)
    assert manifest.model == {"name": "small"}
    assert set(manifest.libraries) == {"disco-kernels", "torch", "safetensors"}
    assert sorted(p.name for p in saved.iterdir()) == [
        "manifest.json",
        "rank-0.safetensors",
        "rank-1.safetensors",
    ]


def test_saving_twice_is_byte_identical(saved: Path) -> None:
    again = saved.with_name("again")
    disco.partition(_model(), (X,), 2).save(again, {"name": "small"})
    compared = 0
    for path in saved.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
        compared += 1
    assert compared == 3


def test_a_rank_reads_its_own_shard_only(saved: Path) -> None:
    (saved / "rank-0.safetensors").unlink()
    shard = load_shard(saved, 1)
    assert (shard.rank, shard.world_size) == (1, 2)
    assert shard.plan_digest == load_manifest(saved).plan.digest
    assert shard.weights["0.weight"].shape == (4, 3, 3, 3)
    with pytest.raises(InputError, match=r"there is no shard .*rank-0\.safetensors"):
        load_shard(saved, 0)


def test_a_changed_byte(saved: Path) -> None:
    path = saved / "rank-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    expected = load_manifest(saved).shards[1].sha256[:16]
    found = hashlib.sha256(content).hexdigest()[:16]
    message = rf"rank-1\.safetensors is damaged: its sha256 is {found}.*manifest says {expected}"
    with pytest.raises(InputError, match=message) as caught:
        load_shard(saved, 1)
    assert "\n" not in str(caught.value)
    load_shard(saved, 0)


@pytest.mark.parametrize("kept", [0.9, 0.01, 0.0])
def test_a_shard_cut_short(saved: Path, kept: float) -> None:
    path = saved / "rank-0.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=rf"has \d+ of {len(content)} bytes"):
        load_shard(saved, 0)


def test_a_shard_of_another_plan_or_rank(
    saved: Path, tmp_path: Path, baseline: disco.Partitioned
) -> None:
    other = tmp_path / "other"
    baseline.save(other)
    shutil.copy(other / "rank-0.safetensors", saved)
    with pytest.raises(
        InputError, match=r"is rank 0 of the plan .*copy the shard that was written"
    ):
        load_shard(saved, 0)
    shutil.copy(other / "rank-0.safetensors", other / "rank-1.safetensors")
    with pytest.raises(InputError, match=r"is rank 0 of .*; the manifest wants rank 1"):
        load_shard(other, 1)


def test_a_shard_of_another_plan_under_a_changed_manifest(
    saved: Path, tmp_path: Path, baseline: disco.Partitioned
) -> None:
    """The digest of the file is right, but it was written for something else."""
    other = tmp_path / "other"
    baseline.save(other)
    shutil.copy(other / "rank-0.safetensors", saved)
    _edit(saved, lambda m: m["shards"].__setitem__(0, load_json(other)["shards"][0]))
    with pytest.raises(InputError, match="is rank 0 of the plan"):
        load_shard(saved, 0)


@pytest.mark.parametrize("rank", [-1, 2, 99])
def test_a_rank_outside_the_plan(saved: Path, rank: int) -> None:
    with pytest.raises(InputError, match=f"rank {rank} is outside the plan .* give 0 to 1"):
        load_shard(saved, rank)


@pytest.mark.parametrize("version", [[2, 0], [1, 2], [0, 1], 1, "1.0", None, [True, 0]])
def test_unknown_versions(saved: Path, version: Any) -> None:
    _edit(saved, lambda m: m.update(version=version))
    with pytest.raises(InputError, match=r"format version .*; this release reads 1\.0 to 1\.1"):
        load_manifest(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("plan"),
        lambda m: m["plan"].update(world_size=3),
        lambda m: m["plan"]["layers"][0].pop("name"),
        lambda m: m["shards"].pop(),
        lambda m: m["shards"][0].update(bytes=None),
        lambda m: m["shards"][0].update(rank=1),
        lambda m: m.update(shards=5),
    ],
)
def test_a_damaged_manifest(saved: Path, change: Any) -> None:
    _edit(saved, change)
    with pytest.raises(InputError, match="damaged") as caught:
        load_shard(saved, 0)
    assert "\n" not in str(caught.value)


def test_a_manifest_cannot_point_outside(saved: Path) -> None:
    _edit(saved, lambda m: m["shards"][0].update(file="../../etc/passwd"))
    with pytest.raises(InputError, match="is damaged: rank 0 has file"):
        load_shard(saved, 0)


def test_other_directories(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*manifest\.json"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "web app"}')
    with pytest.raises(InputError, match="is not the manifest of a partitioned model"):
        load_manifest(tmp_path)


def test_what_names_no_directory(partitioned: disco.Partitioned) -> None:
    nowhere: Any = 3
    for use in (disco.load, partitioned.save):
        with pytest.raises(InputError, match="a directory must be a str or a path, given 3"):
            use(nowhere)


def test_existing_directories_are_not_overwritten(saved: Path, baseline: disco.Partitioned) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(InputError, match="exists: choose another directory"):
        baseline.save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before

    baseline.save(saved, overwrite=True)
    assert load_manifest(saved).plan == baseline.plan
    assert [p.name for p in saved.parent.iterdir()] == [saved.name], "nothing is left beside it"


def test_what_is_no_artifact_is_never_overwritten(
    tmp_path: Path, partitioned: disco.Partitioned
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(InputError, match="is not a partitioned model, so it is not"):
            partitioned.save(tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    with pytest.raises(InputError, match="there is no directory"):
        partitioned.save(tmp_path / "a" / "b")


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partitioned: disco.Partitioned
) -> None:
    calls = []
    write = safetensors.torch.save_file

    def full_disk(tensors: Any, path: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(tensors, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(InputError, match="cannot be written: .*No space left.*free some space"):
        partitioned.save(tmp_path / "model")
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []


def test_a_description_that_is_no_json(tmp_path: Path, partitioned: disco.Partitioned) -> None:
    with pytest.raises(InputError, match="must be plain JSON"):
        partitioned.save(tmp_path / "m", {"model": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_program_with_a_foreign_op_is_refused(saved: Path) -> None:
    """Even with digests that fit: a shard can name only what is in the allow-list."""
    path = saved / "rank-0.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["disco"])
    description["program"] = description["program"].replace("disco.partial_linear", "os.system")
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata={"disco": json.dumps(description)})
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    _edit(saved, lambda m: m["shards"][0].update(sha256=sha256))
    with pytest.raises(InputError, match=r"'os\.system' .*is not in the allow-list"):
        load_shard(saved, 0)


def load_json(directory: Path) -> Any:
    return json.loads((directory / "manifest.json").read_text())


def _edit(directory: Path, change: Any) -> None:
    """With a digest that fits: what comes after it is looked at."""
    content = load_json(directory)
    change(content)
    (directory / "manifest.json").write_bytes(manifest_bytes(content))
