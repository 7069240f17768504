"""Large pages and the pool over them: alignment, lifetime, and what is refused."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from disco_kernels.memory import PAGE_BYTES, Pool, large_pages


@pytest.mark.parametrize("num_bytes", [1, 63, 4096, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1])
def test_large_pages(num_bytes: int) -> None:
    memory = large_pages(num_bytes)
    assert memory.shape == (num_bytes,) and memory.dtype == torch.uint8
    assert memory.data_ptr() % PAGE_BYTES == 0
    assert int(memory.sum()) == 0, "zeroed"
    memory.fill_(255)
    assert int(memory[-1]) == 255


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_no_pages(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, given {num_bytes}"):
        large_pages(num_bytes)


def test_memory_lives_as_long_as_a_tensor_looks_at_it() -> None:
    view = large_pages(3 * PAGE_BYTES)[PAGE_BYTES:].view(torch.float32)[5:17]
    view.copy_(torch.arange(12.0))
    for _ in range(8):
        # Would get the addresses of what was given back.
        gc.collect()
        large_pages(3 * PAGE_BYTES).fill_(7)
    assert torch.equal(view, torch.arange(12.0))


def test_pieces_of_a_pool() -> None:
    """Aligned to a cache line, disjoint, and in use after the pool has gone."""
    pool = Pool()
    sizes = [1, 0, 17, 3_000_000, 5, 0, 2 * PAGE_BYTES, 64]
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.float64]
    pieces = [pool.empty(n, dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]
    for i, (piece, numel) in enumerate(zip(pieces, sizes, strict=True)):
        assert piece.shape == (numel,) and piece.dtype == dtypes[i % len(dtypes)]
        assert piece.device.type == "cpu" and piece.data_ptr() % 64 == 0
        piece.fill_(i + 1)
    del pool
    gc.collect()
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in pieces if p.numel())
    assert len(spans) == 6
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(bool((piece == i + 1).all()) for i, piece in enumerate(pieces))
