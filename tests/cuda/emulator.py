"""The CUDA device code, compiled for the CPU: a launcher for tensors in CPU memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from ctypes import Structure
from pathlib import Path

import pytest
import torch

from disco_kernels.cuda import device as devices

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the emulation with")
_OUTCOMES = {1: "no such kernel", 2: "arguments of another size", 3: "a barrier that not all met"}
# Where alignment, shifts or signed sums go wrong, the process is ended by a trap.
_FLAGS = (
    *("-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
)


class EmulatedLauncher:
    """Launches on the CPU, and counts them by kernel."""

    name = "emulated"

    def __init__(self, folder: Path) -> None:
        assert COMPILER is not None
        library = folder / "libdisco_emulation.so"
        source = ROOT / "tests" / "cuda" / "emulation.cpp"
        command = [
            COMPILER,
            *_FLAGS,
            f"-I{ROOT / 'csrc' / 'cuda'}",
            str(source),
            "-o",
            str(library),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self._emulate = ctypes.CDLL(str(library)).disco_emulate
        self._emulate.argtypes = [ctypes.c_char_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t]
        self.launched: list[str] = []

    def launch(
        self, kernel: str, blocks: int, args: Structure, device: torch.device, stream: int
    ) -> None:
        assert device.type == "cpu" and blocks > 0
        size = ctypes.sizeof(args)
        outcome = self._emulate(kernel.encode(), blocks, ctypes.addressof(args), size)
        assert outcome == 0, f"{kernel}: {_OUTCOMES[outcome]}"
        self.launched.append(kernel)


@contextmanager
def cpu_as_device(processors: int = 3) -> Iterator[None]:
    """CPU tensors are taken for those of a device with so many multiprocessors."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(devices, "multiprocessors", lambda device: processors)
        patched.setattr(devices, "current", lambda device: nullcontext())
        patched.setattr(devices, "stream_of", lambda device: 0)
        patched.setattr(devices, "capturing", lambda: False)
        yield
