"""Kernels compiled by CuPy's NVRTC at first use, on torch's streams and tensors' memory.

CuPy's own cache, allocator and streams are not used: kernels are kept by `cubin_cache`, arguments
are addresses, and the launch takes the stream as torch has it (`cupy.cuda.ExternalStream`, which
would wrap it, may go in CuPy 15).
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
from ctypes import Structure
from pathlib import Path
from typing import Any

import torch

from disco_kernels.cuda.arguments import THREADS
from disco_kernels.cuda.cubin_cache import cached
from disco_kernels.cuda.sources import ROOT_SOURCE, digest, read_sources

_FLAGS = ("-std=c++17",)


class CupyLauncher:
    """Raises RuntimeError, saying what to install, where CuPy or its NVRTC does not load."""

    name = "cupy"

    def __init__(self) -> None:
        self._cupy = _import_cupy()
        self._lock = threading.Lock()
        self._modules: dict[int, Any] = {}
        self._kernels: dict[tuple[int, str], tuple[Any, int]] = {}

    def launch(
        self, kernel: str, blocks: int, args: Structure, device: torch.device, stream: int
    ) -> None:
        index = device.index
        if not self._cupy.cuda.driver.ctxGetCurrent():  # a thread that never used CUDA
            self._cupy.cuda.runtime.setDevice(index)
        _, function = self._kernels.get((index, kernel)) or self._kernel(index, kernel)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        address = ctypes.addressof(pointers)
        self._cupy.cuda.driver.launchKernel(
            function, blocks, 1, 1, THREADS, 1, 1, 0, stream, address, 0
        )

    def _kernel(self, index: int, kernel: str) -> tuple[Any, int]:
        """A raw kernel, which keeps its module loaded, and its CUfunction."""
        with self._lock:
            if index not in self._modules:
                major, minor = torch.cuda.get_device_capability(index)
                self._modules[index] = load(self._cupy, compiled(self._cupy, major, minor))
            raw = self._modules[index].get_function(kernel)
            self._kernels[index, kernel] = (raw, raw.kernel.ptr)
            return self._kernels[index, kernel]


def _import_cupy() -> Any:
    try:
        import cupy

        cupy.cuda.nvrtc.getVersion()  # it is loaded at its first call
    except Exception as error:
        raise RuntimeError(
            "CUDA kernels cannot be compiled: CuPy or its NVRTC does not load "
            f"({type(error).__name__}: {error}); install the cupy package for this CUDA, for "
            "instance cupy-cuda13x, and nvidia-cuda-nvrtc"
        ) from error
    return cupy


def compiled(cupy: Any, major: int, minor: int) -> bytes:
    """The machine code for a compute capability, or for the newest one below that NVRTC knows."""
    nvrtc = cupy.cuda.nvrtc
    known = [arch for arch in nvrtc.getSupportedArchs() if arch <= 10 * major + minor]
    if not known:
        raise RuntimeError(
            f"NVRTC {nvrtc.getVersion()} compiles for no compute capability of {major}.{minor} or "
            "less: install an older cupy"
        )
    # Machine code runs on newer devices of the same major number, PTX on all newer ones.
    newest = max(known)
    kind = "sm" if newest // 10 == major else "compute"
    flags = (*_FLAGS, f"-arch={kind}_{newest}")
    sources = read_sources()
    version = ".".join(map(str, nvrtc.getVersion()))
    key = f"{kind}_{newest}-{digest(sources, version, *flags)}"
    return cached(key, lambda: compile_sources(nvrtc, sources, flags))


def compile_sources(nvrtc: Any, sources: dict[str, str], flags: tuple[str, ...]) -> bytes:
    """Machine code, or PTX for a "compute" architecture. RuntimeError with the compiler's words."""
    included = {
        name.encode(): text.encode() for name, text in sources.items() if name != ROOT_SOURCE
    }
    program = nvrtc.createProgram(
        sources[ROOT_SOURCE], ROOT_SOURCE, list(included.values()), list(included)
    )
    try:
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError as error:
            said = nvrtc.getProgramLog(program)
            raise RuntimeError(f"the CUDA kernels do not compile ({error}):\n{said}") from error
        as_ptx = any("compute_" in flag for flag in flags)
        made = nvrtc.getPTX(program) if as_ptx else nvrtc.getCUBIN(program)
        return bytes(made) if isinstance(made, bytes) else str(made).encode()
    finally:
        nvrtc.destroyProgram(program)


def load(cupy: Any, code: bytes) -> Any:
    """A `cupy.RawModule` of machine code or PTX, loaded on the current device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disco_kernels.cubin"
        path.write_bytes(code)
        module = cupy.RawModule(path=str(path))
        module.compile()  # loads it: the file may go
    return module
