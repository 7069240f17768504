"""The register loop that peaks are measured with: that it runs, and that nothing was left out."""

from __future__ import annotations

import re

import pytest

from disco_kernels.backends.cpu import extension_status
from tests.kernels.process import ROOT, python
from tests.kernels.toolchains import TARGETS, compile_source

STATUS = extension_status()
pytestmark = pytest.mark.skipif(STATUS.error is not None, reason=f"no extension: {STATUS.error}")

CHAINS = 12


def test_every_instruction_set_has_a_peak() -> None:
    code = "import torch, disco_kernels._C as c; print(c.isa(), c.fma_peak_gflops(2))"
    for isa in STATUS.available_isas:
        done = python("-c", code, environment={"DISCO_KERNELS_ISA": isa})
        assert done.returncode == 0, done.stderr
        name, peak = done.stdout.split()
        assert name == isa and float(peak) > 0


@pytest.mark.parametrize("isa", TARGETS)
def test_the_compiler_keeps_every_chain(isa: str) -> None:
    """Merged chains would count multiply-adds that nobody computes."""
    target = TARGETS[isa]
    compiler = target.tool("g++")
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip(f"needs g++ for {target.machine} and the sources")
    source = f"csrc/cpu/fma_peak_{isa}.cpp"
    assembly = compile_source(compiler, target, source, "-O3", "-S", "-o", "-")
    found = re.findall(target.multiply_add, assembly)
    # One pass through the loop, or several if the compiler unrolled it.
    assert len(found) >= CHAINS and len(found) % CHAINS == 0, found
    shared = re.findall(r"^\s*\.(?:globl|global|weak)\s+(\S+)", assembly, re.MULTILINE)
    assert len(shared) == 1 and f"{isa}_fma_loop" in shared[0], shared
