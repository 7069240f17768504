"""Nothing outlives a lab, however its process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

_OPEN = """
import sys, time
from disco.bench.lab import Lab, Loopback
kind, marker = sys.argv[1:]
with (Lab(2, "10mbit") if kind == "lab" else Loopback(2)) as lab:
    orphan = f"(exec -a {marker} sleep 100) & exec -a {marker} sleep 100"
    daemon = f"setsid bash -c 'exec -a {marker} sleep 100' & " if kind == "lab" else ""
    for rank in range(2):
        lab.popen(rank, ["bash", "-c", daemon + orphan])
    print("open", flush=True)
    time.sleep(100)
"""


def marked(marker: str) -> list[int]:
    """Processes with `marker` as their name."""
    return [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if _read(folder / "cmdline").split(b"\0")[0] == marker.encode()
    ]


def children_of(pid: int) -> set[int]:
    """All descendants."""
    parents = {
        int(folder.name): int(stat.rpartition(b")")[2].split()[1])
        for folder in Path("/proc").glob("[0-9]*")
        if (stat := _read(folder / "stat"))
    }
    found, level = set(), {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found |= level
    return found


def namespaces(pids: set[int] | None = None) -> set[str]:
    """Network namespaces of some processes, or of all."""
    folders = Path("/proc").glob("[0-9]*") if pids is None else [Path(f"/proc/{p}") for p in pids]
    found = set()
    for folder in folders:
        try:
            found.add(os.readlink(folder / "ns/net"))
        except OSError:
            continue  # it has ended
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it has ended


def eventually(holds: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def host() -> tuple[list[str], list[str]]:
    """What a lab must not change: the machine's interfaces, and its namespaces with names."""
    named = Path("/run/netns")
    return (
        sorted(os.listdir("/sys/class/net")),
        sorted(os.listdir(named)) if named.exists() else [],
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.usefixtures("lab_rights")
def test_nothing_is_left(number: signal.Signals) -> None:
    _check_nothing_left("lab", number, processes=6)


def test_nothing_is_left_on_loopback() -> None:
    _check_nothing_left("loopback", signal.SIGKILL, processes=4)


def _check_nothing_left(kind: str, number: signal.Signals, processes: int) -> None:
    marker = f"lab-test-{os.getpid()}-{kind}-{number.name}"
    before = host()
    with subprocess.Popen(
        [sys.executable, "-c", _OPEN, kind, marker], stdout=subprocess.PIPE, text=True
    ) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "open\n"
            assert eventually(lambda: len(marked(marker)) == processes), marked(marker)
            descendants = children_of(owner.pid)
            made = namespaces(descendants) - namespaces({os.getpid()})
            assert len(made) == (3 if kind == "lab" else 0)
            owner.send_signal(number)
            owner.wait(20)
            assert eventually(lambda: not marked(marker)), "a command outlives the lab"
            assert eventually(lambda: not made & namespaces()), "a namespace is still held"
            assert eventually(
                lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in descendants)
            ), "a process outlives the lab"
        finally:
            owner.kill()
    assert host() == before
