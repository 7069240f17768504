"""Streams of requests over processes that are launched, and over ranks that have joined."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from disco import api
from disco.errors import InputError
from disco.executor import Timeline
from disco.runtime import RankProcesses, RunResult
from disco.runtime.children import WorkerError
from disco.runtime.streams import Call, Item, run_in_order
from disco.runtime.token import make_token
from tests.runtime.conftest import SIZE
from tests.runtime.test_joined import _MPIEXEC, free_ports, needs_mpi


def _inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 3, SIZE, SIZE, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def processes(tiny_folder: Path) -> Iterator[RankProcesses]:
    with RankProcesses(tiny_folder, threads=1) as started:
        yield started


# Launched -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_a_stream_gives_the_bits_of_requests_one_by_one(
    processes: RankProcesses, in_flight: int
) -> None:
    inputs = _inputs(9)
    alone = [processes.run(x) for x in inputs]
    stream = list(processes.run_stream(iter(inputs), in_flight))
    assert len(stream) == len(alone)
    for found, expected in zip(stream, alone, strict=True):
        assert isinstance(found, RunResult)
        assert found.bytes_sent == expected.bytes_sent
        for output, wanted in zip(found.outputs, expected.outputs, strict=True):
            assert torch.equal(output, wanted)


@pytest.mark.parametrize("transport", ["tcp", "torch"])
def test_bad_inputs_in_the_middle_keep_their_place(tiny_folder: Path, transport: str) -> None:
    inputs = _inputs(7)
    items: list[Item] = list(inputs)
    items[1] = torch.zeros(1, 4, SIZE, SIZE)
    items[3] = InputError("no image")
    items[4] = Call((inputs[4],))
    items[5] = Call((inputs[5], object()))
    with RankProcesses(tiny_folder, threads=1, transport=transport) as ranks:
        results = list(ranks.run_stream(items, 2))
        alone = {i: ranks.run(inputs[i]) for i in (0, 2, 4, 6)}
    assert len(results) == 7
    for i, message in ((1, "'x' must be"), (3, "no image"), (5, "may hold tensors, constants")):
        found = results[i]
        assert isinstance(found, InputError) and message in str(found)
    for i, expected in alone.items():
        found = results[i]
        assert isinstance(found, RunResult)
        assert torch.equal(found.outputs[1], expected.outputs[1])


def test_only_what_can_be_used_soon_is_taken(processes: RankProcesses) -> None:
    taken = 0

    def endless() -> Iterator[Tensor]:
        nonlocal taken
        for x in itertools.cycle(_inputs(2)):
            taken += 1
            yield x

    stream = processes.run_stream(endless(), 3)
    for _ in range(4):
        assert isinstance(next(stream), RunResult)
    assert taken <= 4 + 3 + 2
    with pytest.raises(InputError, match="a stream of requests is under way"):
        processes.run(_inputs(1)[0])
    with pytest.raises(InputError, match="a stream of requests is under way"):
        processes.run_stream([], 1)
    stream.close()  # type: ignore[attr-defined]
    assert processes.run(_inputs(1)[0]).latency_ms > 0
    assert list(processes.run_stream([], 2)) == []


def test_inputs_that_fail_to_come_leave_the_ranks_usable(processes: RankProcesses) -> None:
    def broken() -> Iterator[Tensor]:
        yield from _inputs(3)
        raise OSError("the camera is gone")

    with pytest.raises(OSError, match="the camera is gone"):
        list(processes.run_stream(broken(), 2))
    assert processes.run(_inputs(1)[0]).latency_ms > 0


@pytest.mark.parametrize("in_flight", [0, 17, -1])
def test_numbers_in_flight_that_cannot_be(processes: RankProcesses, in_flight: int) -> None:
    with pytest.raises(InputError, match=f"{in_flight} requests in flight .* give 1 to 16"):
        processes.run_stream(_inputs(1), in_flight)


def test_a_rank_killed_in_a_stream_is_one_clear_error(tiny_folder: Path) -> None:
    begin = 0.0
    with (
        pytest.raises(WorkerError, match=r"rank 1 was ended by signal 9 \(SIGKILL\)"),
        RankProcesses(tiny_folder, threads=1) as ranks,
    ):
        stream = ranks.run_stream(itertools.repeat(_inputs(1)[0]), 2)
        next(stream)
        os.kill(ranks.pids[1], signal.SIGKILL)
        begin = time.monotonic()
        for _ in stream:
            pass
    assert time.monotonic() - begin < 10


def test_a_stream_that_outlives_its_ranks(tiny_folder: Path) -> None:
    with RankProcesses(tiny_folder, threads=1) as ranks:
        stream = ranks.run_stream(itertools.repeat(_inputs(1)[0]), 2)
        next(stream)
    stream.close()  # type: ignore[attr-defined]


def test_results_come_in_order_whatever_order_they_are_made_in() -> None:
    class Backward:
        """Gives the youngest first."""

        def __init__(self) -> None:
            self.fed: list[int] = []
            self.most = 0

        def __enter__(self) -> Backward:
            return self

        def __exit__(self, *_: object) -> None:
            assert not self.fed

        def feed(self, number: int, call: Call) -> None:
            self.fed.append(number)
            self.most = max(self.most, len(self.fed))

        def collect(self) -> tuple[int, int]:
            number = self.fed.pop()
            return number, number

    ranks = Backward()
    results = list(run_in_order(_inputs(12), ranks, 3))
    assert results == list(range(12)) and ranks.most == 5


# Joined -------------------------------------------------------------------------------------------

# One rank. The leader streams inputs, with bad ones among them, and writes what came out; the clock
# of rank r is r times `skew` ahead.
_RANK = """
import sys, time
folder, inputs, outputs, in_flight, leader, skew, pause_s, *member = sys.argv[1:]
import os
rank = int(member[1]) if member else int(os.environ.get("PMI_RANK", os.environ.get("RANK", "0")))
real = time.perf_counter_ns
time.perf_counter_ns = lambda: real() + rank * int(skew)
import json
import torch
from safetensors.torch import load_file, save_file
from disco.errors import InputError
from disco.runtime.joined import JoinedRank
from disco.runtime.places import Options, place_among, place_from_launcher
from disco.runtime.peers import Peers
options = Options(token_file=member[2] if member else None, meeting_s=60, silence_s=1.0)
if member:
    place = place_among(Peers.from_yaml(member[0]), rank, options)
