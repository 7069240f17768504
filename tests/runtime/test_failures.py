"""When things go wrong, with three real processes over tcp: one stated outcome each."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from disco.runtime.token import make_token

RANKS = 3
# One rank: the leader repeats a call and checks what comes out, the others follow. The last line
# says how it ended, and when on the clock that all processes share.
RANK_SCRIPT = """
import json, sys, time
import torch
from safetensors.torch import load_file
from disco.errors import PeerLostError, TransportError
from disco.runtime.joined import JoinedRank
from disco.runtime.places import Options, place_among
from disco.runtime.peers import Peers
folder, inputs, peers, rank, leader, token, silence_s = sys.argv[1:]
options = Options("tcp", token, meeting_s=60, silence_s=float(silence_s))
place = place_among(Peers.from_yaml(peers), int(rank), options)
done, end = 0, {"how": "finished"}
try:
    with JoinedRank(folder, place, options, threads=1, leader=int(leader)) as joined:
        print(json.dumps({"how": "ready"}), flush=True)
        if joined.leads:
            given = load_file(inputs)
            while True:
                output = joined.run(given["x"]).outputs
                assert torch.equal(output, given["y"]), "a wrong answer"
                done += 1
                if done % 10 == 1:
                    print(json.dumps({"how": "running", "done": done}), flush=True)
        joined.follow()
except PeerLostError as error:
    end = {"how": "lost", "rank": error.rank, "host": error.host, "exchange": error.exchange}
    end["text"] = str(error)
except Exception as error:
    end = {"how": "failed", "text": f"{type(error).__name__}: {error}"}
print(json.dumps({**end, "done": done, "at": time.monotonic()}), flush=True)
"""


class Cluster:
    """Three processes, one a rank. `ends` are their last words."""

    def __init__(self, folder: Path, tmp_path: Path, leader: int, silence_s: float) -> None:
        ports = []
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(RANKS)]
        for made in sockets:
            ports.append(made.getsockname()[1])
            made.close()
        self.ports = ports
        peers = tmp_path / "peers.yaml"
        peers.write_text("peers:\n" + "".join(f"  - 127.0.0.1:{port}\n" for port in ports))
        token = tmp_path / "token"
        token.unlink(missing_ok=True)
        make_token(token)
        script = tmp_path / "rank.py"
        script.write_text(RANK_SCRIPT)
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        arguments = [str(script), str(folder), str(folder.parent / "given.safetensors"), str(peers)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, *arguments, str(rank), str(leader), str(token), str(silence_s)],
                env=env,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        self.leader = leader

    def wait_until_running(self) -> None:
        for process in self.processes:
            assert self.line(process)["how"] == "ready"
        assert self.line(self.processes[self.leader])["how"] == "running"

    @staticmethod
    def line(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        text = process.stdout.readline()
        assert text, "a rank died"
        found = json.loads(text)
        assert isinstance(found, dict)
        return found

    def ends(self, ranks: list[int], within_s: float = 30.0) -> list[dict[str, Any]]:
        """The last words of these ranks, who all have to say some."""
        found = []
        for rank in ranks:
            out, _ = self.processes[rank].communicate(timeout=within_s)
            found.append(json.loads(out.splitlines()[-1]))
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def folder(three_folder: Path) -> Path:
    return three_folder


@contextlib.contextmanager
def cluster(
    folder: Path, tmp_path: Path, leader: int = 0, silence_s: float = 2.0
) -> Iterator[Cluster]:
    made = Cluster(folder, tmp_path, leader, silence_s)
    try:
        made.wait_until_running()
        yield made
    finally:
        made.close()


def _check_survivors(made: Cluster, victim: int, begin: float, within_s: float) -> None:
    survivors = [rank for rank in range(RANKS) if rank != victim]
    for end in made.ends(survivors):
        assert end["how"] == "lost", end
        assert end["rank"] == victim and end["host"].startswith("127.0.0.1:")
        assert f"rank {victim} (" in end["text"] and "\n" not in end["text"]
        assert end["at"] - begin < within_s, f"noticed after {end['at'] - begin:.2f} s"


def _kill_one(folder: Path, tmp_path: Path, victim: int, leader: int, after_s: float) -> None:
    with cluster(folder, tmp_path, leader) as made:
        time.sleep(after_s)
        begin = time.monotonic()
        made.processes[victim].kill()
        _check_survivors(made, victim, begin, within_s=1.0)


@pytest.mark.parametrize(("victim", "leader"), [(0, 0), (1, 0), (2, 1)])
def test_a_killed_rank_is_lost_within_a_second(
    folder: Path, tmp_path: Path, victim: int, leader: int
) -> None:
    _kill_one(folder, tmp_path, victim, leader, after_s=0.137)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_kills_at_random_moments(folder: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    victim, leader = chance.randrange(RANKS), chance.randrange(RANKS)
    _kill_one(folder, tmp_path, victim, leader, after_s=chance.random() * 0.3)


@pytest.mark.parametrize(("victim", "leader"), [(1, 0), (0, 2)])
def test_a_stopped_rank_is_lost_within_the_deadline(
    folder: Path, tmp_path: Path, victim: int, leader: int
) -> None:
    with cluster(folder, tmp_path, leader, silence_s=1.0) as made:
        begin = time.monotonic()
        os.kill(made.processes[victim].pid, signal.SIGSTOP)
        _check_survivors(made, victim, begin, within_s=1.0 + 1.0)


def test_a_rank_that_was_stopped_and_goes_on_finds_itself_given_up(
    folder: Path, tmp_path: Path
) -> None:
    with cluster(folder, tmp_path, silence_s=0.7) as made:
        os.kill(made.processes[1].pid, signal.SIGSTOP)
        made.ends([0, 2])
        os.kill(made.processes[1].pid, signal.SIGCONT)
        (end,) = made.ends([1])
        assert end["how"] == "lost" and end["rank"] in (0, 2), end


def test_strangers_change_nothing(folder: Path, tmp_path: Path) -> None:
    """Garbage and a flood at every port while a request is under way."""
    with cluster(folder, tmp_path) as made:
        stop = threading.Event()
        connected = [0]

        def flood(port: int) -> None:
            while not stop.is_set():
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", port), 1) as s,
                ):
                    connected[0] += 1
                    s.sendall(random.randbytes(200))
                time.sleep(0.001)

        threads = [threading.Thread(target=flood, args=(port,)) for port in made.ports]
        for thread in threads:
            thread.start()
        before = [_descriptors(process.pid) for process in made.processes]
        done = [made.line(made.processes[0])["done"] for _ in range(5)]
        after = [_descriptors(process.pid) for process in made.processes]
        stop.set()
        for thread in threads:
            thread.join()
        assert done == sorted(done) and done[-1] - done[0] == 40, "every answer was right"
        assert before == after, "descriptors"
        assert not connected[0], "nothing listens during a run"


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
