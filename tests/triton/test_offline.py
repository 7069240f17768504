"""The shipped tiles, compiled without a GPU: no spills, and the fast instructions are there."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from disco_kernels.backends.triton import interpreted
from disco_kernels.triton.tiles import Tile, choose_tile

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
    pytest.mark.skipif(interpreted(), reason="in the interpreter nothing is compiled"),
]

# Shared memory of a block: compute capability 8.0 and 9.0.
MOST_SHARED_BYTES = {80: 166912, 90: 232448}


def shipped_tiles() -> list[Tile]:
    """Every tile that a layer of 16-bit numbers can get."""
    return sorted(
        {
            choose_tile(pixels, columns, inputs, listed, taps, torch.bfloat16, 132)
            for pixels in (49, 784, 3136, 12544, 100352, 401408)
            for columns in (8, 32, 64, 128, 512, 1024)
            for inputs in (16, 40, 80, 288, 1152)
            for listed in (0, 16, 32, 64)
            for taps in (1, 9)
            if listed < inputs
        }
    )


TYPICAL = [Tile(64, 128, 64, 16, 4, 3), Tile(128, 64, 64, 16, 4, 3), Tile(128, 128, 64, 32, 8, 3)]


def check(tile: Tile, capability: int, inside: bool, evenly: bool) -> None:
    from tests.triton.offline import compile_conv2d

    found = compile_conv2d(tile, capability, inside=inside, evenly=evenly)
    what = f"{tile}, capability {capability}, inside {inside}, evenly {evenly}: {found}"
    print(what)
    # For 8.0, whose fragments of a product take more registers, two tiles keep a few on the stack.
    assert found.stack_bytes <= (0 if capability == 90 else 16), what
    assert found.shared_bytes <= MOST_SHARED_BYTES[capability], what
    # A warp group multiplies 64 rows at once; smaller tiles, and older GPUs, by warps.
    matrix = found.wgmma if capability == 90 and tile.m >= 64 else found.mma
    assert matrix > 0, what
    # Both operands of a step, and of those that are under way before the first; operands of fewer
    # vectors than threads are copied otherwise.
    if min(tile.m, tile.n) * tile.k >= 8 * 32 * tile.warps:
        assert found.wide_async_copies >= 2 * tile.stages, what


def test_typical_tiles_are_shipped() -> None:
    assert set(TYPICAL) <= set(shipped_tiles())


@pytest.mark.parametrize("capability", [80, 90])
def test_typical_tiles(capability: int) -> None:
    for tile in TYPICAL:
        check(tile, capability, inside=tile.n == 128, evenly=tile.warps == 4)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("inside", [True, False])
def test_all_tiles(capability: int, inside: bool) -> None:
    tiles = shipped_tiles()
    assert len(tiles) > 20
    for tile in tiles:
        check(tile, capability, inside, evenly=True)