else:
    place = place_from_launcher(options)
def items():
    for i, (_, x) in enumerate(sorted(load_file(inputs).items())):
        if i == 2:
            time.sleep(float(pause_s))
            yield InputError("no image")
            yield x[:, :2]
        yield x
with JoinedRank(folder, place, options, threads=1, leader=int(leader)) as joined:
    if not joined.leads:
        joined.follow()
        sys.exit()
    made, told = {}, []
    try:
        for i, result in enumerate(joined.run_stream(items(), int(in_flight), profile=True)):
            if i == 1:
                time.sleep(float(pause_s))
            if isinstance(result, InputError):
                told.append(str(result))
                continue
            (made[str(i)],) = result.outputs
            told.append({
                "bytes_sent": result.bytes_sent,
                "latency_ms": result.latency_ms,
                "ranks": [vars(rank) for rank in result.ranks],
                "errors": result.clock_error_ns,
                "timelines": [timeline.to_plain() for timeline in result.timelines],
            })
    except InputError as error:
        told = str(error)
    # One that is left in the middle, and what comes after it.
    x = next(iter(load_file(inputs).values()))
    left = joined.run_stream([x] * 4)
    next(left)
    try:
        joined.run(x)
    except InputError as error:
        assert "a stream of requests is under way" in str(error)
    left.close()
    made["after"] = joined.run(x).outputs
    next(joined.run_stream([x] * 4))  # left open: it ends with the block
    save_file(made, outputs)
    with open(outputs + ".json", "w") as file:
        json.dump(told, file)
