"""All ranks of a partitioned model in one thread, each running until it must wait."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from disco.executor.executor import Executor
from disco.executor.in_process import InProcessHub
from disco.executor.transport import Handle, Transport


def run_together(
    executors: Sequence[Executor],
    inputs: Sequence[Tensor],
    transports: Sequence[Transport] | None = None,
) -> list[Any]:
    """Outputs of every rank for the same inputs.

    Args:
        executors: one per rank.
        inputs: of the model; every rank gets them.
        transports: one per rank, that no other request uses now; None for new ones in this process.
    """
    if transports is None:
        transports = InProcessHub(len(executors)).transports()
    running = [e.start(inputs, t, 0) for e, t in zip(executors, transports, strict=True)]
    with torch.no_grad():
        return _take_turns(running)


def _take_turns(running: Sequence[Generator[Handle, None, Any]]) -> list[Any]:
    outputs: list[Any] = [None] * len(running)
    waiting: dict[int, Handle | None] = dict.fromkeys(range(len(running)))
    while waiting:
        ready = [rank for rank, handle in waiting.items() if handle is None or handle.done]
        if not ready:
            raise RuntimeError(
                f"ranks {sorted(waiting)} wait for each other: their programs are not of one plan"
            )
        for rank in ready:
            try:
                waiting[rank] = next(running[rank])
            except StopIteration as finished:
                outputs[rank] = finished.value
                del waiting[rank]
    return outputs
