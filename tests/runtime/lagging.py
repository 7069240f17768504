"""A device without a device: CPU tensors whose copies to the host happen late, and a rank of it."""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from disco.executor import Executor
from disco.partition.shards import load_shard
from disco.runtime.staged import Event, StagedTransport
from disco.runtime.transports import open_local

LOOKS = 3  # at an event until one more copy is made


class _Mark:
    """Behind so many of the copies."""

    def __init__(self, copies: LaggingCopies, place: int) -> None:
        self._copies = copies
        self._place = place
        self._looks = 0

    def query(self) -> bool:
        self._looks += 1
        if self._looks % LOOKS == 0:
            self._copies.advance(self._copies.made + 1)
        return self._copies.made >= self._place

    def synchronize(self) -> None:
        self._copies.advance(self._place)


class LaggingCopies:
    """All tensors but its own host memory are the device's. A copy to the host is made when its
    event has been looked at a few times, and what is sent before is rubbish; one to the device is
    made behind those before it, as on a stream.

    Attributes:
        made: copies so far.
        allocated: tensors of host memory so far.
    """

    def __init__(self) -> None:
        self.made = 0
        self.allocated = 0
        self._given = 0
        self._host: list[int] = []
        self._queue: deque[tuple[Tensor, Tensor]] = deque()

    def serves(self, buffer: Tensor) -> bool:
        return buffer.data_ptr() not in self._host

    def host_memory(self, num_bytes: int) -> Tensor:
        self.allocated += 1
        memory = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
        self._host.append(memory.data_ptr())
        return memory

    def copy(self, source: Tensor, target: Tensor) -> None:
        self._given += 1
        self._queue.append((source, target))
        if source.data_ptr() in self._host:
            self.advance(self._given)

    def mark(self, event: Event | None) -> Event:
        return _Mark(self, self._given)

    def advance(self, until: int) -> None:
        while self.made < min(until, self._given):
            source, target = self._queue.popleft()
            target.copy_(source)
            self.made += 1


def main(folder: str, rank: str, transport_name: str, given: str, found: str) -> None:
    """One rank, which computes all that is in `given` one after the other, into `found`."""
    torch.set_num_threads(1)
    shard = load_shard(Path(folder), int(rank))
    inner = open_local(
        transport_name, shard, str(Path(found).parent), "127.0.0.1", timeout_s=20, silence_s=10
    )
    copies = LaggingCopies()
    transport = StagedTransport(inner, copies)
    executor = Executor(shard.program, shard.weights, transport, deadline_s=20)
    outputs: dict[str, Tensor] = {}
    with torch.inference_mode():
        for name, x in sorted(load_file(given).items()):
            outputs[name] = executor(x).clone()
            outputs[f"{name}.allocated"] = torch.tensor(copies.allocated)
    outputs["copies"] = torch.tensor(copies.made)
    outputs["bytes"] = torch.tensor([transport.bytes_sent, transport.bytes_received])
    transport.close()
    save_file(outputs, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
