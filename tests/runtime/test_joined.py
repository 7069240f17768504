"""Ranks that join a cluster by a list of peers, torchrun or mpiexec, in real processes."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from disco import api
from disco.errors import InputError
from disco.runtime import RankProcesses
from disco.runtime.peers import Peers
from disco.runtime.places import Options, place_among
from disco.runtime.token import make_token, read_token

# Runs as one rank; the leader writes what came out.
_RANK = """
import sys, torch
from safetensors.torch import load_file, save_file
from disco.runtime.joined import JoinedRank
from disco.runtime.places import Options, place_among, place_from_launcher
from disco.runtime.peers import Peers
folder, inputs, outputs, transport, leader, *member = sys.argv[1:]
options = Options(transport=transport, token_file=member[2] if member else None, meeting_s=60)
if member:
    place = place_among(Peers.from_yaml(member[0]), int(member[1]), options)
else:
    place = place_from_launcher(options)
with JoinedRank(folder, place, options, threads=1, leader=int(leader)) as joined:
    if joined.leads:
        x = load_file(inputs)["0"]
        made = {str(i): joined.run(x * scale).outputs for i, scale in enumerate((1.0, -2.0))}
        save_file(made, outputs)
    else:
        assert joined.follow() == 2
"""
_MPIEXEC = Path(sys.executable).with_name("mpiexec")
needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or not (_MPIEXEC.exists() or shutil.which("mpiexec")),
    reason="mpi4py or mpiexec is not installed (pip install 'disco-kernels[mpi]')",
)


def free_ports(count: int) -> list[int]:
    """Ports that nobody used a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture
def peers_file(tmp_path: Path) -> Path:
    path = tmp_path / "peers.yaml"
    lines = "".join(f"  - 127.0.0.1:{port}\n" for port in free_ports(2))
    path.write_text("peers:\n" + lines)
    return path


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    make_token(path)
    return path


class Runner:
    """Runs `_RANK` in every way there is, on `tiny` cut for two ranks."""

    def __init__(self, folder: Path, inputs: Path, tmp_path: Path) -> None:
        self.folder = folder
        self.tmp_path = tmp_path
        self.inputs = inputs
        self.script = tmp_path / "rank.py"
        self.script.write_text(_RANK)
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }

    def words(self, transport: str, leader: int, *member: str) -> tuple[list[str], Path]:
        out = self.tmp_path / f"{transport}-{leader}.safetensors"
        return [
            *(str(self.script), str(self.folder), str(self.inputs), str(out)),
            *(transport, str(leader), *member),
        ], out

    def launch(self, command: Sequence[str], **more: str) -> None:
        done = subprocess.run(
            command,
            env={**self.env, **more},
            capture_output=True,
            text=True,
            timeout=120,
            cwd=self.tmp_path,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def together(self, commands: Sequence[Sequence[str]]) -> None:
        running = [
            subprocess.Popen([sys.executable, *c], env=self.env, stderr=subprocess.PIPE, text=True)
            for c in commands
        ]
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]


@pytest.fixture
def runner(tiny_folder: Path, tiny_input: Tensor, tmp_path: Path) -> Runner:
    from safetensors.torch import save_file

    inputs = tmp_path / "inputs.safetensors"
    save_file({"0": tiny_input}, inputs)
    return Runner(tiny_folder, inputs, tmp_path)


