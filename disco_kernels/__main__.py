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
from disco_kernels.cuda.launcher import builtin_refusal


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


_OPTIONAL = {
    "triton": "installed",
    "cupy": "installed; compiles the CUDA kernels where the extension has none",
}


def _backends(device: torch.device) -> list[str]:
    """Which backends serve float32 there, why others do not, and which is chosen."""
    where = "in CPU memory" if device.type == "cpu" else f"on {torch.cuda.get_device_name(device)}"
    variable = os.environ.get(registry.BACKEND_VARIABLE) or "not set"
    lines = [f"backends for float32 tensors {where} ({registry.BACKEND_VARIABLE}={variable}):"]
    lines += [f"  {name:<10} {_state(name, device)}" for name in registry.names()]
    chosen, for_messages = _chosen(device, "layer"), _chosen(device, "gather_pack")
    lines.append(f"chosen: {chosen}")
    if for_messages != chosen:
        lines.append(f"chosen for gather_pack: {for_messages}")
    return lines


def _state(name: str, device: torch.device) -> str:
    """Of a backend: available, for what alone, or why not."""
    reason = registry.refusal(name, device, torch.float32)
    if reason is None:
        return "available"
    for_messages = registry.refusal(name, device, torch.float32, "gather_pack")
    return for_messages or "gather_pack only"


def _chosen(device: torch.device, work: registry.Work) -> str:
    try:
        return registry.resolve(None, device, torch.float32, work)
    except registry.BackendUnavailable as error:
        return f"none: {error}"


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
        f"cuda kernels  {builtin_refusal() or 'built into the extension'}",
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
