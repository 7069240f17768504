"""A rank's process never opens another rank's shard.

The kernel reports every open of a watched file, whoever does it and in whatever language:
safetensors opens files in Rust, which Python's audit hooks do not see.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import Tensor

from disco.errors import InputError
from disco.runtime import RankProcesses

IN_OPEN = 0x20


@contextmanager
def opens_of(paths: list[Path]) -> Iterator[list[Path]]:
    """Collects, when the block ends, each open of one of the files during the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    watched = {}
    opened: list[Path] = []
    try:
        for path in paths:
            watch = libc.inotify_add_watch(descriptor, os.fsencode(path), IN_OPEN)
            assert watch >= 0, os.strerror(ctypes.get_errno())
            watched[watch] = path
        yield opened
        try:
            events = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            events = b""
        while events:
            watch, _, _, length = struct.unpack_from("iIII", events)
            opened.append(watched[watch])
            events = events[16 + length :]
    finally:
        os.close(descriptor)


def test_the_watch_sees_an_open(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with opens_of([tmp_path / "a"]) as opened:
        (tmp_path / "a").read_bytes()
    assert opened == [tmp_path / "a"]


def test_each_rank_opens_its_own_shard_only(
    tiny_folder: Path, tiny_input: Tensor, tmp_path: Path
) -> None:
    # A folder a rank, each with all shards: an open tells whose process it was.
    folders = [tmp_path / f"node-{rank}" for rank in range(2)]
    for folder in folders:
        shutil.copytree(tiny_folder, folder)
    shards = [folder / f"rank-{rank}.safetensors" for folder in folders for rank in range(2)]
    with opens_of(shards) as opened, RankProcesses(folders) as processes:
        processes.run(tiny_input)
    own = {folder / f"rank-{rank}.safetensors" for rank, folder in enumerate(folders)}
    assert own <= set(opened), "the positive control: a rank's own shard is opened"
    assert set(opened) == own


def test_a_rank_runs_without_the_others_shard(
    tiny_folder: Path, tiny_input: Tensor, tmp_path: Path
) -> None:
    folders = [tmp_path / f"node-{rank}" for rank in range(2)]
    for rank, folder in enumerate(folders):
        shutil.copytree(tiny_folder, folder)
        (folder / f"rank-{1 - rank}.safetensors").unlink()
    with RankProcesses(folders) as processes:
        assert len(processes.run(tiny_input).outputs) == 2
    (folders[1] / "rank-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"rank-1\.safetensors"), RankProcesses(folders):
        pass
