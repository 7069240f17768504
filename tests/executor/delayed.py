"""Ranks in one thread whose messages arrive when a seeded schedule says so."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from disco.executor import Executor, Handle, InProcessHub, InProcessTransport
from disco.executor.in_process import _Address, _Pending


class DelayedHub(InProcessHub):
    """Delivers at random: with probability ``at_once`` a message that both sides have posted, and
    with ``later`` one that is under way, whenever a rank calls `progress`."""

    def __init__(self, world_size: int, seed: int, at_once: float, later: float) -> None:
        super().__init__(world_size)
        self.random = random.Random(seed)
        self.at_once, self.later = at_once, later
        self.under_way: list[tuple[_Address, _Pending, bool]] = []

    def meet(self, address: _Address, side: _Pending, is_send: bool) -> None:
        if not is_send:
            # Who reads it too early will show it.
            side.buffer.fill_(float("nan") if side.buffer.is_floating_point() else 99)
            super().meet(address, side, is_send)
        elif self.random.random() < self.at_once:
            super().meet(address, side, is_send)
        else:
            self.under_way.append((address, side, is_send))

    def deliver(self) -> None:
        """Any one of the messages under way."""
        super().meet(*self.under_way.pop(self.random.randrange(len(self.under_way))))

    def transports(self) -> list[InProcessTransport]:
        return [_Progressing(self, rank) for rank in range(self.world_size)]


class _Progressing(InProcessTransport):
    def progress(self) -> None:
        hub = self._hub
        assert isinstance(hub, DelayedHub)
        while hub.under_way and hub.random.random() < hub.later:
            hub.deliver()


def run_delayed(
    executors: Sequence[Executor], inputs: Sequence[Tensor], hub: DelayedHub, number: int = 0
) -> list[Any]:
    """Outputs of every rank; ranks take turns in random order. Fails if all wait for nothing."""
    transports = hub.transports()
    running = [e.start(inputs, t, number) for e, t in zip(executors, transports, strict=True)]
    outputs: list[Any] = [None] * len(running)
    waiting: dict[int, Handle | None] = dict.fromkeys(range(len(running)))
    with torch.no_grad():
        while waiting:
            ready = [rank for rank, handle in waiting.items() if handle is None or handle.done]
            if not ready:
                assert hub.under_way, f"ranks {sorted(waiting)} wait and nothing is under way"
                hub.deliver()
                continue
            rank = hub.random.choice(ready)
            try:
                waiting[rank] = next(running[rank])
            except StopIteration as finished:
                outputs[rank] = finished.value
                del waiting[rank]
    assert not hub.under_way and not hub._receives
    return outputs
