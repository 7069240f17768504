"""Ranks that do not fit into memory are refused before anything is loaded, by every limit."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from disco import api
from disco.errors import InputError
from disco.partition.prediction import NodeMemory
from disco.partition.shards import Manifest, load_manifest
from disco.runtime.free_memory import FreeMemory, free_memory
from disco.runtime.memory_check import PROCESS_BYTES, check_all_fit, check_rank_fits

MB = 1_000_000
ARTIFACTS = Path(__file__).parents[1] / "partition" / "artifacts"
linux_only = pytest.mark.skipif(
    not Path("/proc/meminfo").exists(), reason="free memory is read from /proc"
)


def machine(num_bytes: int) -> list[FreeMemory]:
    return [FreeMemory(num_bytes, "available on this machine")]


@pytest.fixture
def manifest(tiny_folder: Path) -> Manifest:
    """Of a plan whose rank 1 takes the whole of 50 MB, rank 0 of 20."""
    found = load_manifest(tiny_folder)
    memory = (NodeMemory(10 * MB, 6 * MB, 4 * MB), NodeMemory(30 * MB, 15 * MB, 5 * MB))
    return replace(found, plan=replace(found.plan, memory=memory))


def test_a_rank_may_take_all_that_is_free_and_no_byte_more(manifest: Manifest) -> None:
    check_rank_fits(manifest, 1, machine(50 * MB))
    with pytest.raises(InputError) as caught:
        check_rank_fits(manifest, 1, machine(50 * MB - 1))
    text = str(caught.value)
    assert text.startswith(
        "rank 1 needs 50.0 MB (weights 30.0, activations 15.0, messages 5.0); "
        "50.0 MB are available on this machine: end other programs"
    )
    check_rank_fits(manifest, 0, machine(50 * MB - 1))


def test_the_smallest_limit_counts(manifest: Manifest) -> None:
    limits = [*machine(100 * MB), FreeMemory(9 * MB, "left of the limit of control group /a")]
    with pytest.raises(InputError, match=r"9\.0 MB are left of the limit of control group /a"):
        check_rank_fits(manifest, 0, limits)
    check_rank_fits(manifest, 0, [])  # a system that does not say


def test_under_a_limit_of_addresses_the_mapped_file_counts_too(manifest: Manifest) -> None:
    shard = manifest.shards[1].num_bytes
    check_rank_fits(manifest, 1, [FreeMemory(50 * MB + shard, "left", True)])
    with pytest.raises(InputError, match=r"and 0\.0 MB for its file while loading; 50\.0 MB"):
        check_rank_fits(manifest, 1, [FreeMemory(50 * MB + shard - 1, "left", True)])


def test_ranks_of_one_machine_are_added_up(manifest: Manifest) -> None:
    total = 70 * MB + 2 * PROCESS_BYTES
    check_all_fit(manifest, machine(total))
    check_all_fit(manifest, [FreeMemory(0, "this process's alone", True)])
    with pytest.raises(InputError, match=r"2 ranks on one machine need .*rank 0 20\.0, rank 1 50"):
        check_all_fit(manifest, machine(total - 1))


def test_of_older_plans_the_shard_is_the_lower_bound() -> None:
    manifest = load_manifest(ARTIFACTS / "plan-1.0")
    size = (ARTIFACTS / "plan-1.0" / "rank-0.safetensors").stat().st_size
    check_rank_fits(manifest, 0, machine(size))
    with pytest.raises(InputError, match="its shard; this older plan does not say"):
        check_rank_fits(manifest, 0, machine(size - 1))


# Reading the system, from files that are made up --------------------------------------------------

_MEMINFO = "MemTotal: 2000 kB\nMemFree: 10 kB\nMemAvailable:   1500 kB\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def limits(root: Path) -> list[tuple[int, str]]:
    return [(f.num_bytes, f.limit) for f in free_memory(root) if not f.of_process]


def test_a_machine_without_groups(tmp_path: Path) -> None:
    assert limits(tmp_path) == []
    write(tmp_path, {"proc/meminfo": _MEMINFO})
    assert limits(tmp_path) == [(1500 * 1024, "available on this machine")]


def test_groups_of_version_2_and_those_above(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user.slice/app"
    write(
        tmp_path,
        {
            "proc/meminfo": _MEMINFO,
            "proc/self/cgroup": "0::/user.slice/app\n",
            "proc/self/mountinfo": "29 1 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": "700\n",
            "sys/fs/cgroup/user.slice/memory.max": "1000\n",
            "sys/fs/cgroup/user.slice/memory.current": "900\n",
            "sys/fs/cgroup/user.slice/memory.stat": "anon 5\ninactive_file 300\nfile 400\n",
        },
    )
    left = "left of the limit of control group /sys/fs/cgroup/user.slice"
    assert limits(tmp_path)[1:] == [(400, left)], "the cache that can be dropped is free"
    write(tmp_path, {f"{group}/memory.max": "650\n"})
    assert limits(tmp_path)[1:] == [(0, f"{left}/app"), (400, left)]


def test_groups_of_version_1(tmp_path: Path) -> None:
    mount = "sys/fs/cgroup/memory"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/box\n0::/\n",
            "proc/self/mountinfo": (
                "30 1 0:25 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
                "31 1 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
                "32 1 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
            ),
            f"{mount}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{mount}/memory.usage_in_bytes": "5\n",
            f"{mount}/box/memory.limit_in_bytes": "1000\n",
            f"{mount}/box/memory.usage_in_bytes": "400\n",
            f"{mount}/box/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
        },
    )
    assert limits(tmp_path) == [
        (650, "left of the limit of control group /sys/fs/cgroup/memory/box")
    ]


def test_a_container_that_sees_its_group_as_the_top(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n",
            "proc/self/mountinfo": (
                "31 1 0:26 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
            ),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "400\n",
        },
    )
    assert [num_bytes for num_bytes, _ in limits(tmp_path)] == [600]


@linux_only
def test_this_machine_says_something() -> None:
    found = {f.limit: f.num_bytes for f in free_memory()}
    assert found["available on this machine"] > MB


# Real limits, real processes ----------------------------------------------------------------------

# As `disco worker`: one rank, which must be refused before it meets anybody.
_JOIN = """
import os, resource, sys
from disco.errors import InputError
from disco.runtime import RankProcesses
from disco.runtime.joined import JoinedRank
from disco.runtime.places import Options, Place
folder, how, limit_mb = sys.argv[1:]
def opened(shard):
    raise AssertionError("the shard was loaded")
