"""TLS between ranks in processes of their own: the same bits and bytes, and the same ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("cryptography", reason="needs the extra `tls`")

from disco import api
from disco.runtime.token import make_token
from tests.runtime import test_survival
from tests.runtime.tls_cluster import HOST, keys_for

# One rank. The leader calls until it has enough, 0 is forever, and checks what comes out. The last
# line says how it ended, and when on the clock that all processes share.
_RANK = """
import json, os, sys, time
import torch
from safetensors.torch import load_file
from disco.errors import PeerLostError
from disco.runtime.joined import JoinedRank
from disco.runtime.places import Options, place_among, place_from_launcher
from disco.runtime.peers import Peers
folder, given, token, keys, leader, calls, *member = sys.argv[1:]
rank = int(member[1] if member else os.environ["RANK"])
tls = f"{keys}/rank-{rank}" if keys else None
options = Options("tcp", token, meeting_s=60, silence_s=2.0, tls=tls)
if member:
    place = place_among(Peers.from_yaml(member[0]), rank, options)
else:
    place = place_from_launcher(options)
done, sent, end = 0, 0, {"how": "finished"}
try:
    with JoinedRank(folder, place, options, threads=1, leader=int(leader)) as joined:
        print(json.dumps({"how": "ready"}), flush=True)
        if joined.leads:
            given = load_file(given)
            while done < int(calls) or calls == "0":
                answer = joined.run(given["x"])
                assert torch.equal(answer.outputs, given["y"]), "a wrong answer"
                done, sent = done + 1, sent + answer.bytes_sent
                if done == 3:
                    print(json.dumps({"how": "running"}), flush=True)
        else:
            joined.follow()
except PeerLostError as error:
    end = {"how": "lost", "rank": error.rank, "text": str(error)}
