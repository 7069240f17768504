"""Compilers for the instruction sets' files: this machine's own and, if installed, another's."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.process import ROOT


@dataclass(frozen=True)
class Target:
    """How CMakeLists.txt compiles an instruction set's files, and what shows in the result."""

    machine: str
    flags: tuple[str, ...]
    multiply_add: str  # a regular expression of one in assembly, in the widest registers

    def tool(self, name: str) -> str | None:
        """The path of ``g++`` or ``nm`` for this machine, or None."""
        here = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
        native = here == self.machine
        return shutil.which(name if native else f"{self.machine}-linux-gnu-{name}")


TARGETS = {
    "avx2": Target("x86_64", ("-mavx2", "-mfma"), r"vfn?m(?:add|sub)\w*ps\s.*%ymm"),
    "avx512": Target(
        "x86_64",
        ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
        r"vfn?m(?:add|sub)\w*ps\s.*%zmm",
    ),
    "avx512bf16": Target(
        "x86_64",
        ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma"),
        r"vdpbf16ps\s.*%zmm",
    ),
    "avx512vnni": Target(
        "x86_64",
        ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mfma"),
        r"vpdpbusd\s.*%zmm",
    ),
    "neon": Target("aarch64", (), r"fml[as]\s+v\d+\.4s"),
}


def compile_source(compiler: str, target: Target, source: str, *arguments: str | Path) -> str:
    """Compiles a file of the extension as CMakeLists.txt would, and returns what is printed."""
    return subprocess.run(
        [compiler, "-std=c++17", "-fPIC", "-Icsrc", *target.flags, *map(str, arguments), source],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
