"""Several requests in flight: the results of one by one, in order, from memory of their own."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.errors import DeadlineError, InputError, PeerLostError, TransportError
from disco.executor import (
    Executor,
    Handle,
    InProcessHub,
    InProcessTransport,
    Transport,
    run_pipelined,
    run_together,
)

WORLD = 3


@pytest.fixture(scope="module")
def partitioned() -> disco.Partitioned:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 30, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(30, 24, 1),
        nn.Flatten(),
        nn.Linear(24 * 64, 10),
    ).eval()
    return disco.partition(model, (torch.randn(1, 3, 8, 8),), WORLD)


def executors_of(partitioned: disco.Partitioned, deadline_s: float = 20.0) -> list[Executor]:
    return [
        Executor(rank.program, rank.weights, deadline_s=deadline_s) for rank in partitioned.ranks
    ]


def inputs_of(count: int) -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(1 + i % 2, 3, 8, 8),) for i in range(count)]


class Sleepy(InProcessTransport):
    """Loses time at random, so that ranks are apart and payloads early here and late there."""

    def progress(self) -> None:
        if random.random() < 0.05:
            time.sleep(0.001)


def in_threads(
    executors: Sequence[Executor],
    requests: Sequence[tuple[Tensor]],
    in_flight: Sequence[int],
    kind: type[InProcessTransport] = Sleepy,
) -> list[list[Tensor]]:
    hub = InProcessHub(len(executors))
    transports = [kind(hub, rank) for rank in range(len(executors))]

    def work(rank: int) -> list[Tensor]:
        results = run_pipelined(executors[rank], transports[rank], requests, in_flight[rank])
        assert torch.is_grad_enabled()
        return list(results)

    with ThreadPoolExecutor(len(executors)) as pool:
        return list(pool.map(work, range(len(executors))))


@pytest.mark.parametrize("in_flight", [(1, 1, 1), (2, 2, 2), (4, 4, 4), (1, 3, 5), (9, 1, 2)])
def test_results_are_those_of_calls_one_by_one(
    partitioned: disco.Partitioned, in_flight: tuple[int, ...]
) -> None:
    """Bit for bit and in order, however many each rank has in flight."""
    executors, requests = executors_of(partitioned), inputs_of(20)
    expected = [run_together(executors, inputs) for inputs in requests]
    for found in in_threads(executors, requests, in_flight):
        assert len(found) == len(requests)
        for result, by_rank in zip(found, expected, strict=True):
            assert torch.equal(result, by_rank[0])


def test_memory_stays_constant_and_is_no_other_requests(partitioned: disco.Partitioned) -> None:
    in_flight, executors = 3, executors_of(partitioned)
    inputs = [inputs[:1] for inputs in inputs_of(200)][:1] * 200

    def addresses() -> list[set[int]]:
        """Per request that there is memory for, where that is."""
        found = []
        for executor in executors:
            for known in executor._buffers._known.values():
                for kept in known.free:
                    made = kept.exchanges.values()
                    messages = [m for e in made for _, m in (*e.incoming, *e.outgoing)]
                    activations = kept.activations.out.values()
                    found.append({b.data_ptr() for b in (*messages, *activations)})
        return found

    in_threads(executors, inputs[:20], (in_flight,) * WORLD)
    before = addresses()
    assert len(before) <= in_flight * WORLD
    in_threads(executors, inputs, (in_flight,) * WORLD)
    after = addresses()
    assert len(after) <= in_flight * WORLD
    for one, other in itertools.combinations(after, 2):
        assert not one & other, "two requests share a buffer"
    for kept in before:
        assert kept in after, "memory was thrown away and made again"


def test_requests_are_taken_one_by_one(partitioned: disco.Partitioned) -> None:
    """Never more of them than may be in flight ahead of the results."""
    taken, given = 0, 0

    def requests() -> Iterator[tuple[Tensor]]:
        nonlocal taken
        for inputs in inputs_of(12):
            taken += 1
            assert taken - given <= 4
            yield inputs

    executors = executors_of(partitioned)
    hub = InProcessHub(WORLD)
    transports = hub.transports()
    with ThreadPoolExecutor(WORLD) as pool:
        others = [
            pool.submit(
                lambda r: list(run_pipelined(executors[r], transports[r], inputs_of(12), 4)), r
            )
            for r in (1, 2)
        ]
        for _ in run_pipelined(executors[0], transports[0], requests(), 4):
            given += 1
        assert all(len(other.result()) == 12 for other in others)
    assert given == taken == 12


def test_another_request_computes_while_one_waits(partitioned: disco.Partitioned) -> None:
    """A rank alone gets as far as the first wait with each that may be in flight."""
    executors = executors_of(partitioned, deadline_s=0.2)
    begun: list[int] = []

    class Watching(InProcessTransport):
        def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> Handle:
            begun.append(request)
            return super().send(buffer, destination, exchange, request)

    transport = Watching(InProcessHub(WORLD), 0)
    with pytest.raises(DeadlineError, match=r"request 0: rank 0 waited 0.2 s"):
        list(run_pipelined(executors[0], transport, inputs_of(8), 3))
    assert sorted(set(begun)) == [0, 1, 2]


def test_an_error_names_its_request_and_ends_all(partitioned: disco.Partitioned) -> None:
    executors = executors_of(partitioned)
    closed: list[int] = []
    start = executors[0].start

    def watched(inputs: Sequence[Tensor], transport: InProcessTransport, number: int, *record):  # type: ignore[no-untyped-def]
        def run():  # type: ignore[no-untyped-def]
            try:
                return (yield from start(inputs, transport, number, *record))
            finally:
                closed.append(number)

        return run()

    class Failing(InProcessTransport):
        def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> Handle:
            if request == 2:
                raise TransportError("the cable is cut")
            return super().send(buffer, destination, exchange, request)

    executors[0].start = watched  # type: ignore[method-assign,assignment]
    results = run_pipelined(executors[0], Failing(InProcessHub(WORLD), 0), inputs_of(8), 4)
    with pytest.raises(TransportError, match="request 2: the cable is cut"):
        list(results)
    assert sorted(closed) == [0, 1, 2]


def test_wrong_inputs(partitioned: disco.Partitioned) -> None:
    executor = executors_of(partitioned)[0]
    transport = InProcessHub(WORLD).transports()[0]
    with pytest.raises(InputError, match="in_flight must be at least 1, given 0"):
        run_pipelined(executor, transport, inputs_of(2), 0)
    wrong = [*inputs_of(1), (torch.randn(1, 4, 8, 8),)]
    with pytest.raises(InputError, match="request 1: input 'input' must be"):
        list(run_pipelined(executor, transport, wrong, 3))


def test_leaving_early_ends_what_is_in_flight(partitioned: disco.Partitioned) -> None:
    executors, requests = executors_of(partitioned), inputs_of(6)
    transports = InProcessHub(WORLD).transports()

    def first(rank: int) -> Tensor:
        results = run_pipelined(executors[rank], transports[rank], requests, 1)
        found = next(results)
        results.close()  # type: ignore[attr-defined]
        return found

    with ThreadPoolExecutor(WORLD) as pool:
        found = list(pool.map(first, range(WORLD)))
    assert all(torch.equal(found[0], other) for other in found)


def test_no_requests(partitioned: disco.Partitioned) -> None:
    transport = InProcessHub(WORLD).transports()[0]
    assert list(run_pipelined(executors_of(partitioned)[0], transport, [], 2)) == []


class Polled(InProcessTransport):
    """With the waiting that every transport has."""

    def wait_any(self, handles: Sequence[Handle], deadline_s: float) -> None:
        Transport.wait_any(self, handles, deadline_s)


def test_waiting_by_asking(partitioned: disco.Partitioned) -> None:
    executors, requests = executors_of(partitioned), inputs_of(6)
    expected = [run_together(executors, inputs)[0] for inputs in requests]
    for found in in_threads(executors, requests, (2, 3, 1), Polled):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    transport = Polled(InProcessHub(WORLD), 0)
    handles = [transport.post_receive(torch.empty(1), 1, number, 0) for number in range(3)]
    with pytest.raises(DeadlineError, match=r"rank 0 waited 0\.05 s for any of 3 messages"):
        transport.wait_any(handles, 0.05)


@pytest.mark.parametrize("kind", [InProcessTransport, Polled])
def test_any_message_ends_the_waiting(kind: type[InProcessTransport]) -> None:
    hub = InProcessHub(2)
    receiver, sender = kind(hub, 0), kind(hub, 1)
    handles = [receiver.post_receive(torch.empty(1), 1, number, 0) for number in range(3)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(receiver.wait_any, handles, 20.0)
        time.sleep(0.02)
        sender.send(torch.ones(1), 0, 2, 0)
        waiting.result()
    assert [handle.done for handle in handles] == [False, False, True]


def test_a_lost_peer_keeps_its_name(partitioned: disco.Partitioned) -> None:
    class Losing(InProcessTransport):
        def wait_any(self, handles: Sequence[Handle], deadline_s: float) -> None:
            raise PeerLostError(1, "10.0.0.7:7077", "it closed the connection", 4)

    executors = executors_of(partitioned)
    transport = Losing(InProcessHub(WORLD), 0)
    with pytest.raises(PeerLostError, match=r"request 0: rank 1 \(10.0.0.7:7077\) is lost") as lost:
        list(run_pipelined(executors[0], transport, inputs_of(1), 2))
    assert (lost.value.rank, lost.value.host, lost.value.exchange) == (1, "10.0.0.7:7077", 4)
