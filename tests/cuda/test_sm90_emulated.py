"""The convolution for Hopper's tensor cores and its launch, emulated on the CPU, against float64.

The emulation computes products and brings copies as late as the program lets it, in an order of
its own, and refuses what the hardware refuses: addresses out of a program's memory, threads that
wait for each other, more arrivals than a barrier counts.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from disco_kernels.backends.triton import TritonBackend
from disco_kernels.cuda import choice, conv2d_sm90
from tests.cuda.conv2d_cases import NODES, WINDOWS, check_tiles, kernel_of, make
from tests.cuda.emulator import cpu_as_device, needs_compiler
from tests.cuda.sm90.emulator import compile_emulation, kernel_class

pytestmark = needs_compiler
MAPS = ((3, 7, 7), (1, 9, 30), (2, 14, 14))  # images, height, width


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    found = kernel_class(compile_emulation(tmp_path_factory.mktemp("sm90")))
    with cpu_as_device(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(conv2d_sm90, "_kernel_class", lambda: found)
        patched.setattr(choice, "is_hopper", lambda device: True)
        patched.setattr(TritonBackend, "refusal", lambda self, device, dtype: None)
        yield


@pytest.mark.parametrize("window", range(len(WINDOWS)))
def test_every_tile(window: int) -> None:
    covered = 0
    for number, size in enumerate(MAPS):
        nodes, activation = (
            (number + window) % (len(NODES) - 1),
            ("relu", "none", "gelu")[number % 3],
        )
        dtype = (torch.bfloat16, torch.float16)[(number + window) % 2]
        covered += check_tiles(window, nodes, size, dtype, activation, number != 1, "cpu")
    assert covered >= 3 * len(MAPS)


def test_many_runs() -> None:
    """Single groups of 8 channels, 22 of them, beside what the node owns itself."""
    assert check_tiles(0, len(NODES) - 1, (2, 5, 9), torch.bfloat16, "gelu", True, "cpu") >= 3


@pytest.mark.parametrize("order", range(2, 6))
def test_other_orders_of_events(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv2d_sm90._kernel_class(), "seed", order)
    window = (1, 2)[order % 2]
    assert check_tiles(window, 1, (2, 7, 7), torch.float16, "none", True, "cpu") >= 3


def test_wide_maps() -> None:
    """The largest tiles' patches do not fit, and are refused before they are run."""
    assert 1 <= check_tiles(1, 2, (1, 3, 200), torch.bfloat16, "relu", True, "cpu") <= 4


def test_single_pixels_are_one_row_of_any_width() -> None:
    assert check_tiles(0, 2, (2, 1, 300), torch.bfloat16, "relu", True, "cpu") >= 3
    layer, *_ = make(2, 0, torch.bfloat16, "cpu")
    apart = torch.zeros(2, 1, 301, 48, dtype=torch.bfloat16)[:, :, :300].permute(0, 3, 1, 2)
    out = torch.zeros(2, 1, 300, 72, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert not kernel_of(layer).takes([apart], layer.packed_weight, None, (out, None))
