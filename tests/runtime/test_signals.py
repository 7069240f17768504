"""Ctrl-C and SIGTERM: all ranks end within three seconds, and nothing is left that listens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from disco import api
from disco.images import Preprocessing, default_photograph
from disco.recipe import Recipe
from disco.runtime.rank_processes import available_cores
from disco.runtime.token import make_token
from tests.runtime.conftest import SIZE
from tests.runtime.test_joined import free_ports
from tests.runtime.test_rank_processes import alive, wait_until_gone

WITHIN_S = 3.0
INT, TERM = signal.SIGINT, signal.SIGTERM
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: nn.Module) -> Path:
    """`tiny` for two ranks, with what `disco run` needs to know of its inputs."""
    path = tmp_path_factory.mktemp("described") / "out"
    recipe = Recipe("none", "tiny", 2, preprocessing=Preprocessing.for_size(SIZE))
    api.partition(tiny, (torch.zeros(1, 3, SIZE, SIZE),), nodes=2).save(path, recipe.describe(tiny))
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More of them than are run before a test is over."""
    path = tmp_path_factory.mktemp("photos")
    for number in range(3000):
        (path / f"{number:04}.jpg").symlink_to(default_photograph())
    return path


@contextmanager
def disco(tmp_path: Path, *words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A command in a group of its own, as a shell starts one; all of it ends with the block."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "disco.cli", *map(str, words)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"it ended: {process.stderr and process.stderr.read()[-2000:]}")


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _parent(int(entry.name)) == pid:
            found += family(int(entry.name))
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return -1


def check_over(process: subprocess.Popen[str], pids: list[int], begin: float) -> str:
    """It has ended in time with all of its processes; what it said on stderr."""
    _, errors = process.communicate(timeout=20)
    took = time.monotonic() - begin
    # Where others use the cores, too, everything takes longer.
    busy = max(1.0, os.getloadavg()[0] / available_cores())
    assert took < WITHIN_S * busy, f"after {took:.1f} s"
    wait_until_gone(pids, within_s=0.5 * busy)
    assert "Traceback" not in errors, errors[-2000:]
    return errors


@pytest.mark.parametrize(
    ("number", "to_all"), [(INT, True), (TERM, False), pytest.param(INT, False, marks=slow)]
)
def test_a_run_on_one_machine(
    folder: Path, photos: Path, tmp_path: Path, number: signal.Signals, to_all: bool
) -> None:
    """Ctrl-C reaches the whole group of processes, `kill` one."""
    with disco(tmp_path, "run", folder, "--input", photos, "--threads", "1") as process:
        wait_for_line(process, f"{photos}/0001")
        pids = family(process.pid)
        assert len(pids) == 3
        begin = time.monotonic()
        if to_all:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert "disco: interrupted" in check_over(process, pids, begin)
        assert process.returncode == 130
        assert not list(tmp_path.glob("disco-*")), "the private folder is left"


@pytest.mark.parametrize("number", [TERM, pytest.param(INT, marks=slow)])
def test_a_run_that_is_still_starting(
    folder: Path, photos: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with disco(tmp_path, "run", folder, "--input", photos, "--threads", "1") as process:
        end = time.monotonic() + 60
        while len(pids := family(process.pid)) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        begin = time.monotonic()
        process.send_signal(number)
        check_over(process, pids, begin)
        assert process.returncode == 130
        assert not list(tmp_path.glob("disco-*")), "the private folder is left"


class Joined:
    """`disco run` and `disco worker` of one cluster."""

    def __init__(self, folder: Path, photos: Path, tmp_path: Path) -> None:
        self.ports = free_ports(2)
        peers, token = tmp_path / "peers.yaml", tmp_path / "token"
        peers.write_text("peers:\n" + "".join(f"  - 127.0.0.1:{port}\n" for port in self.ports))
        make_token(token)
        member = ("--peers", peers, "--token-file", token, "--threads", "1", "--rank")
        self.leader = ("run", folder, *member, "0", "--input", photos)
        self.follower = ("worker", folder, *member, "1")

    def check_nothing_listens(self) -> None:
        for port in self.ports:
            with socket.socket() as sock:
                assert sock.connect_ex(("127.0.0.1", port)), f"something listens on {port}"


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        (TERM, "leader"),
        (INT, "follower"),
        pytest.param(INT, "leader", marks=slow),
        pytest.param(TERM, "follower", marks=slow),
    ],
)
def test_joined_ranks(
    folder: Path, photos: Path, tmp_path: Path, number: signal.Signals, victim: str
) -> None:
    """Who is interrupted says so; the other one is told at once whom it has lost."""
    joined = Joined(folder, photos, tmp_path)
    with disco(tmp_path, *joined.leader) as leader, disco(tmp_path, *joined.follower) as follower:
        wait_for_line(leader, f"{photos}/0001")
        first, other = (leader, follower) if victim == "leader" else (follower, leader)
        pids = [leader.pid, follower.pid]
        begin = time.monotonic()
        first.send_signal(number)
        assert "disco: interrupted" in check_over(first, pids[:0], begin)
        assert first.returncode == 130
        errors = check_over(other, pids, begin)
        lost = 0 if victim == "leader" else 1
        assert other.returncode == 1
        assert len(errors.splitlines()) == 1 and f"rank {lost} (" in errors, errors
        joined.check_nothing_listens()


@pytest.mark.parametrize("number", [INT, pytest.param(TERM, marks=slow)])
def test_a_rank_that_waits_for_others(
    folder: Path, photos: Path, tmp_path: Path, number: signal.Signals
) -> None:
    joined = Joined(folder, photos, tmp_path)
    with disco(tmp_path, *joined.leader) as leader:
        end = time.monotonic() + 60
        listening = False
        while not listening and time.monotonic() < end:
            with socket.socket() as sock:
                listening = sock.connect_ex(("127.0.0.1", joined.ports[0])) == 0
            time.sleep(0.02)
        assert listening and alive([leader.pid])
        begin = time.monotonic()
        leader.send_signal(number)
        check_over(leader, [leader.pid], begin)
        assert leader.returncode == 130
        joined.check_nothing_listens()
