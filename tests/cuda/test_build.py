"""The device code as compilers see it, and when the build takes it along."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from disco_kernels.cuda import sources
from disco_kernels.cuda.arguments import MAX_PART_CHANNELS, MAX_PARTS, THREADS
from tests.kernels.process import ROOT

NVCC = shutil.which("nvcc")
CMAKE = shutil.which("cmake")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_cmake = pytest.mark.skipif(
    CMAKE is None or importlib.util.find_spec("pybind11") is None,
    reason="no cmake or no pybind11 to configure a build with",
)
DEVICE_CODE = sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_kernel_spills(arch: str, tmp_path: Path) -> None:
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v,-warn-spills"]
    source = ROOT / "csrc" / "cuda" / "kernels.cu"
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "cubin"), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert len(kernels) == done.stderr.count(clean) == 57, done.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    # 65536 registers hold four blocks of 256 threads (disco_kernels/cuda/tiles.py counts on them)
    # of at most 64; only int8 from single channels, with 16 loads under way a thread, takes more.
    assert len(registers) == 57 and sum(count > 64 for count in registers) <= 3
    assert max(registers) <= 85  # three blocks


@needs_nvcc
def test_the_convolutions_for_hopper_do_not_spill(tmp_path: Path) -> None:
    """And multiply on its tensor cores what its copy engine brings."""
    command = [str(NVCC), "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a"]
    command += [f"-I{ROOT / 'csrc'}", "-Xptxas", "-v,-warn-spills", "--keep"]
    source = ROOT / "csrc" / "cuda" / "conv2d_sm90.cu"
    done = subprocess.run(
        [*command, f"--keep-dir={tmp_path}", "-cubin", "-o", str(tmp_path / "cubin"), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    assert "serialized" not in done.stderr, done.stderr  # products that wait for each other
    clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    kernels = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    assert len(kernels) == done.stderr.count(clean) == 16, done.stderr
    ptx = next(tmp_path.glob("*.ptx")).read_text(encoding="utf-8")
    assert ptx.count("wgmma.mma_async") > 16
    assert ptx.count("cp.async.bulk.tensor.4d") > 16


def test_device_code_includes_only_itself() -> None:
    """NVRTC has no headers of the host, of C++ or of CUDA."""
    names = {path.name for path in DEVICE_CODE}
    assert "kernels.cuh" in names and len(names) > 4
    for path in DEVICE_CODE:
        text = path.read_text(encoding="utf-8")
        included = re.findall(r"^\s*#\s*include\s+(\S+)", text, re.MULTILINE)
        assert set(included) <= {f'"{name}"' for name in names}, path.name
        assert "std::" not in text, path.name


def test_constants_are_those_of_the_device_code() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in DEVICE_CODE)
    for name, value in (
        ("kMaxParts", MAX_PARTS),
        ("kMaxPartChannels", MAX_PART_CHANNELS),
        ("kThreads", THREADS),
    ):
        assert f"constexpr u32 {name} = {value};" in text
    assert f"__launch_bounds__({THREADS})" in text


def test_sources_are_found_and_named_by_their_content() -> None:
    found = sources.read_sources()
    assert set(found) == {path.name for path in DEVICE_CODE}
    name = sources.digest(found, "13.0", "-arch=sm_90")
    assert name == sources.digest(dict(reversed(found.items())), "13.0", "-arch=sm_90")
    changed = {**found, "pack.cuh": found["pack.cuh"] + " "}
    others = [
        sources.digest(changed, "13.0", "-arch=sm_90"),
        sources.digest(found, "13.1", "-arch=sm_90"),
        sources.digest(found, "13.0", "-arch=sm_80"),
        sources.digest(found, "13.0-arch=sm_90"),
    ]
    assert len({name, *others}) == 5


def test_missing_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_FOLDERS", (tmp_path / "here", tmp_path / "there"))
    with pytest.raises(RuntimeError, match=r"no kernels\.cuh in .*here and .*there; install again"):
        sources.read_sources()


def configure(folder: Path, *settings: str, **variables: str) -> tuple[int, str]:
    """CMake's exit status and output."""
    assert CMAKE is not None
    import pybind11

    cleaned = {k: v for k, v in os.environ.items() if not k.startswith(("DISCO_", "CUDA"))}
    command = [
        CMAKE,
        *("-S", str(ROOT), "-B", str(folder)),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DSKBUILD_PROJECT_VERSION=0.0",
        *settings,
    ]
    environment = {**cleaned, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def fake_nvcc(folder: Path) -> Path:
    folder.mkdir()
    nvcc = folder / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: none of your business' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    return nvcc


@needs_cmake
def test_a_broken_nvcc_is_passed_over_unless_cuda_is_forced(tmp_path: Path) -> None:
    nvcc = str(fake_nvcc(tmp_path / "bin"))
    code, said = configure(tmp_path / "a", CUDACXX=nvcc)
    assert code == 0 and "Without CUDA kernels: there is no nvcc that works" in said, said
    code, said = configure(tmp_path / "b", CUDACXX=nvcc, DISCO_KERNELS_FORCE_CUDA="1")
    assert code != 0 and "DISCO_KERNELS_FORCE_CUDA=1, but there is no nvcc that works" in said, said


@needs_cmake
@needs_nvcc
def test_cuda_is_built_where_nvcc_is_and_can_be_left_out(tmp_path: Path) -> None:
    code, said = configure(tmp_path / "b", DISCO_KERNELS_FORCE_CUDA="1")
    assert code == 0 and "Without CUDA" not in said, said
    flags = (tmp_path / "b" / "CMakeFiles" / "disco_cuda.dir" / "flags.make").read_text()
    for code_for in ("code=[sm_80]", "code=[compute_90,sm_90]"):
        assert code_for in flags, flags
    code, said = configure(tmp_path / "a", DISCO_KERNELS_SKIP_CUDA="1")
    assert code == 0 and "Without CUDA kernels: DISCO_KERNELS_SKIP_CUDA=1" in said, said
    assert "disco_cuda" not in (tmp_path / "a" / "Makefile").read_text()


@needs_cmake
@needs_nvcc
def test_an_nvcc_that_cannot_build_the_kernels(tmp_path: Path) -> None:
    """Compute capability 9.9 stands for one that the compiler does not know."""
    unknown = "-DCMAKE_CUDA_ARCHITECTURES=99"
    code, said = configure(tmp_path / "a", unknown)
    assert code == 0 and "Without CUDA kernels" in said, said
    code, said = configure(tmp_path / "b", unknown, DISCO_KERNELS_FORCE_CUDA="1")
    assert code != 0 and "DISCO_KERNELS_FORCE_CUDA=1, but" in said, said
