"""Going on without a lost rank, and taking it back, with three real processes over tcp."""

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
import torch
from torch import Tensor

from disco.errors import InputError
from disco.runtime import RankProcesses
from disco.runtime.joined import JoinedRank
from disco.runtime.peers import Peers
from disco.runtime.places import Options, place_among
from disco.runtime.token import make_token

RANKS = 3
# One rank. The leader repeats a call, and says which ranks an answer lacked, when that changes and
# now and then, and whether all answers were what the ranks that are there come to, bit for bit.
SURVIVOR_SCRIPT = """
import json, sys, time
import torch
from safetensors.torch import load_file
from disco.errors import PeerLostError
from disco.runtime.joined import JoinedRank
from disco.runtime.places import Options, place_among
from disco.runtime.peers import Peers
folder, given, peers, rank, leader, token, silence_s = sys.argv[1:]
given = load_file(given)
options = Options("tcp", token, meeting_s=60, silence_s=float(silence_s), on_peer_loss="degrade")
def say(**what):
    print(json.dumps({**what, "at": time.monotonic()}), flush=True)
while True:
    place = place_among(Peers.from_yaml(peers), int(rank), options)
    try:
        with JoinedRank(folder, place, options, threads=1, leader=int(leader)) as joined:
            say(how="ready")
            before, right = None, True
            while joined.leads:
                answer = joined.run(given["x"])
                wanted = given[".".join(["y", *map(str, sorted(answer.lost))])]
                right &= torch.equal(answer.outputs, wanted)
                if answer.lost != before or time.monotonic() > next_line:
                    say(how="answer", lost=sorted(answer.lost), right=right)
                    before, next_line = answer.lost, time.monotonic() + 0.1
                time.sleep(0.002)
            joined.follow()
        say(how="finished")
        break
    except PeerLostError as error:
        say(how="lost", rank=error.rank)
        assert int(rank) != int(leader)
"""


class Cluster:
    """Three processes, one a rank; any of them can be started again."""

    def __init__(self, survivable: Path, tmp_path: Path, leader: int, silence_s: float) -> None:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(RANKS)]
        peers, token, script = (tmp_path / name for name in ("peers.yaml", "token", "rank.py"))
        ports = [made.getsockname()[1] for made in sockets]
        peers.write_text("peers:\n" + "".join(f"  - 127.0.0.1:{port}\n" for port in ports))
        for made in sockets:
            made.close()
        token.unlink(missing_ok=True)
        make_token(token)
        script.write_text(SURVIVOR_SCRIPT)
        self.leader = leader
        self._arguments = [
            [
                *(
                    str(script),
                    str(survivable),
                    str(survivable.parent / "given.safetensors"),
                    str(peers),
                ),
                *(str(rank), str(leader), str(token), str(silence_s)),
            ]
            for rank in range(RANKS)
        ]
        self.processes: dict[int, subprocess.Popen[str]] = {}
        for rank in range(RANKS):
            self.start(rank)

    def start(self, rank: int) -> None:
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        self.processes[rank] = subprocess.Popen(
            [sys.executable, *self._arguments[rank]], env=env, stdout=subprocess.PIPE, text=True
        )

    def line(self, rank: int) -> dict[str, Any]:
        out = self.processes[rank].stdout
        assert out is not None
        text = out.readline()
        assert text, f"rank {rank} died"
        found = json.loads(text)
        assert isinstance(found, dict)
        return found

    def answers_until(self, lost: list[int], within_s: float = 30.0) -> list[dict[str, Any]]:
        """The leader's answers up to the first without these ranks; all of them right."""
        answers = []
        end = time.monotonic() + within_s
        while True:
            answer = self.line(self.leader)
            assert answer["how"] == "answer" and answer["right"], answer
            answers.append(answer)
            if answer["lost"] == lost:
                return answers
            assert time.monotonic() < end, f"still without {answer['lost']}"

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()

    def close(self) -> None:
        self.kill()
        for process in self.processes.values():
            process.communicate()


@contextlib.contextmanager
def cluster(
    survivable: Path, tmp_path: Path, leader: int = 0, silence_s: float = 1.0
) -> Iterator[Cluster]:
    made = Cluster(survivable, tmp_path, leader, silence_s)
    too_late = threading.Timer(180, made.kill)  # a read of their words would wait for ever
    too_late.start()
    try:
        for rank in range(RANKS):
            assert made.line(rank)["how"] == "ready"
        made.answers_until([])
        yield made
    finally:
        too_late.cancel()
        made.close()


@pytest.mark.parametrize(("victim", "leader"), [(1, 0), (0, 2)])
def test_a_killed_rank_is_done_without_and_taken_back(
    survivable: Path, tmp_path: Path, victim: int, leader: int
) -> None:
    with cluster(survivable, tmp_path, leader) as made:
        time.sleep(0.05)
        begin = time.monotonic()
        made.processes[victim].kill()
        made.processes[victim].communicate()
        answers = made.answers_until([victim])
        assert answers[-1]["at"] - begin < 1.5, "noticed late"
        made.start(victim)
        assert made.line(victim)["how"] == "ready"
        back = made.answers_until([])
        assert all(answer["lost"] == [victim] for answer in back[:-1])
        # The survivors are the processes that they were, and go on.
        made.answers_until([])
        assert all(process.poll() is None for process in made.processes.values())


