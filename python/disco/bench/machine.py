"""What was measured on, when, and by which command."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from importlib import metadata
from typing import Any

from disco.runtime.rank_processes import available_cores

_PACKAGES = ("disco-kernels", "torch", "torchvision")


def describe_machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, system, versions, date (UTC) and command, for results.

    Args:
        packages: whose versions matter beside those of disco-kernels, torch and torchvision.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": shlex.join(["disco", *sys.argv[1:]]),
        "processor": _processor(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in (*_PACKAGES, *packages)},
        },
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
