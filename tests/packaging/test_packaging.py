"""What the installed project is: one extension that needs little, and a light import."""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from disco_kernels.backends.cpu import extension_status

ROOT = Path(__file__).parents[2]


def run(*args: str, cwd: Path) -> str:
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout


def extension() -> Path:
    spec = importlib.util.find_spec("disco_kernels._C")
    assert spec is not None and spec.origin is not None, "the extension is not built"
    return Path(spec.origin)


def needed_libraries(path: Path) -> set[str]:
    """What a 64-bit ELF file asks the loader for (DT_NEEDED); not what it may open later."""
    data = path.read_bytes()
    assert data[:5] == b"\x7fELF\x02", f"{path} is no 64-bit ELF file"
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", data, table + size * number) for number in range(count)
    ]
    dynamic = next(section for section in sections if section[1] == 6)  # SHT_DYNAMIC
    offset, length, strings = dynamic[4], dynamic[5], sections[dynamic[6]][4]
    entries = struct.iter_unpack("<QQ", data[offset : offset + length])
    starts = [strings + value for tag, value in entries if tag == 1]
    return {data[start : data.index(b"\0", start)].decode() for start in starts}


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_extension_needs_no_torch_and_shares_its_openmp() -> None:
    needed = needed_libraries(extension())
    assert "libgomp.so.1" in needed, "the soname of the OpenMP runtime in torch's CPU wheel"
    assert not {name for name in needed if "torch" in name or "c10" in name}
    assert not {name for name in needed if "cuda" in name or "omp5" in name}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded(tmp_path: Path) -> None:
    code = (
        "import torch, disco_kernels as dk\n"
        "torch.ones(1000, 1000) @ torch.ones(1000, 1000)\n"
        "dk.PartialLinear(torch.ones(8, 8), [8], backend='cpu')([torch.ones(64, 8)])\n"
        "names = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line}\n"
        "print(*sorted(name for name in names if '.so' in name), sep='\\n')\n"
    )
    loaded = run("-c", code, cwd=tmp_path).split()
    assert len([path for path in loaded if re.search(r"lib[gi]?omp", path)]) == 1, loaded


def test_operators_import_without_the_framework(tmp_path: Path) -> None:
    code = (
        "import sys, disco_kernels\n"
        "assert not [m for m in sys.modules if m == 'disco' or m.startswith('disco.')]\n"
        "assert not {'triton', 'cupy', 'torchvision', 'timm', 'PIL'} & set(sys.modules)\n"
    )
    run("-c", code, cwd=tmp_path)


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists(), reason="reads a processor's flags in /proc/cpuinfo"
)
def test_the_build_has_every_instruction_set_that_this_processor_has() -> None:
    # "flags" is x86's word, "Features" is ARM's.
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    assert listed is not None
    flags = set(listed.group(1).split())
    needed = {
        "neon": {"asimd"},
        "avx2": {"avx2", "fma"},
        "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    }
    here = {name for name, wanted in needed.items() if wanted <= flags}
    assert here <= set(extension_status().available_isas), "built without them"


def test_version(tmp_path: Path) -> None:
    printed = run("-m", "disco.cli", "--version", cwd=tmp_path)
    assert printed.strip() == f"disco {metadata.version('disco-kernels')}"


def test_reports_from_any_folder(tmp_path: Path) -> None:
    assert "cpu" in run("-m", "disco_kernels", cwd=tmp_path)


def test_building_asks_for_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    build = text.split("[project]")[0]
    requires = re.search(r"^requires = \[(.*)\]", build, re.MULTILINE)
    assert requires is not None and "torch" not in requires.group(1)


def test_every_source_is_in_the_one_list() -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    listed = set(re.findall(r"csrc/[\w/]+\.cpp", text))
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp")}
    assert listed == found and len(found) > 4
