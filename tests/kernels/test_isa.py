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
from tests.kernels.toolchains import TARGETS, compile_source

STATUS = extension_status()
pytestmark = pytest.mark.skipif(STATUS.error is not None, reason=f"no extension: {STATUS.error}")


# Their tests of the C++ kernels have "cpu" in their names.
KERNEL_TESTS = (
    "test_conv2d.py",
    "test_activations.py",
    "test_winograd.py",
    "test_bfloat16.py",
    "test_int8.py",
    "test_max_pool2d.py",
    "test_bind.py",
    "test_gather_pack.py",
    "test_narrow_segments.py",
    "test_wire.py",
    "test_depthwise.py",
    "test_fused_pack.py",
    "test_two_passes.py",
    "test_global_avg_pool2d.py",
)


# torch.compile sees the same whatever the instructions, and the self-test in C++ has guard pages
# around the buffers of every instruction set.
def on_every_isa(name: str) -> bool:
    return "cpu" in name and "compiles" not in name and "touched" not in name


def suite_results(isa: str, tmp_path: Path) -> tuple[str, Counter[str]]:
    """The instruction set that ran, and what became of the tests of the kernels."""
    report = tmp_path / f"{isa}.xml"
    done = python(
        *("-m", "pytest", *(f"tests/kernels/{name}" for name in KERNEL_TESTS)),
        *("-q", "-p", "no:cacheprovider"),
        *("-k", "cpu and not compiles and not touched", "-m", "not slow", f"--junitxml={report}"),
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
        if test.path.parent == Path(__file__).parent
        and test.path.name in KERNEL_TESTS
        and on_every_isa(test.name)
        and test.get_closest_marker("slow") is None
    ]
    for isa, (ran, outcomes) in zip(others, results, strict=True):
        assert ran == isa
        assert set(outcomes) == {"passed"}, f"{isa}: {outcomes}"
        assert outcomes["passed"] == results[0][1]["passed"] >= 20
        whole = {test.path.name for test in here} == set(KERNEL_TESTS)
        assert outcomes["passed"] == len(here) or not whole


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
    assert f"not those of this layer for {last}, winograd off: pack them again" in done.stdout
    assert "backend=cpu" in done.stdout


def test_wide_registers_only_in_the_instruction_sets_files() -> None:
    """A CPU without them must never meet one, whatever the linker merged.

    Nor their encoding of the narrow ones, whose names begin with a v.
    """
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
    allowed = (
        r"convolve_tiles<|convolve_lanes<|winograd_(in|out)put<|activate_in_place|largest_pixel<|"
        r"mean_of_\w+<|mean_pixel<|gather_words|quantise_(float32|bfloat16)\(|fma_rounds|message_simd::|avx512_lane_kernels|"
        r"avx2_kernels|avx512_kernels|avx512bf16_kernels"
    )
    function, wide, leaks = "", 0, []
    for line in listing.splitlines():
        head = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if head:
            function = head.group(1)
        elif re.search(r"%[yz]mm\d|%k[1-7]\b|^\s*[0-9a-f]+:\s+v\w+\s.*%xmm", line):
            wide += 1
            if not re.search(allowed, function):
                leaks.append(f"{function}: {line.strip()}")
    assert not leaks, "\n".join(leaks[:10])
    has_wide = set(STATUS.available_isas) & {"avx2", "avx512"}
    assert wide > 1000 or not has_wide, f"only {wide} wide instructions found: {has_wide} built?"


@pytest.mark.parametrize("isa", TARGETS)
def test_instruction_sets_files_define_nothing_that_the_linker_merges(
    isa: str, tmp_path: Path
) -> None:
    """A weak symbol in such a file may be the copy that everyone gets."""
    target = TARGETS[isa]
    compiler, nm = target.tool("g++"), target.tool("nm")
    if compiler is None or nm is None or not (ROOT / "csrc").is_dir():
        pytest.skip(f"needs g++ and nm for {target.machine}, and the sources")
    sources = sorted((ROOT / "csrc/cpu").glob(f"*_{isa}.cpp"))
    assert len(sources) >= 2
    for source in sources:
        built = tmp_path / f"{source.stem}.o"
        # Without optimisation nothing is inlined: whatever could be merged shows.
        define = f"-DDISCO_HAVE_{isa.upper()}"
        compile_source(compiler, target, str(source), "-O0", define, "-c", "-o", built)
        symbols = subprocess.run(
            [nm, "-C", "--defined-only", str(built)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        shared = [line[17:] for line in symbols if line[17] not in "tdbr"]
        assert len(shared) == 1 and shared[0].startswith(f"T disco::{isa}_"), (source.name, shared)
