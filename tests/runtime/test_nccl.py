"""The transport over NCCL without it: a stand-in that blocks as NCCL does, so that a wrong order of
messages hangs or delivers the wrong bytes here, too."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

import disco
from disco.errors import DeadlineError, TransportError
from disco.executor import Executor, Handle, InProcessHub, run_together
from disco.runtime.nccl import Message, NcclTransport
from tests.runtime.at_once import at_once
from tests.runtime.tokens_model import TokensModel


class _Started:
    def __init__(self, fabric: Fabric, receives: list[Message], sends: list[Message]) -> None:
        self.receives = receives
        self.sends = sends
        self._fabric = fabric

    def is_completed(self) -> bool:
        with self._fabric.lock:
            self._fabric.move()
            return not self.receives and not self.sends


class Fabric:
    """A rank's groups run one after the other, and a message moves when both of its ends are in
    groups that run. There are no tags: the first send meets the first receive of a pair."""

    def __init__(self, world_size: int) -> None:
        self.lock = threading.Lock()
        self.queues: list[deque[_Started]] = [deque() for _ in range(world_size)]

    def begin(self, rank: int, receives: Sequence[Message], sends: Sequence[Message]) -> _Started:
        started = _Started(self, list(receives), list(sends))
        with self.lock:
            self.queues[rank].append(started)
        return started

    def move(self) -> None:
        moved = True
        while moved:
            moved = False
            for rank, queue in enumerate(self.queues):
                while queue and not queue[0].receives and not queue[0].sends:
                    queue.popleft()
                for message in list(queue[0].sends) if queue else []:
                    moved |= self._meet(rank, queue[0], message)

    def _meet(self, rank: int, group: _Started, message: Message) -> bool:
        buffer, peer = message
        there = self.queues[peer]
        first = next((m for m in there[0].receives if m[1] == rank), None) if there else None
        if first is None or group.sends[[m[1] for m in group.sends].index(peer)] is not message:
            return False
        first[0].view(-1).copy_(buffer.view(-1))
        there[0].receives = [m for m in there[0].receives if m is not first]
        group.sends = [m for m in group.sends if m is not message]
        return True


class _Groups:
    def __init__(self, fabric: Fabric, rank: int) -> None:
        self._fabric = fabric
        self._rank = rank
        self.fails = False

    def connect(self) -> None:
        pass

    def begin(self, receives: Sequence[Message], sends: Sequence[Message]) -> _Started:
        if self.fails:
            raise RuntimeError("NCCL error\nin a file")
        return self._fabric.begin(self._rank, receives, sends)

    def close(self) -> None:
        pass


class _OnCpu(NcclTransport):
    """Takes CPU tensors for those of a GPU."""

    def _serves(self, buffer: Tensor) -> bool:
        return True


def made(world_size: int) -> list[_OnCpu]:
    fabric, inner = Fabric(world_size), InProcessHub(world_size).transports()
    return [_OnCpu(t, _Groups(fabric, rank)) for rank, t in enumerate(inner)]


@pytest.mark.parametrize("seed", range(20))
def test_random_exchanges_end_with_the_right_bytes(seed: int) -> None:
    """Who sends whom differs by exchange, receives are posted at the request's begin or later, and
    ranks wait for some payloads late."""
    choice = random.Random(seed)
    world_size = choice.randint(2, 4)
    pairs = [(i, j) for i in range(world_size) for j in range(world_size) if i != j]
    exchanges = [choice.sample(pairs, choice.randint(0, len(pairs))) for _ in range(12)]
    transports = made(world_size)

    def rank(me: int) -> None:
        mine, transport = random.Random(seed * 10 + me), transports[me]
        buffers = {(e, i): torch.zeros(3) for e, p in enumerate(exchanges) for i, j in p if j == me}
        for request in range(3):
            handles: dict[tuple[int, int], Handle] = {}
            if request:
                handles = {
                    key: transport.post_receive(buffer, key[1], key[0], request)
                    for key, buffer in buffers.items()
                }
            waiting = []
            for e, pairs_here in enumerate(exchanges):
                for i, j in pairs_here:
                    if j == me:
                        key = (e, i)
                        if not request:
                            handles[key] = transport.post_receive(buffers[key], i, e, request)
                        waiting.append(key)
                for i, j in pairs_here:
                    if i == me:
                        message = torch.tensor([float(e), me, request])
                        handles[e, -1 - j] = transport.send(message, j, e, request)
                transport.flush(e)
                while waiting and mine.random() < 0.5:
                    key = waiting.pop(mine.randrange(len(waiting)))
                    transport.wait(handles[key], 10)
                    assert buffers[key].tolist() == [key[0], key[1], request]
            for handle in handles.values():
                transport.wait(handle, 10)
                assert handle.done and handle.finished_ns
            for key, buffer in buffers.items():
                assert buffer.tolist() == [key[0], key[1], request]

    ranks = range(world_size)
    assert at_once(*(partial(rank, me) for me in ranks)) == [None for _ in ranks]
    for me in ranks:
        sent = sum(1 for p in exchanges for i, _ in p if i == me)
        received = sum(1 for p in exchanges for _, j in p if j == me)
        assert transports[me].bytes_sent == 3 * 12 * sent
        assert transports[me].bytes_received == 3 * 12 * received


def test_the_stand_in_hangs_where_nccl_would() -> None:
    """Both ranks receive first, in a group of its own: neither ever sends."""
    fabric = Fabric(2)
    for rank in range(2):
        fabric.begin(rank, [(torch.zeros(1), 1 - rank)], [])
    sends = [fabric.begin(rank, [], [(torch.ones(1), 1 - rank)]) for rank in range(2)]
    assert not any(send.is_completed() for send in sends)


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_executors_compute_the_same_bits(nodes: int) -> None:
    torch.manual_seed(0)
    model, x = TokensModel().eval(), torch.randn(2, 3, 12, 12)
    disco.sparsify_(model, nodes, 0.4, (x,))
    parts = disco.partition(model, (x,), nodes)
    order = [
        [op.kwargs["exchange"] for op in part.program.ops if op.kind == "disco.exchange"]
        for part in parts.ranks
    ]
    assert all(numbers == sorted(numbers) for numbers in order), "one order on all ranks"
    transports = made(nodes)
    executors = [
        Executor(part.program, part.weights, transport)
        for part, transport in zip(parts.ranks, transports, strict=True)
    ]
    plain = [Executor(part.program, part.weights) for part in parts.ranks]
    for batch in (2, 1, 2, 2):
        with torch.no_grad():
            expected = run_together(plain, (x[:batch],))[0]
        found: dict[int, Tensor] = {}

        def rank(me: int, batch: int = batch, found: dict[int, Tensor] = found) -> None:
            found[me] = executors[me](x[:batch])

        assert at_once(*(partial(rank, me) for me in range(nodes))) == [None] * nodes
        assert all(torch.equal(found[me], expected) for me in range(nodes))


def test_a_peer_that_never_comes_is_a_deadline() -> None:
    a, _ = made(2)
    receive = a.post_receive(torch.zeros(2), 1, 5, 0)
    a.flush(5)
    with pytest.raises(DeadlineError, match="receiving from rank 1 in exchange 5"):
        a.wait(receive, 0.05)
    with pytest.raises(TransportError, match="receiving from rank 1"):
        a.send(torch.zeros(2), 1, 6, 0)


def test_a_failure_of_nccl_is_one_line() -> None:
    a, _ = made(2)
    a._groups.fails = True  # type: ignore[attr-defined]
    a.send(torch.zeros(2), 1, 5, 0)
    with pytest.raises(TransportError, match=r"rank 0: NCCL failed in exchange 5: NCCL error$"):
        a.flush(5)


def test_an_empty_payload_is_no_message() -> None:
    a, _ = made(2)
    assert a.send(torch.empty(0, 3), 1, 0, 0).done
    a.flush(0)
    assert a.bytes_sent == 0
