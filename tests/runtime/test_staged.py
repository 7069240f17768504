"""Messages of a device's memory over transports of the host's, with a device that copies late."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import disco
from disco.errors import DeadlineError
from disco.executor import Executor, Handle, InProcessHub, Transport, run_together
from disco.runtime.staged import StagedTransport
from disco.runtime.token import make_token
from tests.runtime.at_once import at_once
from tests.runtime.lagging import LaggingCopies
from tests.runtime.tokens_model import TokensModel

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64)


def staged_pair() -> tuple[list[StagedTransport], list[LaggingCopies]]:
    copies = [LaggingCopies(), LaggingCopies()]
    inner = InProcessHub(2).transports()
    return [StagedTransport(t, c) for t, c in zip(inner, copies, strict=True)], copies


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_arrive_and_memory_is_used_again(dtype: torch.dtype) -> None:
    (a, b), copies = staged_pair()
    kept = torch.empty(40, dtype=dtype)
    sent, received = kept[5:26].view(3, 7), torch.zeros(3, 7, dtype=dtype)
    allocated = []
    for request in range(4):
        sent.copy_(torch.arange(21).view(3, 7) + request)
        receive = b.post_receive(received, 0, 2, request)
        send = a.send(sent, 1, 2, request)
        if request % 2:
            _ask(b, receive, a, send)
        a.wait(send, 5)
        b.wait(receive, 5)
        assert receive.done and send.done
        assert torch.equal(received, sent), request
        assert receive.finished_ns and send.finished_ns
        allocated.append((copies[0].allocated, copies[1].allocated))
    assert set(allocated) == {(1, 1)}
    assert a.bytes_sent == b.bytes_received == 4 * sent.nbytes
    assert (a.bytes_received, b.bytes_sent) == (0, 0)


def _ask(b: StagedTransport, receive: Handle, a: StagedTransport, send: Handle) -> None:
    """Nobody waits: both ranks look at what they have under way, as between layers."""
    looks = 0
    while not (receive.done and send.done):
        a.progress()
        b.progress()
        looks += 1
        assert looks < 100
    assert looks > 0


def test_nothing_is_sent_before_its_copy_is_made() -> None:
    (a, b), copies = staged_pair()
    received = torch.zeros(8)
    receive = b.post_receive(received, 0, 0, 0)
    send = a.send(torch.ones(8), 1, 0, 0)  # looks once
    assert not copies[0].made and not send.finished_ns
    assert not receive.done and not received.any()
    a.progress()
    a.progress()  # by then the copy has been made
    assert copies[0].made == 1
    assert receive.done and received.all()


def test_several_leave_in_order_while_one_waits() -> None:
    """What a rank waits for may depend on what it has not handed over yet."""
    (a, b), _ = staged_pair()
    values = [torch.full((5,), float(number)) for number in range(6)]
    for number, value in enumerate(values):
        a.send(value, 1, number, 0)
    answer = a.post_receive(torch.zeros(1), 1, 9, 0)

    def peer() -> None:
        for number, value in enumerate(values):
            buffer = torch.zeros(5)
            b.wait(b.post_receive(buffer, 0, number, 0), 5)
            assert torch.equal(buffer, value)
        b.wait(b.send(torch.ones(1), 0, 9, 0), 5)

    assert at_once(peer, lambda: a.wait(answer, 5)) == [None, None]


def test_memory_goes_with_the_message() -> None:
    (a, b), copies = staged_pair()
    for number in range(3):
        buffer = torch.ones(4)
        receive = b.post_receive(torch.zeros(4), 0, number, 0)
        send = a.send(buffer, 1, number, 0)
        a.wait(send, 5)
        b.wait(receive, 5)
        del buffer, receive, send
        gc.collect()
        assert not a._slots and not b._slots, "host memory of messages that are gone"
    assert copies[0].allocated == 3


def test_what_is_on_the_host_and_what_is_empty_pass_by() -> None:
    (a, b), copies = staged_pair()
    assert a.send(torch.empty(0, 4), 1, 0, 0) is not None
    host = copies[0].host_memory(4)
    before = copies[0].allocated
    received = torch.zeros(4, dtype=torch.uint8)
    receive = b.post_receive(received, 0, 1, 0)
    assert a.send(host, 1, 1, 0).done
    b.wait(receive, 5)
    assert torch.equal(received, host) and copies[0].allocated == before


def test_a_device_that_hangs_is_a_deadline() -> None:
    (a, _), copies = staged_pair()
    copies[0].advance = lambda until: None  # type: ignore[method-assign]
    send = a.send(torch.ones(4), 1, 3, 0)
    with pytest.raises(DeadlineError, match=r"own device, which has not packed exchange 3"):
        a.wait(send, 0.05)


def _parts(nodes: int, wire: torch.dtype | None) -> disco.Partitioned:
    torch.manual_seed(0)
    model, x = TokensModel().eval(), torch.randn(2, 3, 12, 12)
    disco.sparsify_(model, nodes, 0.4, (x,))
    return disco.partition(model, (x,), nodes, wire_dtype=wire)


INPUTS = [torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(n)) for n in (2, 1, 3)]
WIRES = (None, torch.float16, torch.bfloat16, torch.int8)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("nodes", [2, 3])
def test_executors_compute_the_same_bits(nodes: int, wire: torch.dtype | None) -> None:
    parts = _parts(nodes, wire)
    executors = [Executor(part.program, part.weights) for part in parts.ranks]
    copies = [LaggingCopies() for _ in range(nodes)]
    inner = InProcessHub(nodes).transports()
    staged = [StagedTransport(t, c) for t, c in zip(inner, copies, strict=True)]
    plain = [Executor(part.program, part.weights) for part in parts.ranks]
    for x in INPUTS:
        with torch.no_grad():
            expected = run_together(plain, (x,))[0]
        counts = []
        for repeat in range(4):
            request = 100 * len(x) + repeat
            outputs = _in_threads(executors, staged, x, request)
            assert all(torch.equal(y, expected) for y in outputs)
            counts.append([c.allocated for c in copies])
        assert counts[0] == counts[-1], "host memory made after the first request of a shape"
    assert all(c.made > 0 for c in copies)


def _in_threads(
    executors: Sequence[Executor], transports: Sequence[Transport], x: Tensor, request: int
) -> list[Tensor]:
    """One request of ranks in a thread each: their outputs."""
    outputs: dict[int, Tensor] = {}

    def rank(number: int) -> None:
        transport = transports[number]
        running = executors[number].start((x,), transport, request)
        with torch.no_grad():
            try:
                while True:
                    transport.wait(next(running), 10)
            except StopIteration as finished:
                outputs[number] = finished.value

    ranks = range(len(executors))
    assert at_once(*(partial(rank, number) for number in ranks)) == [None for _ in ranks]
    return [outputs[number] for number in ranks]


@pytest.mark.parametrize(
    ("transport", "nodes", "wire"),
    [("tcp", 2, torch.int8), ("tcp", 3, None), ("torch", 2, None), ("torch", 3, torch.bfloat16)],
)
def test_processes_compute_the_same_bits(
    tmp_path: Path, transport: str, nodes: int, wire: torch.dtype | None
) -> None:
    parts = _parts(nodes, wire)
    parts.save(tmp_path / "out")
    make_token(tmp_path / "token")
    given = {f"x{i}": x for i, x in enumerate([*INPUTS, *INPUTS])}
    save_file({name: x.clone() for name, x in given.items()}, tmp_path / "given")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = {name: parts(x) for name, x in given.items()}
    torch.set_num_threads(threads)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, "-m", "tests.runtime.lagging", str(tmp_path / "out")]
    ranks = [
        subprocess.Popen(
            [*command, str(r), transport, str(tmp_path / "given"), str(tmp_path / f"found-{r}")],
            env=env,
        )
        for r in range(nodes)
    ]
    assert [rank.wait(timeout=100) for rank in ranks] == [0] * nodes
    for r in range(nodes):
        found = load_file(tmp_path / f"found-{r}")
        for name, y in expected.items():
            assert torch.equal(found[name], y), (r, name)
        assert found["copies"] > 0
        assert found[f"x{len(INPUTS) - 1}.allocated"] == found[f"x{len(given) - 1}.allocated"]
        sent = sum(parts.plan.bytes_matrix_for(sum(map(len, given.values())))[r])
        assert int(found["bytes"][0]) == sent