print(json.dumps({**end, "done": done, "sent": sent, "at": time.monotonic()}), flush=True)
"""


class Setup:
    """Files of a cluster of two, and how to start its ranks."""

    def __init__(self, folder: Path, x: Tensor, tmp_path: Path) -> None:
        self.folder, self.path = folder, tmp_path
        self.token, self.keys = tmp_path / "token", tmp_path / "keys"
        make_token(self.token)
        keys_for(self.keys, 2)
        sockets = [socket.create_server((HOST, 0)) for _ in range(2)]
        lines = [f"  - {HOST}:{made.getsockname()[1]}\n" for made in sockets]
        for made in sockets:
            made.close()
        self.peers = tmp_path / "peers.yaml"
        self.peers.write_text("peers:\n" + "".join(lines))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.inference_mode():
            y = api.load(folder)(x)
        torch.set_num_threads(threads)
        self.given = tmp_path / "given.safetensors"
        save_file({"x": x, "y": y}, self.given)
        (tmp_path / "rank.py").write_text(_RANK)
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        made = subprocess.Popen(
            [sys.executable, *words],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(made)
        return made

    def words(self, *, calls: int, leader: int, encrypted: bool = True) -> list[str]:
        keys = str(self.keys) if encrypted else ""
        script, folder = str(self.path / "rank.py"), str(self.folder)
        return [script, folder, str(self.given), str(self.token), keys, str(leader), str(calls)]

    def rank(self, rank: int, **how: Any) -> subprocess.Popen[str]:
        return self.start(*self.words(**how), str(self.peers), str(rank))

    def disco(self, command: str, rank: int, *more: str) -> subprocess.Popen[str]:
        words = ["-m", "disco.cli", command, *more, "--peers", str(self.peers)]
        return self.start(*words, "--rank", str(rank), "--token-file", str(self.token))

    def end(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        found = json.loads(out.splitlines()[-1])
        assert isinstance(found, dict)
        return found


@pytest.fixture
def setup(tiny_folder: Path, tiny_input: Tensor, tmp_path: Path) -> Iterator[Setup]:
    made = Setup(tiny_folder, tiny_input, tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    found = json.loads(process.stdout.readline())
    assert isinstance(found, dict)
    return found


def test_bits_and_bytes_are_those_of_plain_tcp(setup: Setup) -> None:
    sent = {}
    for encrypted, leader in ((False, 0), (True, 0), (True, 1)):
        ranks = [setup.rank(r, calls=4, leader=leader, encrypted=encrypted) for r in range(2)]
        ends = [setup.end(process) for process in ranks]
        assert [end["how"] for end in ends] == ["finished"] * 2
        assert ends[leader]["done"] == 4
        sent[encrypted, leader] = ends[leader]["sent"]
    assert sent[False, 0] == sent[True, 0] > 0


def test_a_killed_rank_is_lost_at_once(setup: Setup) -> None:
    ranks = [setup.rank(rank, calls=0, leader=0) for rank in range(2)]
    assert [line(ranks[0])["how"] for _ in range(2)] == ["ready", "running"]
    begin = time.monotonic()
    ranks[1].kill()
    end = setup.end(ranks[0])
    assert (end["how"], end["rank"]) == ("lost", 1), end
    assert end["at"] - begin < 1


def test_a_stopped_rank_is_lost_after_its_silence(setup: Setup) -> None:
    ranks = [setup.rank(rank, calls=0, leader=1) for rank in range(2)]
    assert [line(ranks[1])["how"] for _ in range(2)] == ["ready", "running"]
    begin = time.monotonic()
    ranks[0].send_signal(signal.SIGSTOP)
    end = setup.end(ranks[1])
    assert (end["how"], end["rank"]) == ("lost", 0) and "it has said nothing" in end["text"]
    assert 1.7 < end["at"] - begin < 10
    ranks[0].send_signal(signal.SIGCONT)
    end = setup.end(ranks[0])
    assert (end["how"], end["rank"]) == ("lost", 1), end


def test_torchrun(setup: Setup) -> None:
    words = setup.words(calls=2, leader=0)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    _, errors = (process := setup.start(*launcher, *words)).communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]


def test_a_worker_with_tls(setup: Setup) -> None:
    keys = str(setup.keys / "rank-1")
    worker = setup.disco("worker", 1, str(setup.folder), "--tls", keys)
    assert setup.end(setup.rank(0, calls=3, leader=0))["done"] == 3
    out, errors = worker.communicate(timeout=60)
    assert worker.returncode == 0 and "3 calls" in out, errors
    assert "over tcp with TLS" in out


def test_doctors_say_who_goes_without_tls(setup: Setup) -> None:
    both = [
        setup.disco("doctor", rank, "--timeout", "60", "--tls", str(setup.keys / f"rank-{rank}"))
        for rank in range(2)
    ]
    for process in both:
        out, errors = process.communicate(timeout=100)
        assert process.returncode == 0 and "1 of 1 pairs can talk" in out, errors
    keys = str(setup.keys / "rank-1")
    plain = setup.disco("doctor", 0, "--timeout", "12")
    secured = setup.disco("doctor", 1, "--timeout", "12", "--tls", keys)
    (_, errors), (out, _) = (p.communicate(timeout=100) for p in (plain, secured))
    assert plain.returncode == secured.returncode == 1
    assert "it uses TLS, and this rank does not" in errors
    assert "it does not use TLS, and this rank does: start all ranks with --tls, or none" in out


@pytest.mark.slow
def test_a_lost_rank_comes_back_over_tls(
    survivable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed and started again, and stopped for a while."""
    keys_for(tmp_path / "keys", test_survival.RANKS)
    plain, degrade = test_survival.SURVIVOR_SCRIPT, 'on_peer_loss="degrade"'
    assert degrade in plain
    tls = f'tls="{tmp_path / "keys"}/rank-" + rank'
    monkeypatch.setattr(
        test_survival, "SURVIVOR_SCRIPT", plain.replace(degrade, f"{degrade}, {tls}")
    )
    with test_survival.cluster(survivable, tmp_path) as made:
        made.processes[1].kill()
        made.processes[1].communicate()
        made.answers_until([1])
        made.start(1)
        made.answers_until([], within_s=90)
        os.kill(made.processes[2].pid, signal.SIGSTOP)
        made.answers_until([2])
        os.kill(made.processes[2].pid, signal.SIGCONT)
        made.answers_until([], within_s=90)
