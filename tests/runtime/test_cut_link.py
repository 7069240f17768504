"""Ranks on nodes of the network lab, and a link that is unplugged: silence, and no error."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest

from disco.bench.lab import Lab, LabUnavailable
from disco.bench.lab.processes import NodeProcess
from disco.runtime.token import make_token
from tests.runtime.test_failures import RANK_SCRIPT, RANKS
from tests.runtime.test_survival import SURVIVOR_SCRIPT

SILENCE_S = 1.0


@pytest.fixture
def lab() -> Iterator[Lab]:
    try:
        with Lab(RANKS, "100mbit") as made:
            yield made
    except LabUnavailable as error:
        pytest.skip(str(error))


class LabCluster:
    """A rank a node, each over the lab's links; the leader repeats a call."""

    def __init__(
        self,
        lab: Lab,
        folder: Path,
        tmp_path: Path,
        leader: int,
        silence_s: float,
        program: str = RANK_SCRIPT,
    ) -> None:
        peers, token, script = tmp_path / "peers.yaml", tmp_path / "token", tmp_path / "rank.py"
        lines = "".join(f"  - {lab.address(rank)}:7077\n" for rank in range(RANKS))
        peers.write_text("peers:\n" + lines)
        make_token(token)
        script.write_text(program)
        given = folder.parent / "given.safetensors"
        self.leader = leader
        self.processes: list[NodeProcess] = [
            lab.popen(
                rank,
                [
                    *(sys.executable, str(script), str(folder), str(given), str(peers), str(rank)),
                    *(str(leader), str(token), str(silence_s)),
                ],
                env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
                stdin=DEVNULL,
                stdout=PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]

    def line(self, rank: int) -> dict[str, Any]:
        stdout = self.processes[rank].stdout
        assert stdout is not None
        text = stdout.readline()
        assert text, "a rank died"
        found: dict[str, Any] = json.loads(text)
        return found

    def wait_until_running(self) -> None:
        for rank in range(RANKS):
            assert self.line(rank)["how"] == "ready"
        assert self.line(self.leader)["how"] == "running"

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def end(self, rank: int) -> dict[str, Any]:
        """The last words of a rank."""
        out, _ = self.processes[rank].communicate(timeout=30)
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found


@contextlib.contextmanager
def running(
    lab: Lab, folder: Path, tmp_path: Path, leader: int, silence_s: float = SILENCE_S
) -> Iterator[LabCluster]:
    made = LabCluster(lab, folder, tmp_path, leader, silence_s)
    try:
        made.wait_until_running()
        yield made
    finally:
        made.kill()
        for process in made.processes:
            process.communicate()


@pytest.mark.parametrize(("victim", "leader"), [(2, 0), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_a_cut_link_is_known_within_the_deadline(
    lab: Lab, three_folder: Path, tmp_path: Path, victim: int, leader: int
) -> None:
    with running(lab, three_folder, tmp_path, leader) as made:
        begin = time.monotonic()
        lab.cut(victim)
        for rank in set(range(RANKS)) - {victim}:
            end = made.end(rank)
            assert end["how"] == "lost", end
            assert end["rank"] == victim and end["host"].startswith(lab.address(victim))
            assert end["at"] - begin < SILENCE_S + 1.0, f"after {end['at'] - begin:.2f} s"
        alone = made.end(victim)
        assert alone["how"] == "lost" and alone["rank"] != victim, alone


@pytest.mark.slow
def test_a_link_that_is_back_within_the_deadline_costs_time_only(
    lab: Lab, three_folder: Path, tmp_path: Path
) -> None:
    """The leader checks every answer. TCP waits twice as long before each further try, so that the
    silence may last several times as long as the cut.
    """
    with running(lab, three_folder, tmp_path, 0, silence_s=6.0) as made:
        done = 0
        for _ in range(2):
            lab.cut(1)
            time.sleep(0.3)
            lab.mend(1)
            for _ in range(2):
                found = made.line(0)
                assert found["how"] == "running" and found["done"] > done, found
                done = found["done"]


@pytest.mark.slow
def test_links_that_become_slow_are_not_lost(lab: Lab, three_folder: Path, tmp_path: Path) -> None:
    with running(lab, three_folder, tmp_path, 0, silence_s=6.0) as made:
        lab.shape("1mbit")
        for _ in range(2):
            assert made.line(0)["how"] == "running"


def test_a_node_whose_link_is_mended_is_taken_back(
    lab: Lab, survivable: Path, tmp_path: Path
) -> None:
    """Cut off it is done without; then it finds that it was, and comes back by itself."""
    made = LabCluster(lab, survivable, tmp_path, 0, SILENCE_S, SURVIVOR_SCRIPT)
    too_late = threading.Timer(90, made.kill)  # a read of their words would wait for ever
    too_late.start()
    try:
        for rank in range(RANKS):
            assert made.line(rank)["how"] == "ready"
        begin = time.monotonic()
        lab.cut(2)
        while (answer := made.line(0))["lost"] != [2]:
            assert answer["right"] and answer["lost"] == []
        assert answer["right"] and answer["at"] - begin < SILENCE_S + 1.0
        assert made.line(2)["how"] == "lost"
        lab.mend(2)
        while (answer := made.line(0))["lost"]:
            assert answer["right"] and time.monotonic() - begin < 60
        assert answer["right"]
    finally:
        too_late.cancel()
        made.kill()
        for process in made.processes:
            process.communicate()
