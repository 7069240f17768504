"""Every instruction set that this machine can run, and that none leaks out of its files."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from disco_kernels.backends.cpu import extension_status
from tests.kernels.process import ROOT, python, script

STATUS = extension_status()
pytestmark = pytest.mark.skipif(STATUS.error is not None, reason=f"no extension: {STATUS.error}")

AVX2_FLAGS = "-mavx2 -mfma"
AVX512_FLAGS = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma"
# Source: its flags, and the one function that others see.
ISA_SOURCES = {
    "conv_avx2": (AVX2_FLAGS, "avx2_kernels"),
    "conv_avx512": (AVX512_FLAGS, "avx512_kernels"),
    "message_avx2": (AVX2_FLAGS, "avx2_message_kernels"),
    "message_avx512": (AVX512_FLAGS, "avx512_message_kernels"),
}
# What runs once for each instruction set.
SUITES = ("test_conv2d.py", "test_gather_pack.py", "test_narrow_segments.py", "test_wire.py")


def suite_results(isa: str, tmp_path: Path) -> tuple[str, Counter[str]]:
    """The instruction set that ran, and what became of the suites' tests of the kernels."""
    report = tmp_path / f"{isa}.xml"
    done = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(f"tests/kernels/{suite}" for suite in SUITES),
        *("-k", "cpu", "-m", "not slow", f"--junitxml={report}"),
        environment={"DISCO_KERNELS_ISA": isa},
    )
    assert done.returncode == 0, f"{isa}: {done.stdout[-4000:]}\n{done.stderr}"
    suite = ElementTree.parse(report).getroot()[0]
    ran = suite.find("properties/property[@name='isa']")
    outcomes = Counter(
        case[0].tag if len(case) and case[0].tag != "properties" else "passed"
        for case in suite.iter("testcase")
    )
    return "" if ran is None else ran.attrib["value"], outcomes


def test_the_same_tests_pass_on_every_instruction_set(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The one in use here runs them in this process; the others do in processes of their own."""
    others = [isa for isa in STATUS.available_isas if isa != STATUS.isa]
    if not others:
        pytest.skip(f"this machine runs only {STATUS.available_isas}")
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(partial(suite_results, tmp_path=tmp_path), others))
    here = [
        test
        for test in request.session.items
        if test.path.name in SUITES
        and "cpu" in test.name
        and test.get_closest_marker("slow") is None
    ]
    for isa, (ran, outcomes) in zip(others, results, strict=True):
        assert ran == isa
        assert set(outcomes) == {"passed"}, f"{isa}: {outcomes}"
        assert outcomes["passed"] == results[0][1]["passed"] >= 20
        assert outcomes["passed"] == len(here) or not here


def test_an_unknown_instruction_set_is_refused() -> None:
    code = """
import warnings, torch, disco_kernels as dk
from disco_kernels import registry
try:
    dk.PartialLinear(torch.zeros(2, 3), [3], backend="cpu")
except dk.BackendUnavailable as error:
    print(error)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        print("chosen", dk.PartialLinear(torch.zeros(2, 3), [3]).backend)
print("warned", len(said), said[0].message)
"""
    printed = script(code, {"DISCO_KERNELS_ISA": "avx10000"})
    allowed = ", ".join(STATUS.available_isas)
    reason = f"DISCO_KERNELS_ISA=avx10000 is not to be had on this machine; allowed here: {allowed}"
    assert f"cpu: {reason}" in printed
    assert printed.count("chosen reference") == 3
    assert "warned 1" in printed and reason in printed.splitlines()[-1]


def test_weights_packed_for_another_instruction_set_are_refused(tmp_path: Path) -> None:
    if len(STATUS.available_isas) < 2:
        pytest.skip(f"this machine runs only {STATUS.available_isas}")
    code = f"""
import pickle, sys, torch, disco_kernels as dk
path = {str(tmp_path / "kernel.pickle")!r}
x = torch.ones(2, 5)
if sys.argv[1] == "save":
    linear = torch.nn.Linear(5, 4).eval()
    with torch.no_grad():
        linear.weight[:2, 3:] = 0
        linear.weight[2:, :2] = 0
    report = dk.swap_(linear, 2)
    assert len(report.swapped) == 1, report
    with torch.no_grad():
        y = linear(x)
    kernel = dk.PartialLinear(linear.weight, [5], bias=linear.bias)
    pickle.dump((kernel, linear, y), open(path, "wb"))
else:
    kernel, linear, y = pickle.load(open(path, "rb"))
    try:
        kernel([x])
    except ValueError as error:
        print(error)
    # A module has its weights at hand, and packs them again.
    with torch.no_grad():
        assert torch.allclose(linear(x), y) and linear._disco_source is linear.weight
    print(linear)
"""
    first, last = STATUS.available_isas[0], STATUS.available_isas[-1]
    for isa, mode in ((first, "save"), (last, "load")):
        done = python("-c", code, mode, environment={"DISCO_KERNELS_ISA": isa})
        assert done.returncode == 0, done.stderr
    assert f"not those of this layer for {last}: pack them again" in done.stdout
    assert "backend=cpu" in done.stdout


def test_wide_registers_only_in_the_instruction_sets_files() -> None:
    """A CPU without them must never meet one, whatever the linker merged."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump (binutils) on this machine")
    assert STATUS.path is not None
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", STATUS.path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "disco::" not in listing:
        pytest.skip(f"{STATUS.path} is stripped: no function has a name")
    function, wide, leaks = "", 0, []
    for line in listing.splitlines():
        head = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if head:
            function = head.group(1)
        elif re.search(r"%[yz]mm\d|%k[1-7]\b", line):
            wide += 1
            if not re.search(
                r"convolve_tile<|fma_rounds|message_simd::|avx2_kernels|avx512_kernels", function
            ):
                leaks.append(f"{function}: {line.strip()}")
    assert not leaks, "\n".join(leaks[:10])
    has_wide = set(STATUS.available_isas) & {"avx2", "avx512"}
    assert wide > 1000 or not has_wide, f"only {wide} wide instructions found: {has_wide} built?"


def test_instruction_sets_files_define_nothing_that_the_linker_merges(tmp_path: Path) -> None:
    """A weak symbol in such a file may be the copy that everyone gets."""
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("nm") is None or not (ROOT / "csrc").is_dir():
        pytest.skip("needs g++, nm and the sources")
    if "avx2" not in STATUS.available_isas and "avx512" not in STATUS.available_isas:
        pytest.skip("no build of these instruction sets on this machine")
    covered = 0
    for name, (flags, function) in ISA_SOURCES.items():
        built = tmp_path / f"{name}.o"
        # Without optimisation nothing is inlined: whatever could be merged shows.
        subprocess.run(
            [
                *(compiler, "-std=c++17", "-O0", "-fPIC", "-Icsrc", *flags.split()),
                *("-DDISCO_HAVE_AVX2", "-DDISCO_HAVE_AVX512"),
                *("-c", f"csrc/cpu/{name}.cpp", "-o", str(built)),
            ],
            cwd=ROOT,
            check=True,
        )
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", str(built)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        shared = [line[17:] for line in symbols if line[17] not in "tdbr"]
        assert shared == [f"T disco::{function}()"], shared
        covered += 1
    assert covered == len(ISA_SOURCES)
