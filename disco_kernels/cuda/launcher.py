"""Who launches: the extension, or CuPy with the same sources compiled at first use."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import threading
from ctypes import Structure
from types import ModuleType
from typing import Protocol

import torch

LAUNCHER_VARIABLE = "DISCO_KERNELS_CUDA"
LAUNCHERS = ("builtin", "cupy")


class Launcher(Protocol):
    """Puts kernels of csrc/cuda/kernels.cuh on a stream; safe from several threads."""

    name: str

    def launch(
        self, kernel: str, blocks: int, args: Structure, device: torch.device, stream: int
    ) -> None:
        """Launch; ``args`` is copied, the kernel is not waited for.

        ``device`` has an index and is torch's current one, ``stream`` a cudaStream_t of it.
        """


class BuiltinLauncher:
    """The kernels that nvcc compiled into the extension."""

    name = "builtin"

    def __init__(self, extension: ModuleType) -> None:
        self._launch = extension.cuda_launch

    def launch(
        self, kernel: str, blocks: int, args: Structure, device: torch.device, stream: int
    ) -> None:
        self._launch(
            kernel, blocks, ctypes.addressof(args), ctypes.sizeof(args), device.index, stream
        )


def builtin_refusal() -> str | None:
    """Why the extension launches no CUDA kernel, or None if it does."""
    extension = _extension()
    if extension is None:
        return "the compiled extension is missing or does not load"
    if not hasattr(extension, "cuda_launch"):
        return "the extension was built without nvcc"
    return None


def cupy_refusal() -> str | None:
    """Why CuPy cannot compile the kernels, or None if it can as far as is known.

    Imports nothing.
    """
    if importlib.util.find_spec("cupy") is None:
        return "the package cupy is not installed: pip install cupy-cuda13x"
    return None


def launcher_refusal() -> str | None:
    """Why there is no launcher, or None. For tensors on a GPU: it may import CuPy."""
    try:
        wanted = _wanted()
    except ValueError as error:
        return str(error)
    reasons = []
    for name in (wanted,) if wanted else LAUNCHERS:
        try:
            get_launcher(name)
        except RuntimeError as error:
            reasons.append(str(error))
        else:
            return None
    return ", and ".join(reasons)


_made: dict[str, Launcher] = {}
_lock = threading.Lock()


def get_launcher(name: str | None = None) -> Launcher:
    """The launcher called ``name``, or by default the one that DISCO_KERNELS_CUDA names, else the
    extension if it has CUDA kernels, else CuPy.

    Raises:
        ValueError: no such name.
        RuntimeError: it cannot be had; says why.
    """
    name = name or _wanted() or ("builtin" if builtin_refusal() is None else "cupy")
    with _lock:
        if name not in _made:
            _made[name] = _make(name)
        return _made[name]


def _make(name: str) -> Launcher:
    if name not in LAUNCHERS:
        raise ValueError(f"a launcher is one of {', '.join(LAUNCHERS)}, given {name!r}")
    reason = builtin_refusal() if name == "builtin" else cupy_refusal()
    if reason is not None:
        raise RuntimeError(reason)
    if name == "cupy":
        from disco_kernels.cuda.cupy_launcher import CupyLauncher

        return CupyLauncher()
    extension = _extension()
    assert extension is not None
    return BuiltinLauncher(extension)


def _extension() -> ModuleType | None:
    try:
        return importlib.import_module("disco_kernels._C")
    except ImportError:  # `python -m disco_kernels` says why
        return None


def _wanted() -> str | None:
    name = os.environ.get(LAUNCHER_VARIABLE) or None
    if name is not None and name not in LAUNCHERS:
        raise ValueError(f"{LAUNCHER_VARIABLE} is one of {', '.join(LAUNCHERS)}, given {name!r}")
    return name
