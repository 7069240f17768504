"""Files that are not what was written: always refused, with the file; never a crash."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import disco
from disco.errors import InputError
from disco.partition.manifest import Manifest, load_manifest, manifest_bytes
from disco.partition.shards import load_shard

ARTIFACTS = Path(__file__).parent / "artifacts"
X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
WRONG: tuple[Any, ...] = (None, True, -1, 2.5, "x", [], {}, [[]], {"a": [1]}, 1e999)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model for two unequal nodes whose plan has every optional field there is."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 9, 3),
        nn.Flatten(),
        nn.Linear(324, 5),
    )
    nodes = [disco.Node(f"n{i}", 10.0 + 20 * i, 10**9, disco.Link(100.0, 0.1)) for i in range(2)]
    folder = tmp_path_factory.mktemp("damage") / "out"
    partitioned = disco.partition(model.eval(), (X,), disco.Cluster(nodes), wire_dtype=torch.int8)
    partitioned.save(folder, {"name": "small", "seed": 5, "input": {"mean": [0.1]}})
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "out")
    return tmp_path / "out"


def refused(folder: Path, rank: int, file: str) -> str:
    with pytest.raises(InputError) as caught:
        load_shard(folder, rank)
    text = str(caught.value)
    assert str(folder / file) in text and "\n" not in text
    return text


def test_one_byte_of_a_shard(folder: Path) -> None:
    path = folder / "rank-1.safetensors"
    good = path.read_bytes()
    expected = hashlib.sha256(good).hexdigest()[:16]
    chance = random.Random(0)
    # The length of the header, the header, the weights; and anywhere.
    for position in (
        *range(8),
        8,
        20,
        len(good) - 1,
        *(chance.randrange(len(good)) for _ in range(50)),
    ):
        bad = bytearray(good)
        bad[position] ^= 1 << chance.randrange(8)
        path.write_bytes(bad)
        text = refused(folder, 1, path.name)
        assert hashlib.sha256(bad).hexdigest()[:16] in text or "is rank" in text
        assert expected in text or "of the plan" in text
    load_shard(folder, 0)


def test_one_byte_of_a_manifest(folder: Path) -> None:
    """Also of what no other digest covers, as how an image becomes an input."""
    path = folder / "manifest.json"
    good = path.read_bytes()
    chance = random.Random(1)
    described = good.index(b'"mean":[0.1]') + len(b'"mean":[0.')
    for position in (described, *(chance.randrange(len(good)) for _ in range(300))):
        bad = bytearray(good)
        bad[position] ^= 1 << chance.randrange(8)
        path.write_bytes(bad)
        refused(folder, 0, path.name)


@pytest.mark.parametrize("name", ["manifest.json", "rank-0.safetensors"])
def test_cut_short(folder: Path, name: str) -> None:
    path = folder / name
    good = path.read_bytes()
    chance = random.Random(2)
    # A manifest without its last newline is whole.
    for size in (
        0,
        1,
        7,
        8,
        9,
        len(good) - 2,
        *(chance.randrange(len(good) - 1) for _ in range(30)),
    ):
        path.write_bytes(good[:size])
        refused(folder, 0, name)


def test_more_than_was_written(folder: Path) -> None:
    for name in ("manifest.json", "rank-0.safetensors"):
        with open(folder / name, "ab") as file:
            file.write(b"{}")
        refused(folder, 0, name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-2])
    load_shard(folder, 0)


def test_swapped_shards(folder: Path) -> None:
    shards = [folder / f"rank-{rank}.safetensors" for rank in range(2)]
    contents = [path.read_bytes() for path in shards]
    for path, content in zip(shards, reversed(contents), strict=True):
        path.write_bytes(content)
    for rank in range(2):
        text = refused(folder, rank, f"rank-{rank}.safetensors")
        assert f"is rank {1 - rank} of the plan" in text and f"wants rank {rank}" in text


def test_a_shard_that_cannot_be_read(folder: Path) -> None:
    path = folder / "rank-0.safetensors"
    path.unlink()
    path.mkdir()
    assert "there is no shard" in refused(folder, 0, path.name)
    path.rmdir()
    path.symlink_to(path)
    refused(folder, 0, path.name)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[" * 100000,
        b'{"a":' * 50000,
        b"\xff\xfe",
        b'{"format": "disco-artifact"}',
        b"1" * 9999,
    ],
)
def test_other_json(folder: Path, text: bytes) -> None:
    (folder / "manifest.json").write_bytes(text)
    refused(folder, 0, "manifest.json")


def test_a_plan_that_is_nested_deeply(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_bytes())
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    content["plan"]["layers"] = deep
    (folder / "manifest.json").write_bytes(manifest_bytes(content))
    refused(folder, 0, "manifest.json")


# Fields -------------------------------------------------------------------------------------------

Way = tuple[Any, ...]


def ways(value: Any, so_far: Way = ()) -> Iterator[Way]:
    """To every field and entry."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*so_far, key)
        if isinstance(item, (dict, list)):
            yield from ways(item, (*so_far, key))