"""


class Joined:
    """Runs `_RANK` twice."""

    def __init__(self, folder: Path, tmp_path: Path) -> None:
        self.folder = folder
        self.out = tmp_path / "out.safetensors"
        self.inputs = _inputs(6)
        save_file({str(i): x for i, x in enumerate(self.inputs)}, tmp_path / "in.safetensors")
        (tmp_path / "rank.py").write_text(_RANK)
        ports = "".join(f"  - 127.0.0.1:{port}\n" for port in free_ports(2))
        (tmp_path / "peers.yaml").write_text("peers:\n" + ports)
        make_token(tmp_path / "token")
        self.tmp_path = tmp_path
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }

    def words(self, in_flight: int, leader: int, skew: int, pause_s: float = 0.0) -> list[str]:
        files = [self.tmp_path / "rank.py", self.folder, self.tmp_path / "in.safetensors", self.out]
        numbers = [in_flight, leader, skew, pause_s]
        return [sys.executable, *map(str, files), *map(str, numbers)]

    def over_tcp(self, words: list[str]) -> None:
        token = str(self.tmp_path / "token")
        running = [
            subprocess.Popen(
                [*words, str(self.tmp_path / "peers.yaml"), str(rank), token],
                env=self.env,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]

    def launched(self, command: list[str]) -> None:
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=120, cwd=self.tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def check(self, leader: int) -> None:
        """Outputs as one by one, each in its place, and accounts on one clock."""
        loaded = api.load(self.folder)
        made, told = load_file(self.out), json.loads(Path(f"{self.out}.json").read_text())
        assert told[2] == "no image" and "'x' must be" in told[3] and len(told) == 8
        with torch.inference_mode():
            assert torch.equal(made["after"], loaded(self.inputs[0]))
            for place, x in zip((0, 1, 4, 5, 6, 7), self.inputs, strict=True):
                assert torch.equal(made[str(place)], loaded(x))
                _check_account(told[place], loaded.plan, leader)


def _check_account(told: dict, plan: api.Plan, leader: int) -> None:  # type: ignore[type-arg]
    assert told["bytes_sent"] == [sum(row) for row in plan.bytes_matrix]
    assert told["latency_ms"] == told["ranks"][leader]["latency_ms"]
    for rank in told["ranks"]:
        parts = rank["compute_ms"] + rank["pack_ms"] + rank["wait_ms"]
        assert 0 < rank["compute_ms"] < parts <= rank["latency_ms"]
    error_ns = sum(told["errors"])
    assert told["errors"][leader] == 0 and error_ns > 0
    timelines = [Timeline.from_plain(plain) for plain in told["timelines"]]
    begin, end = (
        min(t.spans[0].begin_ns for t in timelines),
        max(t.spans[-1].end_ns for t in timelines),
    )
    assert end - begin < 60e9, "the clocks are not aligned"
    sent = {(r, t.peer, t.exchange): t for r in range(2) for t in timelines[r].transfers if t.sent}
    arrivals = [(r, t) for r in range(2) for t in timelines[r].transfers if not t.sent]
    assert len(arrivals) == len(sent) > 0
    for rank, arrival in arrivals:
        # Drift over the seconds of a test is far below a microsecond on one machine.
        assert arrival.end_ns >= sent[arrival.peer, rank, arrival.exchange].begin_ns - error_ns


@pytest.mark.cold  # the clock is changed before what reads it is imported
@pytest.mark.parametrize(("in_flight", "leader"), [(1, 0), (2, 1), (4, 0)])
def test_joined_ranks_over_tcp(
    tiny_folder: Path, tmp_path: Path, in_flight: int, leader: int
) -> None:
    joined = Joined(tiny_folder, tmp_path)
    joined.over_tcp(joined.words(in_flight, leader, skew=7_200_000_000_000))
    joined.check(leader)


def test_a_slow_source_and_a_slow_user_lose_nobody(tiny_folder: Path, tmp_path: Path) -> None:
    """Longer than a peer may be silent for, in the middle of a stream."""
    joined = Joined(tiny_folder, tmp_path)
    joined.over_tcp(joined.words(2, 0, skew=0, pause_s=2.5))
    joined.check(0)


@needs_mpi
def test_joined_ranks_over_mpi(tiny_folder: Path, tmp_path: Path) -> None:
    joined = Joined(tiny_folder, tmp_path)
    mpiexec = str(_MPIEXEC) if _MPIEXEC.exists() else "mpiexec"
    joined.launched([mpiexec, "-n", "2", *joined.words(2, 0, skew=-5_000_000_000)])
    joined.check(0)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_joined_ranks_over_gloo(tiny_folder: Path, tmp_path: Path, in_flight: int) -> None:
    """Its messages cannot be asked for, so one at a time is all that there is."""
    joined = Joined(tiny_folder, tmp_path)
    words = joined.words(in_flight, 0, skew=1_000_000)[1:]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    joined.launched([*launcher, *words])
    if in_flight == 1:
        joined.check(0)
    else:
        told = json.loads(Path(f"{joined.out}.json").read_text())
        assert "2 requests in flight were asked for over gloo" in told
