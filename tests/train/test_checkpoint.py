"""Checkpoints: everything comes back, bit for bit; none is ever half there; damage is found."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from disco.errors import InputError, TrainingError
from disco.train.checkpoint import load_state, save_state

STATE: dict[str, Any] = {
    "epoch": 3,
    "lr": 0.1 + 0.2,
    "tiny": 5e-324,
    "none": None,
    "flag": True,
    "text": "ü \n",
    "betas": (0.9, 0.999),
    "params": [[0, 1], []],
    "state": {0: {"step": torch.tensor(3.0), "momentum": torch.randn(2, 3)}, "named": {}},
    "mask": torch.tensor([True, False]),
    "empty": torch.empty(0, 4),
    "rng": torch.get_rng_state(),
    "half": torch.randn(3).bfloat16(),
    "strided": torch.randn(4, 5).t(),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_everything_comes_back(tmp_path: Path) -> None:
    save_state(tmp_path / "c.safetensors", STATE)
    assert same(load_state(tmp_path / "c.safetensors"), STATE)
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_tensors_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    weight = torch.randn(3)
    save_state(tmp_path / "c", {"a": weight, "b": weight, "c": weight[1:]})
    found = load_state(tmp_path / "c")
    assert torch.equal(found["b"], weight) and torch.equal(found["c"], weight[1:])


def test_what_cannot_be_held_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        save_state(tmp_path / "c", {"a": {1, 2}})
    assert not os.listdir(tmp_path)


def test_damage_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_state(path, {"a": torch.randn(50), "b": torch.arange(9), "n": 7})
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        place = rng.randrange(len(whole))
        byte = whole[place] ^ 1 << rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        with pytest.raises(InputError) as refused:
            load_state(path)
        assert str(path) in str(refused.value), place
    for length in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="missing or damaged"):
            load_state(path)
    with pytest.raises(InputError, match="missing or damaged"):
        load_state(tmp_path / "absent")


def test_another_file_and_another_version_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(InputError, match="is not a checkpoint of `disco train`"):
        load_state(tmp_path / "weights")
    safetensors.torch.save_file({}, tmp_path / "new", metadata={"disco": '{"version": 99}'})
    with pytest.raises(InputError, match="has version 99, and 1 is read"):
        load_state(tmp_path / "new")


_WRITER = """
import sys, torch
from pathlib import Path
from disco.train.checkpoint import save_state
number = 0
while True:
    number += 1
    state = {"number": number, "tensors": [torch.full((50_000,), float(number)) for _ in range(10)]}
    save_state(Path(sys.argv[1]), state)
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_the_last_whole_checkpoint(tmp_path: Path) -> None:
    """A real process, killed at moments spread over several writes of 2 MB each."""
    path = tmp_path / "c.safetensors"
    rng = random.Random(1)
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(3):
                done = int(writer.stdout.readline())
            time.sleep(rng.uniform(0, 0.03))
            writer.send_signal(signal.SIGKILL)
            done = max([done, *(int(line) for line in writer.stdout.read().split())])
        state = load_state(path)
        assert state["number"] in (done, done + 1)
        assert all(bool((t == state["number"]).all()) for t in state["tensors"])
    assert set(os.listdir(tmp_path)) <= {"c.safetensors", ".part"}
    save_state(path, {})
    assert os.listdir(tmp_path) == ["c.safetensors"]


_FULL = """
import resource, sys, torch
from pathlib import Path
from disco.errors import TrainingError
from disco.train.checkpoint import save_state
path = Path(sys.argv[1])
save_state(path, {"a": torch.ones(1000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_state(path, {"a": torch.zeros(1_000_000)})
except TrainingError as error:
    print(error)
"""


def test_a_disk_without_room_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    """A limit on a file's size stands for it: the write fails in its middle alike."""
    path = tmp_path / "c"
    ended = subprocess.run(
        [sys.executable, "-c", _FULL, str(path)], capture_output=True, text=True, check=True
    )
    assert f"{path} could not be written (" in ended.stdout and "make room" in ended.stdout
    assert ended.stdout.count("\n") == 1
    assert torch.equal(load_state(path)["a"], torch.ones(1000))
    assert os.listdir(tmp_path) == ["c"]


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"gone/c could not be written"):
        save_state(tmp_path / "gone" / "c", {})
