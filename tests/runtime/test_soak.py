"""Many small requests: memory and descriptors of every process stay what they are."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from disco.runtime import RankProcesses
from tests.runtime.resident import resident_kb
from tests.runtime.test_failures import Cluster

linux_only = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory and descriptors are read from /proc"
)
# Allocators keep a few pages more after thousands of requests; a leak of 100 bytes a request would
# be 0.9 MB after 9,000.
GROWTH_KB = 1000


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def check_stable(pids: list[int], warm_up: Callable[[], None], more: Callable[[], None]) -> None:
    """Nothing grows between the end of the one and the end of the other."""
    warm_up()
    before = [(resident_kb(pid), descriptors(pid)) for pid in pids]
    more()
    after = [(resident_kb(pid), descriptors(pid)) for pid in pids]
    print("KB and descriptors before", before, "after", after)
    for (kb, fds), (kb_after, fds_after) in zip(before, after, strict=True):
        assert kb_after - kb <= GROWTH_KB, f"{kb_after - kb} KB more"
        assert fds_after == fds


def _rank_processes(folder: Path, x: Tensor, warm_up: int, more: int, transport: str) -> None:
    with RankProcesses(folder, threads=1, transport=transport) as processes:
        expected = processes.run(x).outputs[0]

        def requests(count: int) -> None:
            for number in range(count):
                outputs = processes.run(x).outputs
                assert number % 50 or torch.equal(outputs[1], expected), "a wrong answer"
            gc.collect()

        check_stable(
            [os.getpid(), *processes.pids], lambda: requests(warm_up), lambda: requests(more)
        )


@linux_only
def test_some_requests(tiny_folder: Path, tiny_input: Tensor) -> None:
    _rank_processes(tiny_folder, tiny_input, 100, 200, "tcp")


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "torch"])
def test_ten_thousand_requests(tiny_folder: Path, tiny_input: Tensor, transport: str) -> None:
    _rank_processes(tiny_folder, tiny_input, 1000, 9000, transport)


@contextmanager
def _joined(folder: Path, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(folder, tmp_path, leader=0, silence_s=10.0)
    try:
        made.wait_until_running()
        yield made
    finally:
        made.close()


def _joined_ranks(folder: Path, tmp_path: Path, warm_up: int, more: int) -> None:
    """Each answer is checked by the leader, which says every tenth."""
    with _joined(folder, tmp_path) as made:

        def until(count: int) -> None:
            while made.line(made.processes[0])["done"] < count:
                pass

        check_stable(
            [process.pid for process in made.processes],
            lambda: until(warm_up),
            lambda: until(warm_up + more),
        )


@linux_only
@pytest.mark.slow
def test_some_requests_of_joined_ranks(three_folder: Path, tmp_path: Path) -> None:
    _joined_ranks(three_folder, tmp_path, 100, 300)


@linux_only
@pytest.mark.slow
def test_ten_thousand_requests_of_joined_ranks(three_folder: Path, tmp_path: Path) -> None:
    _joined_ranks(three_folder, tmp_path, 1000, 9000)


@linux_only
@pytest.mark.slow
def test_a_process_that_starts_ranks_again_and_again(tiny_folder: Path, tiny_input: Tensor) -> None:
    """In a process of its own, which has started some before."""
    code = (
        "import sys, torch\n"
        "from disco.runtime import RankProcesses\n"
        "from tests.runtime.test_soak import descriptors\n"
        "import os, threading\n"
        "counts = []\n"
        "for _ in range(3):\n"
        "    with RankProcesses(sys.argv[1], threads=1) as processes:\n"
        "        processes.run(torch.zeros(1, 3, 24, 24))\n"
        "    counts.append((descriptors(os.getpid()), threading.active_count()))\n"
        "assert len(set(counts)) == 1, counts\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_folder)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
