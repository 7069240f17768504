"""What a process holds in memory."""

from __future__ import annotations

from pathlib import Path


def resident_kb(process: int | str = "self") -> int:
    """Of a process id, or of this one."""
    text = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS"))
