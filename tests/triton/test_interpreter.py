"""Runs the kernels' tests in Triton's interpreter, in a process of its own: Triton reads the
variable when a kernel is defined."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton.device import DEVICE

TESTS = Path(__file__).with_name("test_kernels.py")


@pytest.mark.skipif(DEVICE is not None, reason="the kernels' tests run here by themselves")
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
def test_the_kernels_in_the_interpreter() -> None:
    # numpy deprecates what the interpreter does with loop bounds (see pyproject.toml).
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "pytest", "-q"]
    run = subprocess.run(
        [*command, str(TESTS)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 20, run.stdout[-2000:]