def test_one_after_the_other_until_the_leader_is_alone(survivable: Path, tmp_path: Path) -> None:
    with cluster(survivable, tmp_path, leader=1) as made:
        made.processes[0].kill()
        made.answers_until([0])
        made.processes[2].kill()
        made.answers_until([0, 2])
        for rank in (2, 0):
            made.processes[rank].communicate()
            made.start(rank)
        made.answers_until([])


def test_a_stopped_rank_comes_back_without_a_new_process(survivable: Path, tmp_path: Path) -> None:
    with cluster(survivable, tmp_path, silence_s=0.7) as made:
        begin = time.monotonic()
        os.kill(made.processes[2].pid, signal.SIGSTOP)
        answers = made.answers_until([2])
        assert answers[-1]["at"] - begin < 0.7 + 1.5
        os.kill(made.processes[2].pid, signal.SIGCONT)
        assert made.line(2)["how"] == "lost"
        assert made.line(2)["how"] == "ready"
        made.answers_until([])


def test_strangers_do_not_keep_a_rank_out(survivable: Path, tmp_path: Path) -> None:
    """While ranks listen for one that is lost, others connect and talk nonsense."""
    with cluster(survivable, tmp_path) as made:
        made.processes[1].kill()
        made.processes[1].communicate()
        made.answers_until([1])
        ports = Peers.from_yaml(tmp_path / "peers.yaml").addresses
        crowd = []
        for number in range(200):
            for address in (ports[0], ports[2]):
                with contextlib.suppress(OSError):
                    sock = socket.create_connection(address, 1)
                    sock.sendall(random.Random(number).randbytes(number))
                    crowd.append(sock)
        assert crowd
        made.start(1)
        made.answers_until([])
        for rank in (0, 2):
            descriptors = len(list(Path(f"/proc/{made.processes[rank].pid}/fd").iterdir()))
            assert descriptors < 80
        for sock in crowd:
            sock.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_kills_at_random_moments(survivable: Path, tmp_path: Path, seed: int) -> None:
    """No hang, and no answer that is wrong or lacks ranks without saying so."""
    chance = random.Random(seed)
    leader = chance.randrange(RANKS)
    victim = chance.choice([rank for rank in range(RANKS) if rank != leader])
    with cluster(survivable, tmp_path, leader) as made:
        time.sleep(chance.random() * 0.2)
        made.processes[victim].kill()
        made.processes[victim].communicate()
        if chance.random() < 0.5:
            made.answers_until([victim])
        made.start(victim)
        time.sleep(chance.random() * 0.2)
        made.answers_until([victim])
        made.answers_until([])


def test_processes_of_one_machine(survivable: Path, tiny_input: Tensor) -> None:
    """Any rank, the first one included, is killed or stopped, and started again."""
    from safetensors.torch import load_file

    given = load_file(survivable.parent / "given.safetensors")
    with RankProcesses(survivable, threads=1, silence_s=0.7, on_peer_loss="degrade") as ranks:

        def check(lost: tuple[int, ...]) -> None:
            done = ranks.run(tiny_input)
            assert done.lost == lost
            wanted = given[".".join(["y", *map(str, lost)])]
            for rank, output in enumerate(done.outputs):
                assert (output is None) if rank in lost else torch.equal(output, wanted)
            assert torch.equal(done.answer, wanted)

        check(())
        for victim, how in ((0, signal.SIGKILL), (2, signal.SIGSTOP)):
            survivors = {rank: pid for rank, pid in enumerate(ranks.pids) if rank != victim}
            os.kill(ranks.pids[victim], how)
            check((victim,))
            check((victim,))
            assert len(ranks.measure(tiny_input, warmup=1, repeats=3)) == 3
            check((victim,))
            ranks.restart(victim)
            check(())
            assert {r: pid for r, pid in enumerate(ranks.pids) if r != victim} == survivors
        with pytest.raises(InputError, match="not lost"):
            ranks.restart(1)
        with pytest.raises(InputError, match="must be"):
            ranks.run(torch.zeros(1, 3, 5, 5))
        check(())
        os.kill(ranks.pids[0], signal.SIGKILL)
        os.kill(ranks.pids[1], signal.SIGKILL)
        check((0, 1))


def test_what_cannot_survive_is_refused(
    survivable: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--survivable"):
        RankProcesses(tiny_folder, on_peer_loss="degrade")
    with pytest.raises(InputError, match="for tcp"):
        RankProcesses(survivable, transport="torch", on_peer_loss="degrade")
    with pytest.raises(InputError, match="fail, degrade"):
        RankProcesses(survivable, on_peer_loss="ignore")
    make_token(tmp_path / "token")
    (tmp_path / "peers.yaml").write_text("peers: ['127.0.0.1:1', '127.0.0.1:2']\n")
    options = Options("tcp", tmp_path / "token", on_peer_loss="degrade")
    place = place_among(Peers.from_yaml(tmp_path / "peers.yaml"), 0, options)
    with pytest.raises(InputError, match="--survivable"), JoinedRank(tiny_folder, place, options):
        pass
