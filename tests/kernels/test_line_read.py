"""The loop that says how fast cache lines can be read: it must read every one of them."""

from __future__ import annotations

import pytest
import torch

from disco_kernels.backends.cpu import extension_status

if extension_status().error is not None:
    pytest.skip(f"no extension: {extension_status().error}", allow_module_level=True)

from disco_kernels import _C


def test_every_listed_line_is_read() -> None:
    lines = [0, 32, 48]
    for pixels in (0, 1, 3, 4, 9, 130):
        x = torch.arange(64.0 * pixels).view(pixels, 64)
        for threads in (1, 2):
            found = _C.read_lines(x.data_ptr(), 64, pixels, lines, threads)
            assert found == pytest.approx(float(x[:, lines].double().sum()), rel=1e-5)
