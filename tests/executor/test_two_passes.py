"""Whether payloads come early or late never shows in the bits, and the values are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disco.executor import Executor, run_together
from disco.partition import RankProgram, build_all, decide
from disco.program import Program, Ref, interpret, overwritten_residual, plan_buffers
from disco_kernels import Ownership
from disco_kernels.backends.cpu import extension_status
from tests.executor.delayed import DelayedHub, run_delayed
from tests.executor.test_activations_memory import in_float32
from tests.partition.harness import Case, ownerships

H, W = 6, 7
SCHEDULES = [(0.0, 0.0), (1.0, 1.0), (0.5, 0.3), (0.0, 0.5), (0.2, 0.1)]
needs_extension = pytest.mark.skipif(
    extension_status().error is not None, reason=f"no extension: {extension_status().error}"
)


def case_of(widths: Sequence[int], seed: int, zeros: float) -> Case:
    """3 x 3, 1 x 1 with a residual, strided 3 x 3; then tokens through two linears."""
    case = Case(widths[0], H, W, seed=seed)
    window = {"kernel": (3, 3), "padding": (1, 1), "activation": "relu", "zero_columns": zeros}
    case.conv("a", "x", widths[1], widths[0], **window)
    case.conv("b", "a", widths[1], widths[1], **window)
    case.conv("c", "b", widths[1], widths[1], zero_columns=zeros, residual=Ref("a"))
    case.conv("d", "c", widths[2], widths[1], stride=(2, 2), **window)
    case.op("aten.permute.default", "t", Ref("d"), (0, 2, 3, 1))
    case.linear("e", "t", widths[1], widths[2], activation="gelu", zero_columns=zeros)
    case.linear("f", "e", widths[2], widths[1], zero_columns=zeros)
    return case


def ranks_of(
    case: Case,
    world_size: int,
    backend: str,
    owned: dict[str, Ownership] | None = None,
    wire: str | None = None,
) -> Sequence[RankProgram]:
    """In float32, which the C++ kernels compute, or in float64."""
    program, weights = case.program(), case.weights
    if backend == "cpu":
        program, weights = in_float32(program, weights)
    decisions = decide(program, weights, {}, world_size, out_ownership=owned, wire_dtype=wire)
    return build_all(decisions)[1]


def executors_of(ranks: Sequence[RankProgram], backend: str) -> list[Executor]:
    programs = [Program.from_json(rank.program.to_json()) for rank in ranks]
    return [
        Executor(program, rank.weights, backend=backend)
        for program, rank in zip(programs, ranks, strict=True)
    ]


def count_first_passes(executor: Executor, counts: list[str]) -> None:
    def spied(step: Any) -> Any:
        def run(values: Any) -> Any:
            before = len(values[0].begun)
            result = step.run(values)
            counts.extend([step.name] * (len(values[0].begun) - before))
            return result

        return replace(step, run=run) if step.name.endswith(".local") else step

    executor._steps = [spied(step) for step in executor._steps]


def check(
    case: Case, ranks: Sequence[RankProgram], backend: str, seed: int, exact_wire: bool = True
) -> list[str]:
    """Every schedule, over requests that compute unbound, that bind and that are bound; the first
    passes that have run."""
    program = case.program()
    xs = [case.input(batch) for batch in (2, 1)]
    given_xs = xs if backend == "reference" else [x.float() for x in xs]
    together = executors_of(ranks, backend)
    expected = [run_together(together, (x,)) for x in given_xs]
    for x, results in zip(xs, expected, strict=True) if exact_wire else ():
        exact = interpret(program, case.weights, (x,))
        for result in results:
            # Six layers, each with at most some 400 products an output: 6 * 400 roundings.
            epsilon = torch.finfo(result.dtype).eps
            limit = 2400 * epsilon * max(1.0, float(exact.abs().max()))
            assert float((result - exact).abs().max()) <= limit
    counts: list[str] = []
    for number, (at_once, later) in enumerate(SCHEDULES):
        executors = executors_of(ranks, backend)
        for executor in executors:
            count_first_passes(executor, counts)
        for turn in range(4):
            for x, wanted in zip(given_xs, expected, strict=True):
                hub = DelayedHub(len(ranks), seed + 100 * number + turn, at_once, later)
                for a, b in zip(run_delayed(executors, (x,), hub), wanted, strict=True):
                    assert torch.equal(a, b), (at_once, later, turn)
    return counts


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_extension), "reference"])
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_random_ownerships_and_schedules(data: st.DataObject, seed: int, backend: str) -> None:
    """Ranks with nothing included."""
    world_size = data.draw(st.integers(2, 3))
    widths = [data.draw(st.sampled_from((4, 5, 9, 16, 20))) for _ in range(3)]
    owned = {
        name: data.draw(ownerships(width, world_size))
        for name, width in (("b", widths[1]), ("d", widths[2]), ("e", widths[1]))
    }
    case = case_of(widths, seed, data.draw(st.sampled_from((0.0, 0.5, 0.9))))
    check(case, ranks_of(case, world_size, backend, owned), backend, seed)


@needs_extension
def test_first_passes_run_where_payloads_are_late() -> None:
    """Otherwise nothing of the above is tested. Every layer but a reads payloads."""
    case = case_of((8, 40, 48), 1, 0.6)
    counts = check(case, ranks_of(case, 2, "cpu"), "cpu", 3)
    # The result of f leaves the program, in a tensor that is not there before.
    assert {name.removesuffix(".local") for name in counts} == {"b", "c", "d", "e"}


@needs_extension
@pytest.mark.parametrize("wire", ["float16", "bfloat16", "int8"])
def test_narrow_payloads(wire: str) -> None:
    """Widened when they have arrived, by the pass that reads them."""
    case = case_of((8, 40, 48), 1, 0.6)
    counts = check(case, ranks_of(case, 2, "cpu", wire=wire), "cpu", 3, exact_wire=False)
    assert {name.removesuffix(".local") for name in counts} == {"b", "c", "d", "e"}


@needs_extension
def test_what_arrived_early_is_computed_in_one_pass() -> None:
    case = case_of((8, 40, 48), 1, 0.6)
    executors = executors_of(ranks_of(case, 2, "cpu"), "cpu")
    x = case.input(1).float()
    for _ in range(3):
        run_together(executors, (x,))
    counts: list[str] = []
    for executor in executors:
        count_first_passes(executor, counts)
    run_together(executors, (x,))
    # Ranks in one thread take turns: who goes on second finds everything there.
    layers = 5
    assert 0 < len(counts) <= layers


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_extension), "reference"])
def test_a_rank_with_no_channels(world_size: int, backend: str) -> None:
    case = case_of((4, 12, 12), 2, 0.5)
    everything = (tuple(range(12)), *((),) * (world_size - 1))
    owned = {"b": Ownership(everything), "e": Ownership(tuple(reversed(everything)))}
    check(case, ranks_of(case, world_size, backend, owned), backend, 5)


@needs_extension
def test_the_residual_is_not_where_the_first_pass_writes() -> None:
    case = case_of((8, 40, 48), 1, 0.6)
    ranks = ranks_of(case, 2, "cpu")
    for executor, rank in zip(executors_of(ranks, "cpu"), ranks, strict=True):
        assert "c.local" in [step.name for step in executor._steps]
        kinds = ("disco.partial_conv2d", "disco.conv2d")
        kept = {op.name: overwritten_residual(op) for op in rank.program.ops if op.kind in kinds}
        buffers = plan_buffers(rank.program, kept)
        (op,) = [op for op in rank.program.ops if op.name == "c"]
        residual = op.args[-1]
        assert isinstance(residual, Ref) and buffers["c"] != buffers[residual.name]


@needs_extension
def test_nothing_is_allocated_for_messages_after_the_first_requests() -> None:
    case = case_of((8, 40, 48), 1, 0.6)
    executors = executors_of(ranks_of(case, 2, "cpu"), "cpu")
    x = case.input(2).float()

    def memory() -> list[tuple[int, ...]]:
        found = []
        for executor in executors:
            (known,) = executor._buffers._known.values()
            (kept,) = known.free
            messages = [m for e in kept.exchanges.values() for _, m in (*e.incoming, *e.outgoing)]
            buffers = [*messages, *kept.activations.out.values()]
            passes = [id(p) for p in kept.activations.passes.values()]
            found.append((*(b.data_ptr() for b in buffers), *passes))
        return found

    for turn in range(2):
        run_delayed(executors, (x,), DelayedHub(2, turn, 0.3, 0.3))
    before = memory()
    for turn in range(5):
        run_delayed(executors, (x,), DelayedHub(2, turn, 0.3, 0.3))
        assert memory() == before