def _expected(folder: Path, x: Tensor) -> list[Tensor]:
    """The same shards in this process, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loaded = api.load(folder)
        with torch.inference_mode():
            return [loaded(x), loaded(x * -2.0)]
    finally:
        torch.set_num_threads(threads)


def _check(out: Path, folder: Path, x: Tensor) -> None:
    found = load_file(out)
    for i, expected in enumerate(_expected(folder, x)):
        assert torch.equal(found[str(i)], expected), "transports differ"


@pytest.mark.parametrize("leader", [0, 1])
def test_a_list_of_peers_over_tcp(
    runner: Runner, peers_file: Path, token_file: Path, tiny_input: Tensor, leader: int
) -> None:
    commands = []
    for rank in range(2):
        words, out = runner.words("auto", leader, str(peers_file), str(rank), str(token_file))
        commands.append(words)
    runner.together(commands)
    _check(out, runner.folder, tiny_input)


@pytest.mark.parametrize("transport", ["tcp", "torch"])
def test_torchrun(runner: Runner, token_file: Path, tiny_input: Tensor, transport: str) -> None:
    words, out = runner.words(transport, 0)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words]
    secret = token_file.read_text().strip()
    runner.launch(command, DISCO_TOKEN=secret)
    _check(out, runner.folder, tiny_input)


@needs_mpi
@pytest.mark.parametrize("leader", [0, 1])
def test_mpiexec(runner: Runner, tiny_input: Tensor, leader: int) -> None:
    words, out = runner.words("auto", leader)
    mpiexec = str(_MPIEXEC) if _MPIEXEC.exists() else "mpiexec"
    runner.launch([mpiexec, "-n", "2", sys.executable, *words])
    _check(out, runner.folder, tiny_input)


@needs_mpi
def test_a_failing_rank_ends_the_mpi_job(tiny_folder: Path, tmp_path: Path) -> None:
    mpiexec = str(_MPIEXEC) if _MPIEXEC.exists() else "mpiexec"
    disco = [sys.executable, "-m", "disco.run", str(tiny_folder), "--input", "no-such-file"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    begin = time.monotonic()
    done = subprocess.run(
        [mpiexec, "-n", "3", *disco], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode != 0 and time.monotonic() - begin < 60
    # Both ranks 0 (the partition names no model) and 2 fail; who is first ends the job.
    assert re.search("rank 2 is outside the plan|does not say which model", done.stderr)


@pytest.mark.parametrize("transport", ["tcp", "torch"])
def test_processes_on_this_machine_are_bit_identical(
    tiny_folder: Path, tiny_input: Tensor, tiny: nn.Module, transport: str
) -> None:
    with RankProcesses(tiny_folder, threads=1, transport=transport) as processes:
        assert {message["transport"] for message in processes.ready} == {transport}
        for x, expected in zip(
            (tiny_input, tiny_input * -2.0), _expected(tiny_folder, tiny_input), strict=True
        ):
            for output in processes.run(x).outputs:
                assert torch.equal(output, expected)


# What is refused ----------------------------------------------------------------------------------


def test_unknown_transports_are_refused(tiny_folder: Path, token_file: Path) -> None:
    with pytest.raises(InputError, match="transport 'udp' was given; there are auto, tcp, torch"):
        RankProcesses(tiny_folder, transport="udp")
    with pytest.raises(InputError, match="for processes that mpiexec starts"):
        RankProcesses(tiny_folder, transport="mpi")
    peers = Peers((("127.0.0.1", 1), ("127.0.0.1", 2)))
    with pytest.raises(InputError, match="'torch' was given with a list of peers"):
        place_among(peers, 0, Options("torch", token_file))
    with pytest.raises(InputError, match="rank 2 was given, and the list has 2 peers"):
        place_among(peers, 2, Options("tcp", token_file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("peers: [127.0.0.1:80, '127.0.0.1:80']", "lists 127.0.0.1:80 twice"),
        ("peers: [127.0.0.1]", "peer 0 in .* must be HOST:PORT"),
        ("peers: [127.0.0.1:0]", "must be HOST:PORT"),
        ("peers: [127.0.0.1:70000]", "must be HOST:PORT"),
        ("peers: ['::1:80']", "must be HOST:PORT"),
        ("peers: [3]", "must be HOST:PORT"),
        ("peers: []", "needs one key, `peers`"),
        ("peers: {}\n", "needs one key, `peers`"),
        ("hosts: [a:1]", "needs one key, `peers`"),
        ("peers: [a:1]\nmore: 1", "needs one key, `peers`"),
        ("peers: [", "is not YAML"),
    ],
)
def test_lists_of_peers_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "peers.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        Peers.from_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        Peers.from_yaml(tmp_path / "none.yaml")


def test_ipv6_addresses_have_brackets(tmp_path: Path) -> None:
    path = tmp_path / "peers.yaml"
    path.write_text('peers: ["[fd00::1]:7000", "node-b.local:7001"]')
    assert Peers.from_yaml(path).addresses == (("fd00::1", 7000), ("node-b.local", 7001))


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    make_token(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(read_token(path)) == 64
    with pytest.raises(InputError, match="cannot be made: File exists"):
        make_token(path)
    path.chmod(0o644)
    with pytest.raises(InputError, match=r"others may read the token file .*chmod 600"):
        read_token(path)
    path.chmod(0o600)
    path.write_text("short\n")
    with pytest.raises(InputError, match="has a token of 5 characters"):
        read_token(path)
    monkeypatch.delenv("DISCO_TOKEN", raising=False)
    with pytest.raises(InputError, match="give --token-file FILE or set DISCO_TOKEN"):
        read_token(None)
    monkeypatch.setenv("DISCO_TOKEN", "0123456789abcdef")
    assert read_token(None) == b"0123456789abcdef"


# The doctor ---------------------------------------------------------------------------------------


def _doctors(
    peers_file: Path, tokens: Sequence[Path], ranks: Sequence[int], timeout: str
) -> list[subprocess.CompletedProcess[str]]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "disco.cli", "doctor", "--peers", str(peers_file)),
                *("--rank", str(r), "--token-file", str(tokens[r]), "--timeout", timeout),
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in ranks
    ]
    return [
        subprocess.CompletedProcess("", p.returncode, *outputs)
        for p, outputs in [(p, p.communicate(timeout=100)) for p in running]
    ]


def test_a_doctor_finds_all_well(peers_file: Path, token_file: Path) -> None:
    for done in _doctors(peers_file, [token_file] * 2, [0, 1], "60"):
        assert done.returncode == 0, done.stderr
        assert "rank 1 -> rank 0" in done.stdout and "ok, round trip" in done.stdout
        assert "1 of 1 pairs can talk" in done.stdout


def test_a_doctor_says_why_not(peers_file: Path, token_file: Path, tmp_path: Path) -> None:
    (alone,) = _doctors(peers_file, [token_file] * 2, [1], "1")
    assert alone.returncode == 1 and "Connection refused" in alone.stdout
    other = tmp_path / "other"
    make_token(other)
    first, second = _doctors(peers_file, [token_file, other], [0, 1], "8")
    assert first.returncode == second.returncode == 1
    assert "another token" in second.stdout
