"""What importing the package does to a process, and does not."""

from __future__ import annotations

import re

import pytest

from disco_kernels.backends.cpu import extension_status
from tests.kernels.cases import needs_extension
from tests.kernels.process import python, script


def test_import_is_quiet_and_needs_nothing_optional() -> None:
    """CUDA stays uninitialised; no warning, no new thread; what is optional may be missing."""
    code = """
import sys, threading, warnings
for name in ("triton", "cupy", "torchvision", "timm", "safetensors", "PIL", "matplotlib", "disco"):
    sys.modules[name] = None
import torch
before = set(sys.modules)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import disco_kernels as dk
assert threading.active_count() == 1
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
model = torch.nn.Conv2d(4, 4, 3).eval()
with torch.no_grad():
    model.weight[:2, 2:] = 0
    x = torch.randn(1, 4, 5, 5)
    wanted = model(x)
    assert len(dk.swap_(model, 2).swapped) == 1
    assert torch.allclose(model(x), wanted, atol=1e-5)
assert not torch.cuda.is_initialized()
"""
    assert script(code).split() == ["disco_kernels"]


@needs_extension
def test_one_openmp_runtime_and_a_fork() -> None:
    """Two would be two pools of threads that compete for the cores."""
    code = """
import os, re, sys, torch, disco_kernels as dk
torch.set_num_threads(2)
x = torch.randn(2, 64, 32, 32)
torch.nn.functional.conv2d(x, torch.randn(64, 64, 3, 3))
kernel = dk.PartialConv2d(torch.randn(64, 64, 3, 3), [64], dk.ConvSpec((3, 3)), backend="cpu")
y = kernel([x])
maps = open("/proc/self/maps").read()
print(*sorted(set(re.findall(r"(/\\S*lib(?:gomp|omp|iomp5)\\S*)", maps))), sep="\\n")
sys.stdout.flush()
# A data loader's worker, forked after the kernels ran, must not hang in them.
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as torch's DataLoader does
    os._exit(0 if torch.equal(kernel([x]), y) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    loaded = script(code).splitlines()
    assert len(loaded) == 1, loaded


@needs_extension
def test_extension_links_no_torch_and_no_cuda() -> None:
    code = """
import sys, importlib.util, importlib.machinery
spec = importlib.util.spec_from_file_location("disco_kernels._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(module.isa())
"""
    status = extension_status()
    assert status.path is not None
    done = python("-c", code, status.path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == status.available_isas[-1]


@pytest.mark.parametrize("extension", [True, False])
def test_python_m_disco_kernels(extension: bool) -> None:
    """Tells what is there and why something is not, wherever it runs."""
    arguments = ["-m", "disco_kernels"]
    if not extension:
        hide = "import sys, runpy; sys.modules['disco_kernels._C'] = None; "
        arguments = ["-c", hide + "runpy.run_module('disco_kernels', run_name='__main__')"]
    done = python(*arguments)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    for backend in ("cuda", "triton", "cpu", "reference"):
        assert re.search(rf"^\s*{backend}\s+\S", printed, re.MULTILINE), backend
    assert "torch" in printed and "openmp" in printed.lower()
    if not extension:
        assert "the compiled extension is missing" in printed
        assert "chosen: reference" in printed
    elif extension_status().error is None:
        assert extension_status().isa is not None and str(extension_status().isa) in printed
        assert "chosen: cpu" in printed


def test_python_m_disco_kernels_with_a_bad_environment() -> None:
    """The command that people run when something is wrong has to survive what is wrong."""
    variables = {"DISCO_KERNELS_BACKEND": "nonsense", "DISCO_KERNELS_ISA": "avx10000"}
    done = python("-m", "disco_kernels", environment=variables)
    assert done.returncode == 0, done.stderr
    assert "nonsense: no such backend; allowed: cuda, triton, cpu, reference" in done.stdout
    assert extension_status().error or "avx10000 is not to be had on this machine" in done.stdout