if int(limit_mb):
    kb = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (kb * 1024 + int(limit_mb) * 10**6, -1))
try:
    if how == "joined":
        with JoinedRank(folder, Place(1, 2, "peers", "tcp", opened), Options()):
            raise AssertionError("it was let in")
    with RankProcesses(folder, threads=1):
        raise AssertionError("they were started")
except InputError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 67 MB a rank."""
    folder = tmp_path_factory.mktemp("large") / "out"
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(512, 65536, bias=False))
    api.partition(model.eval(), (torch.zeros(1, 3, 8, 8),), nodes=2).save(folder, {})
    return folder


def refusal(command: Sequence[str], folder: Path, *more: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(
        [*command, sys.executable, "-c", _JOIN, str(folder), *more],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@linux_only
def test_a_real_limit_of_addresses(large: Path) -> None:
    text = refusal([], large, "joined", "100")
    assert text.startswith("rank 1 needs 67."), text
    assert "for its file while loading" in text and "of this process's address space" in text


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 200 MB; a process of Python and torch takes some 150."""
    version_1 = Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / (
        f"disco-test-{secrets.token_hex(4)}"
    )
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        limit = group / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")
        try:
            limit.write_text(str(200 * MB))
        except OSError as error:
            pytest.skip(f"no control group of memory can be limited here: {error}")
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """A group stays busy for a moment after its last process."""
    for _ in range(50):
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.1)


@linux_only
def test_a_real_control_group(large: Path, small_group: Path) -> None:
    enter = ["sh", "-c", f'echo $$ > {small_group}/cgroup.procs; exec "$@"', "sh"]
    text = refusal(enter, large, "joined", "0")
    assert text.startswith("rank 1 needs 67."), text
    assert f"left of the limit of control group {small_group}" in text
    text = refusal(enter, large, "processes", "0")
    assert text.startswith("2 ranks on one machine need 43"), text
