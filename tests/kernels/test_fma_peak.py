"""The register loop that peaks are measured with: that it runs, and that nothing was left out."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from disco_kernels.backends.cpu import extension_status
from tests.kernels.process import ROOT, python

STATUS = extension_status()
pytestmark = pytest.mark.skipif(STATUS.error is not None, reason=f"no extension: {STATUS.error}")

CHAINS = 12
FLAGS = {"avx2": "-mavx2 -mfma", "avx512": "-mavx512f -mfma"}


def test_every_instruction_set_has_a_peak() -> None:
    code = "import torch, disco_kernels._C as c; print(c.isa(), c.fma_peak_gflops(2))"
    for isa in STATUS.available_isas:
        done = python("-c", code, environment={"DISCO_KERNELS_ISA": isa})
        assert done.returncode == 0, done.stderr
        name, peak = done.stdout.split()
        assert name == isa and float(peak) > 0


@pytest.mark.parametrize("isa", FLAGS)
def test_the_compiler_keeps_every_chain(isa: str) -> None:
    """Merged chains would count multiply-adds that nobody computes."""
    compiler = shutil.which("g++")
    if compiler is None or isa not in STATUS.available_isas or not (ROOT / "csrc").is_dir():
        pytest.skip(f"needs g++, the sources and {isa}")
    built = subprocess.run(
        [
            *(compiler, "-std=c++17", "-O3", "-fPIC", "-Icsrc", *FLAGS[isa].split()),
            *("-S", f"csrc/cpu/fma_peak_{isa}.cpp", "-o", "-"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    wide = {"avx2": "ymm", "avx512": "zmm"}[isa]
    found = re.findall(rf"vfn?m(?:add|sub)\w*ps\s.*%{wide}", built.stdout)
    # One pass through the loop, or several if the compiler unrolled it.
    assert len(found) >= CHAINS and len(found) % CHAINS == 0, found
    shared = re.findall(r"^\s*\.(?:globl|weak)\s+(\S+)", built.stdout, re.MULTILINE)
    assert len(shared) == 1 and f"{isa}_fma_loop" in shared[0], shared
