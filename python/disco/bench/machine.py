"""What was measured on: processor, cores, versions."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from disco.runtime.cluster import available_cores


def describe_machine() -> dict[str, Any]:
    """Processor, cores, system and versions, for results."""
    return {
        "processor": _processor(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("disco-kernels", "torch", "torchvision")},
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