def changed(content: Any, way: Way, change: int) -> Any:
    """Without one entry (the first change), or with another kind of value in its place."""
    made = copy.deepcopy(content)
    inner = made
    for key in way[:-1]:
        inner = inner[key]
    if change == 0:
        del inner[way[-1]]
    else:
        inner[way[-1]] = WRONG[change - 1]
    return made


def use(manifest: Manifest) -> None:
    """What commands do with a manifest before anything runs."""
    plan = manifest.plan
    str(plan)
    assert plan.to_json() and len(plan.bytes_matrix_for(2)) == plan.world_size
    assert len(plan.flops_per_rank) == plan.world_size and plan.bytes_dense_exchange >= 0
    assert all(memory.total_bytes is not None for memory in plan.memory)


def signed(content: Any) -> bytes:
    """With both digests: as a program would write it that makes mistakes."""
    plan = json.dumps(content.get("plan"), sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(plan.encode()).hexdigest()
    if "plan_digest" in content:
        content = {**content, "plan_digest": digest}
    return manifest_bytes(content)


def try_all(folder: Path, sample: int | None, sign: bool) -> tuple[int, int]:
    """Change one field after the other; how many were refused, and how many taken."""
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    tries = [(way, c) for way in ways(content) for c in range(len(WRONG) + 1)]
    if sample is not None:
        tries = random.Random(3).sample(tries, sample)
    refusals = taken = 0
    for way, change in tries:
        made = changed(content, way, change)
        if json.dumps(made) == json.dumps(content):
            continue
        path.write_bytes(signed(made) if sign else json.dumps(made).encode())
        try:
            found = load_manifest(folder)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error), (way, change)
            refusals += 1
            continue
        taken += 1
        try:
            use(found)
        except InputError:
            continue
        except Exception as error:
            raise AssertionError(f"{way} changed in way {change}: {error!r}") from error
    return refusals, taken


def test_every_change_is_seen(folder: Path) -> None:
    refusals, taken = try_all(folder, 400, sign=False)
    assert refusals > 350 and not taken


def test_fields_of_another_kind_under_digests_that_fit(folder: Path) -> None:
    refusals, taken = try_all(folder, 800, sign=True)
    assert refusals > taken > 0


@pytest.mark.parametrize("name", ["plan-1.0", "plan-1.1", "plan-1.2"])
def test_fields_of_another_kind_in_older_manifests(name: str, tmp_path: Path) -> None:
    shutil.copytree(ARTIFACTS / name, tmp_path / "out")
    refusals, _ = try_all(tmp_path / "out", 200, sign=False)
    assert refusals > 150


@pytest.mark.slow
@pytest.mark.parametrize("sign", [False, True])
def test_all_changes_of_all_fields(folder: Path, sign: bool) -> None:
    assert try_all(folder, None, sign)[0] > 1000
