"""Python in a process of its own, for what an imported package cannot change any more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` at the root of the repository. Raises if it takes too long."""
    cleaned = {k: v for k, v in os.environ.items() if not k.startswith("DISCO_KERNELS_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**cleaned, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def script(code: str, environment: Mapping[str, str] | None = None) -> str:
    """What ``code`` prints. Fails with its traceback unless it ends well."""
    done = python("-c", code, environment=environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()
