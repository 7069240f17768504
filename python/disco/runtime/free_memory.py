"""How much memory this process can still take, and what limits it. Read from Linux's /proc and
control groups; other systems do not say, and then there is nothing to compare with.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2_FILES = ("memory.max", "memory.current", "inactive_file")


@dataclass(frozen=True)
class FreeMemory:
    """What is left under one limit.

    Attributes:
        num_bytes: that can be taken before it is reached, at least 0.
        limit: what it is, for messages.
        of_process: it is this process's alone, and mapped files count in full (RLIMIT_AS).
    """

    num_bytes: int
    limit: str
    of_process: bool = False


def free_memory(root: Path = Path("/")) -> list[FreeMemory]:
    """What is left under every limit that there is: of the machine, of the control groups that this
    process is in, of its address space. Empty where the system does not say.

    Args:
        root: under which /proc and the mount points of control groups lie.
    """
    found = [*_of_machine(root), *_of_control_groups(root), *_of_address_space(root)]
    return [FreeMemory(max(0, f.num_bytes), f.limit, f.of_process) for f in found]


def _of_machine(root: Path) -> Iterator[FreeMemory]:
    """MemAvailable: what can be had without swapping, the file cache included."""
    available_kb = _field(root / "proc/meminfo", "MemAvailable:")
    if available_kb is not None:
        yield FreeMemory(1024 * available_kb, "available on this machine")


def _of_control_groups(root: Path) -> Iterator[FreeMemory]:
    """A limit of a group counts for all groups in it, so those above are looked at, too."""
    for mount, group, names in _mounted_groups(root):
        folder = mount / group.lstrip("/")
        for place in (folder, *folder.parents):
            free = _left_in(place, *names)
            if free is not None:
                yield FreeMemory(free, f"left of the limit of control group {_shown(place, root)}")
            if place == mount:
                break


def _mounted_groups(root: Path) -> Iterator[tuple[Path, str, tuple[str, str, str]]]:
    """Where memory groups are mounted, which of them this process is in, and names of files."""
    mine: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, group = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            mine["cgroup2" if number == "0" else "cgroup"] = group
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind not in mine or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top, mounted_at = before.split(" ")[3:5]
        # A container sees its own group as the top, and may be told of it by its outer name.
        group = mine[kind].removeprefix(top) if top != "/" else mine[kind]
        names = _V2_FILES if kind == "cgroup2" else _V1_FILES
        yield root / mounted_at.lstrip("/"), group, names


def _left_in(folder: Path, limit_file: str, usage_file: str, cache_field: str) -> int | None:
    """Bytes below a group's limit, the file cache that it can drop included; None for no limit."""
    limit, usage = _number(folder / limit_file), _number(folder / usage_file)
    if limit is None or usage is None:
        return None
    return limit - usage + (_field(folder / "memory.stat", cache_field) or 0)


def _of_address_space(root: Path) -> Iterator[FreeMemory]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used_kb = _field(root / "proc/self/status", "VmSize:")
    if limit != resource.RLIM_INFINITY and used_kb is not None:
        left = limit - 1024 * used_kb
        yield FreeMemory(left, "left of this process's address space (ulimit -v)", True)


def _shown(place: Path, root: Path) -> str:
    return os.fspath(Path("/") / place.relative_to(root))


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no file, or "max", or a number that stands for it."""
    text = "".join(_lines(path)).strip()
    # Version 1 says that there is no limit by the largest multiple of the page size in 63 bits.
    return int(text) if text.isdigit() and int(text) < math.ldexp(1, 62) else None


def _field(path: Path, name: str) -> int | None:
    """The number after `name` at the beginning of a line."""
    for line in _lines(path):
        words = line.split()
        if words[:1] == [name]:
            return int(words[1])
    return None


def _lines(path: Path) -> list[str]:
    """Of a file of the system; none where it does not exist or may not be read."""
    try:
        return path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
