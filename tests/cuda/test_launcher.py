"""Who launches, and what is said where nobody can. CuPy is a stand-in but for one test."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from disco_kernels.backends import cpu
from disco_kernels.cuda import cupy_launcher, launcher
from disco_kernels.cuda.arguments import MagnitudeArgs, PackArgs, WidenArgs
from disco_kernels.cuda.cubin_cache import CACHE_VARIABLE
from disco_kernels.cuda.cupy_launcher import CupyLauncher, compiled
from disco_kernels.cuda.launcher import LAUNCHER_VARIABLE, get_launcher, launcher_refusal
from disco_kernels.cuda.sources import read_sources

DEVICE = torch.device("cuda", 1)
BUILTIN = cpu._C if hasattr(cpu._C, "cuda_launch") else None
needs_builtin = pytest.mark.skipif(BUILTIN is None, reason="the extension has no CUDA part")
_PACK_BYTES = ctypes.sizeof(PackArgs)


class FakeCupy:
    """As much of CuPy as the launcher uses; remembers what it was asked for."""

    def __init__(self, archs: tuple[int, ...] = (75, 80, 90), context: int = 0) -> None:
        self.archs, self.context = archs, context
        self.compiled: list[tuple[str, ...]] = []
        self.loaded: list[bytes] = []
        self.devices: list[int] = []
        self.launched: list[tuple[Any, ...]] = []
        self.fails = False
        self.cuda = SimpleNamespace(
            nvrtc=SimpleNamespace(
                NVRTCError=ArithmeticError,
                getVersion=lambda: (13, 0),
                getSupportedArchs=lambda: self.archs,
                createProgram=self.create,
                compileProgram=self.compile,
                getProgramLog=lambda program: "kernels.cuh(7): error: no such thing",
                getCUBIN=lambda program: b"machine code",
                getPTX=lambda program: b"PTX",
                destroyProgram=lambda program: None,
            ),
            driver=SimpleNamespace(
                ctxGetCurrent=lambda: self.context, launchKernel=self.launch_kernel
            ),
            runtime=SimpleNamespace(setDevice=self.devices.append),
        )

    def create(self, text: str, name: str, headers: list[bytes], names: list[bytes]) -> int:
        assert name == "kernels.cuh" and "DISCO_PACK_KERNELS" in text
        assert b"pack.cuh" in names and len(headers) == len(names)
        assert all(isinstance(one, bytes) for one in (*headers, *names))
        return 1

    def compile(self, program: int, flags: tuple[str, ...]) -> None:
        if self.fails:
            raise ArithmeticError("compilation")
        self.compiled.append(flags)

    def RawModule(self, path: str) -> SimpleNamespace:
        self.loaded.append(Path(path).read_bytes())
        raw = SimpleNamespace(kernel=SimpleNamespace(ptr=77))
        return SimpleNamespace(compile=lambda: None, get_function=lambda name: raw)

    def launch_kernel(self, *arguments: Any) -> None:
        function, *geometry, shared, stream, pointers, extra = arguments
        address = ctypes.c_void_p.from_address(pointers).value
        assert address is not None and shared == extra == 0
        given = ctypes.string_at(address, _PACK_BYTES)
        self.launched.append((function, tuple(geometry), stream, given))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeCupy:
    made = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", made)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(launcher, "_made", {})
    monkeypatch.setattr(launcher, "cupy_refusal", lambda: None)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(LAUNCHER_VARIABLE, raising=False)
    return made


def without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_extension", lambda: SimpleNamespace())


def test_cupy_compiles_once_and_launches_on_the_given_stream(fake: FakeCupy) -> None:
    args = PackArgs()
    args.num_pixels, args.tile_pixels = 12345, 67
    launched = CupyLauncher()
    for _ in range(3):
        launched.launch("disco_pack_f32_f32_1", 8, args, DEVICE, 4242)
    assert fake.compiled == [("-std=c++17", "-arch=sm_90")] and fake.loaded == [b"machine code"]
    assert fake.launched == [(77, (8, 1, 1, 256, 1, 1), 4242, bytes(args))] * 3
    assert fake.devices == [1] * 3  # this thread has no context
    fake.context = 1
    launched.launch("disco_pack_f32_f32_1", 8, args, DEVICE, 0)
    assert len(fake.devices) == 3
    CupyLauncher().launch("disco_pack_f32_f32_1", 8, args, DEVICE, 0)
    assert len(fake.compiled) == 1 and len(fake.loaded) == 2, "read from the cache"


@pytest.mark.parametrize(
    ("archs", "capability", "flag", "code"),
    [
        ((75, 80, 90), (8, 9), "-arch=sm_80", b"machine code"),
        ((80, 90, 100, 103, 120), (10, 3), "-arch=sm_103", b"machine code"),
        ((75, 80, 90), (12, 0), "-arch=compute_90", b"PTX"),
    ],
)
def test_the_newest_code_that_the_device_runs(
    fake: FakeCupy, archs: tuple[int, ...], capability: tuple[int, int], flag: str, code: bytes
) -> None:
    fake.archs = archs
    assert compiled(fake, *capability) == code
    assert fake.compiled == [("-std=c++17", flag)]


def test_what_cannot_be_compiled_is_said(fake: FakeCupy, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"for no compute capability of 7\.0 or less"):
        compiled(fake, 7, 0)
    fake.fails = True
    with pytest.raises(RuntimeError, match=r"do not compile.*\n.*error: no such thing"):
        compiled(fake, 9, 0)
    assert not list(tmp_path.glob("*.cubin"))


def test_a_cupy_that_does_not_load(fake: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[int, int]:
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    fake.cuda.nvrtc.getVersion = broken
    without_nvcc(monkeypatch)
    reason = launcher_refusal()
    assert reason is not None
    for part in ("built without nvcc", "libnvrtc.so.13", "install the cupy package"):
        assert part in reason, reason


def test_the_extension_goes_before_cupy(fake: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    extension = SimpleNamespace(cuda_launch=lambda *given: calls.append(given))
    monkeypatch.setattr(launcher, "_extension", lambda: extension)
    assert launcher_refusal() is None and get_launcher().name == "builtin"
    args = PackArgs()
    get_launcher().launch("disco_pack_f32_f32_1", 8, args, DEVICE, 4242)
    assert calls == [("disco_pack_f32_f32_1", 8, ctypes.addressof(args), _PACK_BYTES, 1, 4242)]
    monkeypatch.setenv(LAUNCHER_VARIABLE, "cupy")
    assert get_launcher().name == "cupy" and get_launcher() is get_launcher()
    monkeypatch.delenv(LAUNCHER_VARIABLE)
    without_nvcc(monkeypatch)
    monkeypatch.setattr(launcher, "_made", {})
    assert launcher_refusal() is None and get_launcher().name == "cupy"


def test_reasons_where_there_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_made", {})
    monkeypatch.delenv(LAUNCHER_VARIABLE, raising=False)
    missing = "the package cupy is not installed: pip install cupy-cuda13x"
    monkeypatch.setattr(launcher, "cupy_refusal", lambda: missing)
    without_nvcc(monkeypatch)
    assert launcher_refusal() == f"the extension was built without nvcc, and {missing}"
    monkeypatch.setenv(LAUNCHER_VARIABLE, "builtin")
    assert launcher_refusal() == "the extension was built without nvcc"
    monkeypatch.setenv(LAUNCHER_VARIABLE, "nonsense")
    assert launcher_refusal() == f"{LAUNCHER_VARIABLE} is one of builtin, cupy, given 'nonsense'"
    with pytest.raises(ValueError, match="is one of builtin, cupy, given 'nonsense'"):
        get_launcher()
    with pytest.raises(ValueError, match="is one of builtin, cupy, given 'other'"):
        get_launcher("other")


@needs_builtin
def test_the_extension_has_every_kernel_with_these_arguments() -> None:
    assert BUILTIN is not None
    kernels = BUILTIN.cuda_kernels()
    assert len(kernels) == len(set(kernels)) == 57
    sizes = {"pack": PackArgs, "magnitudes": MagnitudeArgs, "widen": WidenArgs}
    for kernel in kernels:
        with pytest.raises(ValueError, match=rf"{kernel} takes \d+ bytes .*: build it again") as e:
            BUILTIN.cuda_launch(kernel, 1, 0, 1, 0, 0)
        known = sizes.get(kernel.split("_")[1])
        assert known is None or f"takes {ctypes.sizeof(known)} bytes" in str(e.value)
    with pytest.raises(ValueError, match="has no CUDA kernel nonsense: build it again"):
        BUILTIN.cuda_launch("nonsense", 1, 0, 1, 0, 0)


@needs_builtin
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_gpu_is_an_error_and_no_crash() -> None:
    args = PackArgs()
    with pytest.raises(RuntimeError, match="CUDA|device"):
        launcher.BuiltinLauncher(BUILTIN).launch("disco_pack_f32_f32_1", 1, args, DEVICE, 0)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="cupy is not installed")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_nvrtc_compiles_the_sources(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs no GPU."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    code = compiled(cupy_launcher._import_cupy(), *capability)
    names = set(re.findall(rb"\.text\.(disco_\w+)", code))
    assert len(names) == 57 and code[:4] == b"\x7fELF"
    assert set(read_sources()) > {"kernels.cuh"}
