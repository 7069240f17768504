"""What `precompile` leaves on disk is what a later process takes: it compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.device import needs_gpu

pytestmark = needs_gpu

_SCRIPT = """
import sys, torch, disco, disco_kernels
from tests.gpu.models import GROUP, NODES, images, sparse
batch = lambda n: images(n).to("cuda")
dtype = getattr(torch, sys.argv[1])
fast = disco.compile(
    sparse("small").cuda(), NODES, example_inputs=(batch(2),), dtype=dtype, group_size=GROUP
)
if sys.argv[2] == "precompile":
    print(disco_kernels.precompile(fast, (batch(2),), (1, 32)))
else:
    with torch.inference_mode():
        for n in (1, 32):
            fast(batch(n))
    torch.cuda.synchronize()
"""


def _compiled(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.cubin")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_later_process_compiles_nothing(dtype: str, tmp_path: Path) -> None:
    names = ("TRITON_CACHE_DIR", "DISCO_KERNELS_CACHE")
    environment = {**os.environ, **{name: str(tmp_path / name) for name in names}}
    found = []
    for what in ("precompile", "run"):
        command = [sys.executable, "-c", _SCRIPT, dtype, what]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(_compiled(tmp_path))
    assert found[0] and found[0] == found[1]
