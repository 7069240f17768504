"""Two ranks in real processes: exact, as many bytes as planned, and always ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from disco.bench.compare import compare, whole_model
from disco.errors import InputError
from disco.runtime import RankProcesses
from disco.runtime.children import WorkerError


@pytest.fixture(scope="module")
def processes(tiny_folder: Path) -> Iterator[RankProcesses]:
    with RankProcesses(tiny_folder) as started:
        yield started


def alive(pids: Sequence[int]) -> list[int]:
    """Those of the processes that still run; a zombie does not."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found.append(pid)
    return found


def wait_until_gone(pids: Sequence[int], within_s: float) -> None:
    end = time.monotonic() + within_s
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(pids), f"still running after {within_s} s: {alive(pids)}"


def test_every_rank_has_the_whole_models_output(
    processes: RankProcesses, tiny: nn.Module, tiny_input: Tensor
) -> None:
    run = processes.run(tiny_input)
    assert len(run.outputs) == 2
    for output in run.outputs:
        comparison = compare(output, whole_model(tiny, tiny_input))
        assert comparison.equal, str(comparison)


def test_counted_bytes_are_the_planned_ones(processes: RankProcesses, tiny_input: Tensor) -> None:
    plan = processes.manifest.plan
    assert 0 < plan.bytes_per_image < plan.bytes_dense_exchange
    for batch in (1, 3):
        run = processes.run(tiny_input.repeat(batch, 1, 1, 1))
        sent = tuple(batch * sum(row) for row in plan.bytes_matrix)
        received = tuple(batch * sum(column) for column in zip(*plan.bytes_matrix, strict=True))
        assert run.bytes_sent == sent
        assert run.bytes_received == received
        assert sum(sent) == batch * plan.bytes_per_image


def test_the_planned_weights_are_the_loaded_ones(processes: RankProcesses) -> None:
    loaded = tuple(message["weight_bytes"] for message in processes.ready)
    assert loaded == processes.manifest.plan.weight_bytes_per_rank


def test_requests_repeat_and_change_size(
    processes: RankProcesses, tiny: nn.Module, tiny_input: Tensor
) -> None:
    for batch, scale in ((2, 1.0), (1, -2.0), (2, 0.5), (4, 1.0)):
        x = tiny_input.repeat(batch, 1, 1, 1) * scale
        for output in processes.run(x).outputs:
            assert compare(output, whole_model(tiny, x)).equal


def test_measure_gives_one_latency_a_pass(processes: RankProcesses, tiny_input: Tensor) -> None:
    latencies = processes.measure(tiny_input, warmup=1, repeats=3)
    assert len(latencies) == 3 and min(latencies) > 0


def test_the_processes_end_with_the_block(tiny_folder: Path) -> None:
    with RankProcesses(tiny_folder) as started:
        pids = started.pids
        assert len(alive(pids)) == 2
        assert {message["rank"] for message in started.ready} == {0, 1}
    assert not alive(pids)


def test_the_processes_end_with_an_interrupt(tiny_folder: Path) -> None:
    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt), RankProcesses(tiny_folder) as started:
        pids = started.pids
        raise KeyboardInterrupt
    assert len(pids) == 2 and not alive(pids)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_one_clear_error(
    tiny_folder: Path, tiny_input: Tensor, victim: int
) -> None:
    begin = 0.0
    pids: list[int] = []
    with pytest.raises(WorkerError) as caught, RankProcesses(tiny_folder) as started:
        started.run(tiny_input)
        pids = started.pids
        os.kill(pids[victim], signal.SIGKILL)
        begin = time.monotonic()
        started.run(tiny_input)
    assert time.monotonic() - begin < 5, "not after a timeout"
    assert f"rank {victim} was ended by signal 9 (SIGKILL)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not alive(pids)


def test_a_stopped_rank_is_an_error_after_the_timeout(
    tiny_folder: Path, tiny_input: Tensor
) -> None:
    pids: list[int] = []
    begin = 0.0
    with (
        pytest.raises(WorkerError, match="rank 0 failed"),
        RankProcesses(tiny_folder, timeout_s=1.0) as started,
    ):
        pids = started.pids
        os.kill(pids[1], signal.SIGSTOP)
        begin = time.monotonic()
        started.run(tiny_input)
    assert time.monotonic() - begin < 8
    assert not alive(pids)


def test_no_orphans_when_the_launcher_is_killed(tiny_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from disco.runtime import RankProcesses\n"
        "with RankProcesses(sys.argv[1]) as processes:\n"
        "    print(*processes.pids, flush=True)\n"
        "    time.sleep(60)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_folder)],
        stdout=subprocess.PIPE,
        text=True,
        # Nothing can remove its private folder after that.
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert launcher.stdout is not None
    pids = [int(word) for word in launcher.stdout.readline().split()]
    assert len(alive(pids)) == 2
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    wait_until_gone(pids, within_s=5)


def test_another_number_of_nodes_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=r"3 nodes were asked for, and the plan in .* is for 2"):
        RankProcesses(tiny_folder, nodes=3)
    with pytest.raises(InputError, match="3 directories were given for a plan of 2"):
        RankProcesses([tiny_folder] * 3)


def test_a_changed_byte_is_refused_before_anything_runs(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(tiny_folder, folder)
    shard = folder / "rank-1.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"rank-1\.safetensors") as caught, RankProcesses(folder):
        pass
    assert "\n" not in str(caught.value)


def test_ranks_with_shards_of_different_plans_refuse(tiny_folder: Path, other_folder: Path) -> None:
    with (
        pytest.raises(InputError, match="give every rank its shard of one partition"),
        RankProcesses([tiny_folder, other_folder]),
    ):
        pass


def test_a_shard_of_another_plan_is_refused(
    tiny_folder: Path, other_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(tiny_folder, folder)
    shutil.copy(other_folder / "rank-1.safetensors", folder / "rank-1.safetensors")
    with pytest.raises(InputError, match=r"rank-1\.safetensors"), RankProcesses(folder):
        pass


def test_an_input_that_the_model_refuses_is_one_line(tiny_folder: Path) -> None:
    pids: list[int] = []
    with pytest.raises((WorkerError, InputError)) as caught, RankProcesses(tiny_folder) as started:
        pids = started.pids
        started.run(torch.zeros(1, 4, 24, 24))
    assert "\n" not in str(caught.value) and not alive(pids)


def test_the_worker_keeps_stdout_for_replies(tiny_folder: Path, tmp_path: Path) -> None:
    """A child that fails says so as one JSON line; whatever else it prints is on stderr."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "disco.runtime.worker", "--directory", str(tiny_folder)),
            *("--rank", "5", "--world-size", "2", "--folder", str(tmp_path)),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    message = json.loads(line)
    assert (message["event"], message["kind"]) == ("error", "input")
    assert "5" in message["message"]
