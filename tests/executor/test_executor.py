"""The executor: waiting, buffers, freeing, threads and wrong inputs."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.errors import DeadlineError, InputError, TransportError
from disco.executor import Executor, InProcessHub, InProcessTransport, run_together
from disco.executor.transport import Handle
from disco.program import Op, Program, Ref, ValueInfo, register_op
from disco_kernels import Ownership


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Hardswish(),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return _model()


@pytest.fixture(scope="module")
def partitioned(model: nn.Module) -> disco.Partitioned:
    return disco.partition(model, (torch.randn(1, 3, 8, 8),), 3)


def _executors(partitioned: disco.Partitioned) -> list[Executor]:
    return [Executor(rank.program, rank.weights) for rank in partitioned.ranks]


def _close(result: Tensor, expected: Tensor) -> None:
    error, scale = float((result - expected).abs().max()), float(expected.abs().max())
    assert error <= 32 * torch.finfo(torch.float32).eps * scale, f"{error:.2e} at {scale:.2e}"


def _inputs(count: int, batch: int = 2) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(9)
    for _ in range(count):
        yield torch.randn(batch, 3, 8, 8, generator=generator)


def test_ranks_in_threads_wait_for_each_other(
    model: nn.Module, partitioned: disco.Partitioned
) -> None:
    """Each rank in a thread of its own, over `Transport.wait`, for several requests."""
    transports = InProcessHub(3).transports()
    executors = [
        Executor(rank.program, rank.weights, transport, deadline_s=20)
        for rank, transport in zip(partitioned.ranks, transports, strict=True)
    ]
    inputs = list(_inputs(4))
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda executor: [executor(x) for x in inputs], executors))
    with torch.no_grad():
        for x, *results in zip(inputs, *runs, strict=True):
            for result in results:
                _close(result, model(x))
    sent = sum(transport.bytes_sent for transport in transports)
    assert sent == 4 * 2 * partitioned.plan.bytes_per_image


def test_requests_in_many_threads_do_not_mix(
    model: nn.Module, partitioned: disco.Partitioned
) -> None:
    inputs = [x for batch in (1, 2, 3) for x in _inputs(6, batch)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(partitioned, inputs))
    with torch.no_grad():
        for x, result in zip(inputs, results, strict=True):
            _close(result, model(x))


def test_message_buffers_are_reused_and_outputs_are_not(partitioned: disco.Partitioned) -> None:
    seen: list[tuple[int, int]] = []

    class Watching(InProcessTransport):
        def post_receive(self, buffer: Tensor, source: int, exchange: int, request: int) -> Handle:
            seen.append((exchange, buffer.data_ptr()))
            return super().post_receive(buffer, source, exchange, request)

    executors = _executors(partitioned)
    first, second = _inputs(2)
    results = []
    for x in (first, second):
        hub = InProcessHub(3)
        transports = [Watching(hub, rank) for rank in range(3)]
        results.append(run_together(executors, (x,), transports)[0])
    half = len(seen) // 2
    # The first request posts receives as its exchanges come, later ones all at the beginning.
    assert half >= 6 and sorted(seen[:half]) == sorted(seen[half:])
    assert not torch.equal(results[0], results[1])
    kept = results[0].clone()
    run_together(executors, (second,))
    assert torch.equal(results[0], kept)


@torch.no_grad()
def test_an_output_that_one_rank_owns_alone_is_not_its_message_buffer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    owned = {"0": Ownership(((), (0, 1, 2, 3)))}
    partitioned = disco.partition(model, (torch.randn(1, 3, 8, 8),), 2, ownership=owned)
    first, second = _inputs(2)
    results = partitioned.run_ranks(first)
    kept = [result.clone() for result in results]
    partitioned.run_ranks(second)
    for result, copied in zip(results, kept, strict=True):
        assert torch.equal(result, copied)


def test_a_request_ends_when_its_messages_are_taken(partitioned: disco.Partitioned) -> None:
    """Until then its buffers belong to the transport, and no later request may get them."""
    slow = []

    class Slow(InProcessTransport):
        """Sends that are done only when the test says so."""

        def send(self, buffer: Tensor, destination: int, exchange: int, request: int) -> Handle:
            super().send(buffer, destination, exchange, request)
            slow.append(Pending())
            return slow[-1]

    class Pending(Handle):
        done = False  # type: ignore[assignment]
        finished_ns = 0  # type: ignore[assignment]

    (x,) = _inputs(1)
    hub = InProcessHub(3)
    transports = [Slow(hub, 0), *hub.transports()[1:]]
    executors = _executors(partitioned)
    running = [e.start((x,), t, 0) for e, t in zip(executors, transports, strict=True)]
    waiting: dict[int, Handle | None] = dict.fromkeys(range(3))

    def run_until_all_wait() -> None:
        while ready := [rank for rank, h in waiting.items() if h is None or h.done]:
            for rank in ready:
                try:
                    waiting[rank] = next(running[rank])
                except StopIteration:
                    del waiting[rank]

    with torch.no_grad():
        run_until_all_wait()
        assert list(waiting) == [0] and waiting[0] is slow[0]
        assert not executors[0]._buffers._known and executors[1]._buffers._known
        for handle in slow:
            handle.done = True  # type: ignore[misc, method-assign]
        run_until_all_wait()
    assert not waiting and executors[0]._buffers._known


def test_values_are_freed_at_their_last_use() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make(x: Tensor) -> Tensor:
        y = x + 1
        alive.append(weakref.ref(y))
        return y

    def count(x: Tensor) -> Tensor:
        counts.append(sum(ref() is not None for ref in alive))
        return x + 1

    counts: list[int] = []
    register_op("tests.make.default", make)
    register_op("tests.count.default", count)
    ops = []
    for i in range(3):
        source = Ref("x" if i == 0 else f"c{i - 1}")
        ops.append(Op("tests.make.default", f"m{i}", (source,)))
        ops.append(Op("tests.count.default", f"c{i}", (Ref(f"m{i}"),)))
    program = Program(("x",), Ref("c2"), tuple(ops), {"x": ValueInfo((2,), "float32")})
    Executor(program, {})(torch.zeros(2))
    assert counts == [1, 1, 1]


def test_a_result_read_twice_lives_until_the_second_time() -> None:
    ops = (
        Op("aten.relu.default", "a", (Ref("x"),)),
        Op("aten.neg.default", "b", (Ref("a"),)),
        Op("aten.add.Tensor", "c", (Ref("b"), Ref("a"))),
    )
    values = {"x": ValueInfo(("s0",), "float32")}
    program = Program(("x",), {"a": Ref("a"), "c": [Ref("c"), 3]}, ops, values)
    result = Executor(program, {})(torch.tensor([-1.0, 2.0]))
    assert torch.equal(result["a"], torch.tensor([0.0, 2.0]))
    assert torch.equal(result["c"][0], torch.zeros(2)) and result["c"][1] == 3


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), r"takes 1 input \(.*\), and .* is missing"),
        ((torch.randn(1, 3, 8, 8),) * 2, "takes 1 input .* given 2 by position"),
        (
            (torch.randn(3, 8, 8),),
            r"must be \[s0, 3, 8, 8\] float32 \(s0: any size\), given \[3, 8, 8\] float32",
        ),
        ((torch.randn(1, 3, 8, 9),), r"given \[1, 3, 8, 9\] float32"),
        ((torch.randn(1, 3, 8, 8, dtype=torch.float64),), "given .* float64"),
        (([1.0],), "must be a tensor, given list"),
        ((torch.randn(1, 3, 8, 8, requires_grad=True),), "requires a gradient"),
    ],
)
def test_wrong_inputs(partitioned: disco.Partitioned, inputs: Any, message: str) -> None:
    for run in (partitioned, _executors(partitioned)[0]):
        with pytest.raises(InputError, match=message):
            run(*inputs)


def test_no_gradient_is_recorded(partitioned: disco.Partitioned) -> None:
    with torch.no_grad():
        partitioned(torch.randn(1, 3, 8, 8, requires_grad=True))
    assert torch.is_grad_enabled()
    assert not partitioned(torch.randn(1, 3, 8, 8)).requires_grad
    assert torch.is_grad_enabled()


def test_a_rank_alone_gives_up_at_the_deadline(partitioned: disco.Partitioned) -> None:
    rank = partitioned.ranks[1]
    transport = InProcessHub(3).transports()[1]
    executor = Executor(rank.program, rank.weights, transport, deadline_s=0.05)
    with pytest.raises(DeadlineError, match=r"rank 1 waited 0\.05 s"):
        executor(torch.randn(1, 3, 8, 8))


def test_a_program_that_exchanges_needs_a_transport(partitioned: disco.Partitioned) -> None:
    executor = _executors(partitioned)[0]
    with pytest.raises(InputError, match="give its Executor a transport"):
        executor(torch.randn(1, 3, 8, 8))


def test_ranks_of_different_plans_do_not_hang(
    model: nn.Module, partitioned: disco.Partitioned
) -> None:
    """A rank that waits for a message that nobody sends is found out, not waited for."""
    alone = disco.partition(model, (torch.randn(1, 3, 8, 8),), 1)
    mixed = [_executors(partitioned)[0], *_executors(alone) * 2]
    with pytest.raises(RuntimeError, match="wait for each other"):
        run_together(mixed, (torch.randn(1, 3, 8, 8),))


def test_messages_of_the_wrong_size_are_refused() -> None:
    a, b = InProcessHub(2).transports()
    a.send(torch.zeros(3), 1, 0, 0)
    with pytest.raises(TransportError, match="both ranks must run the same plan"):
        b.post_receive(torch.zeros(4), 0, 0, 0)
    a.send(torch.zeros(3), 1, 1, 0)
    with pytest.raises(TransportError, match="is sent twice"):
        a.send(torch.zeros(3), 1, 1, 0)


def test_messages_are_copied_when_both_sides_are_there() -> None:
    a, b = InProcessHub(2).transports()
    source, target = torch.arange(6.0).reshape(2, 3), torch.zeros(6)
    sending = a.send(source, 1, 0, 0)
    assert not sending.done and a.bytes_sent == 0
    receiving = b.post_receive(target, 0, 0, 0)
    assert sending.done and receiving.done
    assert (a.bytes_sent, a.bytes_received, b.bytes_received) == (24, 0, 24)
    source.zero_()
    assert torch.equal(target, torch.arange(6.0))


def test_waiting_ends_when_the_message_comes() -> None:
    a, b = InProcessHub(2).transports()
    handle = b.post_receive(torch.zeros(2), 0, 0, 0)
    timer = threading.Timer(0.05, lambda: a.send(torch.ones(2), 1, 0, 0))
    timer.start()
    b.wait(handle, 20)
    assert handle.done
    timer.join()


def test_copies_share_what_never_changes(partitioned: disco.Partitioned) -> None:
    executor = _executors(partitioned)[0]
    assert copy.deepcopy(executor) is executor
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(executor)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(copy.deepcopy(partitioned)(x), partitioned(x))


def test_a_missing_weight_is_named(partitioned: disco.Partitioned) -> None:
    rank = partitioned.ranks[0]
    weights = {name: value for name, value in rank.weights.items() if name != "2.weight"}
    with pytest.raises(InputError, match=r"weight '2\.weight', which is not there"):
        Executor(rank.program, weights)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (
            Op("disco.conv2d", "y", (Ref("x"),)),
            r"'y' \(disco\.conv2d\) cannot be prepared: ValueError",
        ),
        (Op("disco.exchange", "y", (Ref("x"),)), "cannot be prepared: KeyError 'exchange'"),
        (Op("disco.empty", "y", ((3,),), {"dtype": "float32"}), "needs sizes and a dtype"),
        (Op("disco.assemble", "y", (3,), {"dim": 1}), "needs a tuple of pieces"),
        (
            Op("disco.linear", "y", (3, 3, None, None), {"activation": "none"}),
            "expects a weight, given 3",
        ),
    ],
)
def test_a_malformed_op_is_an_input_error(op: Op, message: str) -> None:
    program = Program(("x",), Ref("y"), (op,), {"x": ValueInfo((2,), "float32")})
    with pytest.raises(InputError, match=message):
        Executor(program, {})
