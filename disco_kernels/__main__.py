"""``python -m disco_kernels``: what is there, what is not, and why. Works on any machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

import torch

from disco_kernels import registry
from disco_kernels.backends.cpu import extension_status


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process (Linux); more than one compete for the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    pattern = re.compile(r"(/\S*lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*)")
    return sorted(set(pattern.findall(maps.read_text(encoding="utf-8", errors="replace"))))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))
        if match:
            return match.group(1)
    return platform.processor() or platform.machine()


_OPTIONAL = {"triton": "installed", "cupy": "installed, not used by this release"}


def _backends(device: torch.device) -> list[str]:
    """Which backends serve float32 there, why others do not, and which is chosen."""
    where = "in CPU memory" if device.type == "cpu" else f"on {torch.cuda.get_device_name(device)}"
    variable = os.environ.get(registry.BACKEND_VARIABLE) or "not set"
    lines = [f"backends for float32 tensors {where} ({registry.BACKEND_VARIABLE}={variable}):"]
    for name in registry.names():
        reason = registry.refusal(name, device, torch.float32)
        lines.append(f"  {name:<10} {'available' if reason is None else reason}")
    try:
        chosen = registry.resolve(None, device, torch.float32)
    except registry.BackendUnavailable as error:
        chosen = f"none: {error}"
    return [*lines, f"chosen: {chosen}"]


def report() -> str:
    status = extension_status()
    lines = [
        f"disco-kernels {_version('disco-kernels')}",
        f"python        {sys.version.split()[0]} on {platform.system()} {platform.machine()}",
        f"processor     {_cpu_model()} ({os.cpu_count()} cores)",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads",
        f"extension     {status.path or 'none'}",
        f"instructions  {status.isa or 'none'} in use; usable here: "
        f"{', '.join(status.available_isas) or 'none'} (DISCO_KERNELS_ISA forces one)",
        f"openmp        {', '.join(openmp_runtimes()) or 'none loaded, or not to be seen here'}",
        "",
    ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    for device in devices:
        lines += _backends(device)
    lines.append("")
    for package in _OPTIONAL:
        found = importlib.util.find_spec(package) is not None
        state = _OPTIONAL[package] if found else "not installed"
        lines.append(f"optional: {package:<8} {state}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
