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
        "backends for float32 tensors in CPU memory "
        f"({registry.BACKEND_VARIABLE}={os.environ.get(registry.BACKEND_VARIABLE) or 'not set'}):",
    ]
    cpu = torch.device("cpu")
    for name in registry.names():
        reason = registry.refusal(name, cpu, torch.float32)
        lines.append(f"  {name:<10} {'available' if reason is None else reason}")
    try:
        chosen = registry.resolve(None, cpu, torch.float32)
    except registry.BackendUnavailable as error:
        chosen = f"none: {error}"
    lines.append(f"chosen: {chosen}")
    lines.append("")
    for package in ("triton", "cupy"):
        found = importlib.util.find_spec(package) is not None
        state = "installed, not used by this release" if found else "not installed"
        lines.append(f"optional: {package:<8} {state}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
