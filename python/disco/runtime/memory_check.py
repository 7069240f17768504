"""Whether ranks fit into memory, before anything is loaded.

What a rank needs is the plan's prediction for requests of one image, or its shard's size where an
older plan has none: a lower bound, so what is refused could not have run without swapping.
"""

from __future__ import annotations

from collections.abc import Sequence

from disco.errors import InputError
from disco.partition.shards import Manifest
from disco.runtime.free_memory import FreeMemory, free_memory

# Anonymous memory of a process that has imported torch and run a small model: 154 MB each with
# torch 2.13 and Python 3.11 on x86-64. Code, 86 MB more, is shared and can be read again.
PROCESS_BYTES = 150_000_000


def check_rank_fits(
    manifest: Manifest, rank: int, free: Sequence[FreeMemory] | None = None
) -> None:
    """Refuse a rank that this process cannot hold.

    Args:
        manifest: of the partition; a rank that is not in it is left to `load_shard`.
        free: None for what `free_memory` says.

    Raises:
        InputError: names the rank, what it needs, what is left, and of what.
    """
    if not 0 <= rank < manifest.plan.world_size:
        return
    need = _need_bytes(manifest, rank)
    for left in free_memory() if free is None else free:
        # While weights are packed, the shard's file is mapped beside them.
        mapped = manifest.shards[rank].num_bytes if left.of_process else 0
        if need + mapped > left.num_bytes:
            while_loading = f", and {_mb(mapped)} MB for its file while loading" if mapped else ""
            raise InputError(
                f"rank {rank} needs {_mb(need)} MB ({_parts(manifest, rank)}){while_loading}; "
                f"{_mb(left.num_bytes)} MB are {left.limit}: end other programs, raise the limit, "
                f"or partition the model for more nodes"
            )


def check_all_fit(manifest: Manifest, free: Sequence[FreeMemory] | None = None) -> None:
    """Refuse ranks that this machine cannot hold together, a process each; as `check_rank_fits`."""
    needs = [_need_bytes(manifest, rank) for rank in range(manifest.plan.world_size)]
    total = sum(needs) + PROCESS_BYTES * len(needs)
    for left in free_memory() if free is None else free:
        if not left.of_process and total > left.num_bytes:
            ranks = ", ".join(f"rank {rank} {_mb(need)}" for rank, need in enumerate(needs))
            raise InputError(
                f"{len(needs)} ranks on one machine need {_mb(total)} MB ({ranks}, and "
                f"{_mb(PROCESS_BYTES)} each for Python and torch); {_mb(left.num_bytes)} MB are "
                f"{left.limit}: end other programs, raise the limit, or run each rank on a machine "
                f"of its own"
            )


def _need_bytes(manifest: Manifest, rank: int) -> int:
    if manifest.plan.memory:
        return manifest.plan.memory[rank].total_bytes
    return manifest.shards[rank].num_bytes


def _parts(manifest: Manifest, rank: int) -> str:
    if not manifest.plan.memory:
        return "its shard; this older plan does not say what it takes besides"
    memory = manifest.plan.memory[rank]
    return (
        f"weights {_mb(memory.weight_bytes)}, activations {_mb(memory.activation_bytes)}, "
        f"messages {_mb(memory.message_bytes)}"
    )


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f}"
