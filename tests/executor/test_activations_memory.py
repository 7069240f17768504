"""Memory kept from one request to the next: whatever is reused, no value is ever wrong."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from disco.errors import InputError
from disco.executor import Executor, InProcessHub, run_together
from disco.executor.activations import Activations
from disco.program import Op, Program, Ref, interpret, plan_buffers
from disco_kernels.backends.cpu import extension_status
from disco_kernels.memory import PAGE_BYTES
from tests.examples import examples
from tests.partition.harness import Case, cut

C, H, W = 4, 6, 8
needs_extension = pytest.mark.skipif(
    extension_status().error is not None, reason=f"no extension: {extension_status().error}"
)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in flat(v)] if isinstance(value, (list, tuple)) else [value]


def same(found: Any, expected: Any, limit: float = 1e-11) -> None:
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(float(b.abs().max()), 1.0) if b.numel() else 1.0
        assert not b.numel() or float((a - b).abs().max()) <= limit * scale


def check(
    program: Program,
    weights: dict[str, Tensor],
    inputs: Sequence[Tensor],
    backend: str = "reference",
    winograd: str = "off",
    limit: float = 1e-11,
) -> None:
    """Each call, of the first, of those that bind kernels and of those that repeat them, is right,
    and leaves what earlier calls returned, and the inputs, as they were."""
    run = Executor(program, weights, backend=backend, winograd=winograd)
    given = [x.clone() for x in inputs]
    returned, kept = [], []
    for _ in range(2):
        for x in inputs:
            result = run(x)
            same(result, interpret(program, weights, (x,)), limit)
            returned.append(result)
            kept.append(copy.deepcopy(result))
    for result, before in zip(returned, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(flat(result), flat(before), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, given, strict=True))


def kept_of(program: Program) -> dict[str, str | None]:
    """Every convolution and linear, as the executor gives them to `plan_buffers`."""
    return {
        op.name: op.args[-1].name if isinstance(op.args[-1], Ref) else None
        for op in program.ops
        if op.kind in ("disco.conv2d", "disco.linear")
    }


class Grower:
    """Adds ops to a case, over maps ``[B, 4, 6, 8]``: values alias, live long, are read twice."""

    def __init__(self, draw: st.DrawFn, seed: int) -> None:
        self.draw = draw
        self.case = Case(C, H, W, seed=seed)
        self.maps = ["x"]
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def op(self, kind: str, *args: Any, **kwargs: Any) -> Ref:
        return self.case.op(kind, self.name(), *args, **kwargs)

    def pick(self) -> str:
        # Mostly something recent, but anything may be read late, and more than once.
        recent = self.maps[-3:]
        return self.draw(st.sampled_from([*recent, *self.maps]))

    def grow(self) -> None:
        x = self.pick()
        kinds = (
            "conv",
            "conv3",
            "residual",
            "grouped",
            "add",
            "relu",
            "pool",
            "view",
            "slice",
            "permute",
        )
        more = ("split", "linear", "tokens", "cat", "expand", "flat")
        kind = self.draw(st.sampled_from((*kinds, *more)))
        self.maps.append(getattr(self, kind)(x).name)

    def conv(self, x: str) -> Ref:
        return self.case.conv(self.name(), x, C, C)

    def conv3(self, x: str) -> Ref:
        return self.case.conv(self.name(), x, C, C, kernel=(3, 3), padding=(1, 1))

    def residual(self, x: str) -> Ref:
        other = Ref(self.pick())
        return self.case.conv(
            self.name(), x, C, C, kernel=(3, 3), padding=(1, 1), residual=other, activation="relu"
        )

    def grouped(self, x: str) -> Ref:
        groups = self.draw(st.sampled_from((2, C)))
        other = Ref(self.pick()) if self.draw(st.booleans()) else None
        window = {"kernel": (3, 3), "padding": (1, 1), "activation": "relu"}
        return self.case.conv(self.name(), x, C, C, groups=groups, residual=other, **window)

    def add(self, x: str) -> Ref:
        return self.op("aten.add.Tensor", Ref(x), Ref(self.pick()))

    def relu(self, x: str) -> Ref:
        return self.op("aten.relu.default", Ref(x))

    def pool(self, x: str) -> Ref:
        return self.op("aten.max_pool2d.default", Ref(x), (3, 3), (1, 1), (1, 1))

    def view(self, x: str) -> Ref:
        seen = self.op("aten.view.default", Ref(x), (-1, C * H, W))
        return self.op("aten.view.default", seen, (-1, C, H, W))

    def flat(self, x: str) -> Ref:
        seen = self.op("aten.flatten.using_ints", Ref(x), 2)
        return self.op("aten.unflatten.int", seen, 2, (H, W))

    def slice(self, x: str) -> Ref:
        # All of it: the same memory under another name.
        return self.op("aten.slice.Tensor", Ref(x), 1, 0, C)

    def permute(self, x: str) -> Ref:
        there = self.op("aten.permute.default", Ref(x), (0, 2, 3, 1))
        return self.op("aten.permute.default", there, (0, 3, 1, 2))

    def split(self, x: str) -> Ref:
        parts = self.op("aten.split.Tensor", Ref(x), C // 2, 1)
        halves = [self.op("operator.getitem", parts, i) for i in (1, 0)]
        return self.op("aten.cat.default", tuple(halves), 1)

    def cat(self, x: str) -> Ref:
        both = self.op("aten.cat.default", (Ref(x), Ref(self.pick())), 1)
        return self.op("aten.slice.Tensor", both, 1, C // 2, C // 2 + C)

    def expand(self, x: str) -> Ref:
        return self.op("aten.expand.default", Ref(x), (-1, C, H, W))

    def linear(self, x: str) -> Ref:
        """Over the last dimension of four: its result is no map in channels-last memory."""
        residual = self.draw(st.sampled_from([None, Ref(self.pick())]))
        return self.case.linear(self.name(), x, W, W, residual=residual)

    def tokens(self, x: str) -> Ref:
        there = self.op("aten.permute.default", Ref(x), (0, 2, 3, 1))
        mixed = self.case.linear(self.name(), there.name, C, C, activation="relu")
        return self.op("aten.permute.default", mixed, (0, 3, 1, 2))


def in_float32(program: Program, weights: dict[str, Tensor]) -> tuple[Program, dict[str, Tensor]]:
    values = {
        name: replace(info, dtype="float32") if info.dtype == "float64" else info
        for name, info in program.values.items()
    }
    return replace(program, values=values), {name: w.float() for name, w in weights.items()}


@pytest.mark.parametrize(
    ("backend", "winograd"),
    [
        ("reference", "off"),
        pytest.param("cpu", "off", marks=needs_extension),
        pytest.param("cpu", "f2", marks=needs_extension),
        pytest.param("cpu", "f4", marks=needs_extension),
    ],
)
@settings(max_examples=examples(100), deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16), size=st.integers(2, 16))
def test_random_programs(
    data: st.DataObject, seed: int, size: int, backend: str, winograd: str
) -> None:
    grower = Grower(data.draw, seed)
    while grower.count < size:
        grower.grow()
    some = data.draw(st.lists(st.sampled_from(grower.maps[1:]), max_size=2))
    outputs = {"last": Ref(grower.maps[-1]), "some": tuple(map(Ref, some))}
    program = grower.case.program(outputs)
    # Two sizes in turns, and the same again: fresh, bound, repeated.
    inputs = [grower.case.input(batch) for batch in (2, 1, 2, 2)]
    if backend == "reference":
        check(program, grower.case.weights, inputs)
    else:
        lowered = in_float32(program, grower.case.weights)
        # Roundings grow with the depth of a program; a wrong value is wrong in its first digit.
        check(*lowered, [x.float() for x in inputs], backend, winograd, limit=1e-3)


def test_a_plan_reuses_memory() -> None:
    """Otherwise nothing of the above is tested."""
    case = Case(C, H, W)
    for i in range(6):
        case.conv(f"v{i}", f"v{i - 1}" if i else "x", C, C)
    case.op("aten.relu.default", "y", Ref("v5"))
    program = case.program()
    plan = plan_buffers(program, kept_of(program))
    assert len(plan) == 6 and len(set(plan.values())) == 2


def residual_chain(outputs: Any = None, **changed: str) -> tuple[Case, Program]:
    """a, then b from a, then c = conv(b) + a; `between` is one more reader of a after c."""
    case = Case(C, H, W)
    case.conv("a", "x", C, C)
    case.conv("b", changed.get("reads", "a"), C, C)
    if "alias" in changed:
        case.op(changed["alias"], "s", Ref("a"), *((0, 2, 3, 1),) * ("permute" in changed["alias"]))
    case.conv(
        "c", "b", C, C, kernel=(3, 3), padding=(1, 1), residual=Ref(changed.get("added", "a"))
    )
    case.op("aten.relu.default", "y", Ref("c"))
    if "late" in changed:
        case.op("aten.mean.dim", "z", Ref(changed["late"]), (2,))
    return case, case.program(outputs)


@pytest.mark.parametrize(
    ("changed", "outputs", "in_place"),
    [
        ({}, Ref("y"), True),
        ({"late": "a"}, (Ref("y"), Ref("z")), False),
        ({"alias": "aten.alias.default", "late": "s"}, (Ref("y"), Ref("z")), False),
        ({"alias": "aten.permute.default", "late": "s"}, (Ref("y"), Ref("z")), False),
        ({"alias": "aten.alias.default", "added": "s"}, Ref("y"), False),
        ({"added": "b"}, Ref("y"), False),
        ({"added": "x"}, Ref("y"), False),
        ({}, (Ref("y"), Ref("a")), False),
    ],
)
def test_a_residual_is_overwritten_where_it_is_read_last(
    changed: dict[str, str], outputs: Any, in_place: bool
) -> None:
    case, program = residual_chain(outputs, **changed)
    plan = plan_buffers(program, kept_of(program))
    added = changed.get("added", "a")
    assert (plan.get("c") == plan.get(added, -1)) == in_place, plan
    check(program, case.weights, [case.input(2), case.input(2), case.input(2)])


def test_what_leaves_the_program_is_fresh() -> None:
    """Directly, as a view, as a piece of a tuple, as an input's alias; twice in the outputs."""
    case = Case(C, H, W)
    case.conv("a", "x", C, C)
    case.conv("b", "a", C, C)
    case.op("aten.split.Tensor", "parts", Ref("b"), 2, 1)
    case.op("operator.getitem", "part", Ref("parts"), 1)
    case.op("aten.select.int", "row", Ref("a"), 2, 3)
    case.conv("c", "b", C, C)
    case.conv("d", "c", C, C, residual=Ref("c"))
    case.conv("unused", "d", C, C)
    outputs = {"part": Ref("part"), "row": [Ref("row"), Ref("row")], "d": Ref("d")}
    program = case.program(outputs)
    plan = plan_buffers(program, kept_of(program))
    assert set(plan) == {"c"}
    check(program, case.weights, [case.input(3), case.input(3), case.input(3)])


def test_max_pool_is_never_in_place() -> None:
    """Its only value may be its last argument, as a kernel's residual is."""
    case = Case(C, H, W)
    case.conv("a", "x", C, C)
    window = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1)}
    case.op("aten.max_pool2d.default", "p", Ref("a"), **window)
    case.op("aten.relu.default", "y", Ref("p"))
    program = case.program()
    program, weights = in_float32(program, case.weights)
    for backend in ("reference", None):
        run = Executor(program, weights, backend=backend)
        for _ in range(4):
            x = case.input(2).float()
            (expected,) = flat(interpret(program, weights, (x,)))
            assert torch.allclose(run(x), expected, atol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_max_pool_is_torchs(dilation: int) -> None:
    """Windows that lie in the padding altogether included: their largest value is -inf."""
    covered = 0
    for kernel in (2, 3, 5):
        for size in range(1, 7):
            args = ((kernel, kernel), (2, 1), (kernel // 2, kernel // 2), (dilation, dilation))
            x = torch.randn(2, 5, size, size + 1).contiguous(memory_format=torch.channels_last)
            op = Op("aten.max_pool2d.default", "p", (Ref("x"), *args))
            values = {"x": replace(Case(5, size, size + 1).program(Ref("x")).values["x"])}
            values = {"x": replace(values["x"], dtype="float32")}
            program = Program(("x",), Ref("p"), (op,), values)
            try:
                expected = torch.nn.functional.max_pool2d(x, *args)
            except RuntimeError:
                continue  # smaller than the window
            assert torch.equal(Executor(program, {})(x), expected)
            covered += 1
    assert covered >= 7


def test_a_linear_over_four_dimensions() -> None:
    """Tokens ``[B, H, W, C]`` stay contiguous; what a kernel has to copy is not bound."""
    case = Case(C, H, W)
    case.linear("a", "x", W, W)
    case.linear("b", "a", W, W, residual=Ref("a"))
    case.conv("c", "b", C, C, residual=Ref("b"))
    case.conv("d", "x", C, C)
    case.conv("e", "d", C, C, residual=Ref("b"))
    case.op("aten.relu.default", "y", Ref("c"))
    case.op("aten.add.Tensor", "z", Ref("e"), Ref("y"))
    check(case.program(), case.weights, [case.input(2), case.input(2), case.input(2)])


def test_no_images() -> None:
    case, program = residual_chain()
    check(program, case.weights, [case.input(b) for b in (0, 2, 0, 0, 2)])


def test_many_shapes_in_turns() -> None:
    """More than are kept, so that some are forgotten and learnt again."""
    case, program = residual_chain()
    check(program, case.weights, [case.input(b) for b in (1, 2, 3, 4, 5, 6, 1, 1, 1, 6)])


def test_a_request_whose_shape_is_forgotten_while_it_runs() -> None:
    case, program = residual_chain()
    run = Executor(program, case.weights, backend="reference")
    x = case.input(9)
    for _ in range(2):
        run(x)
    started = run.start((x,), None, 0)  # has taken the memory of this shape
    for batch in range(1, 7):
        run(case.input(batch))
    with pytest.raises(StopIteration) as finished, torch.no_grad():
        next(started)
    same(finished.value.value, interpret(program, case.weights, (x,)))
    for _ in range(3):
        same(run(x), interpret(program, case.weights, (x,)))


def test_requests_that_overlap() -> None:
    """The memory of a request is its own until it has returned."""
    case, program = residual_chain()
    run = Executor(program, case.weights, backend="reference")
    xs = [case.input(2) for _ in range(4)]
    for _ in range(3):
        started = [run.start((x,), None, 0) for x in xs]
        for x, running in zip(xs, started, strict=True):
            with pytest.raises(StopIteration) as finished, torch.no_grad():
                next(running)
            same(finished.value.value, interpret(program, case.weights, (x,)))
    free = [kept for known in run._buffers._known.values() for kept in known.free]
    assert len(free) == 4 and all(kept.activations.out for kept in free)


def test_threads_and_copies() -> None:
    case, program = residual_chain()
    run = Executor(program, case.weights, backend="reference")
    jobs = [(case.input(1 + i % 3), run if i % 2 else copy.deepcopy(run)) for i in range(48)]
    expected = [interpret(program, case.weights, (x,)) for x, _ in jobs]
    start = threading.Barrier(4)

    def worker(number: int) -> list[tuple[int, Any]]:
        start.wait()
        return [(i, jobs[i][1](jobs[i][0])) for i in range(number, len(jobs), 4)]

    with ThreadPoolExecutor(4) as pool:
        results = [pair for found in pool.map(worker, range(4)) for pair in found]
    assert len(results) == 48
    for i, result in results:
        same(result, expected[i])


def failing(step: Any) -> Callable[[Any], Any]:
    def run(values: Any) -> Any:
        step.run(values)  # has written already
        raise RuntimeError("in the middle")

    return run


@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("calls_before", [0, 1, 2])
def test_an_error_in_the_middle(position: int, calls_before: int) -> None:
    case, program = residual_chain()
    run = Executor(program, case.weights, backend="reference")
    before = []
    for _ in range(calls_before):
        x = case.input(2)
        before.append((run(x), interpret(program, case.weights, (x,))))
    steps = list(run._steps)
    run._steps[position] = replace(steps[position], run=failing(steps[position]))
    with pytest.raises(RuntimeError, match="in the middle"):
        run(case.input(2))
    run._steps = steps
    for _ in range(3):
        x = case.input(2)
        same(run(x), interpret(program, case.weights, (x,)))
    for result, expected in before:
        same(result, expected)
    with pytest.raises(InputError):
        run(case.input(2)[:, :1])


def test_ranks_of_a_partitioned_model() -> None:
    """Payloads are received into kept memory, too; several requests with the same executors."""
    case, _ = residual_chain()
    case.conv("e", "y", 6, C, kernel=(3, 3), residual=None)
    outputs = (Ref("e"), Ref("y"))
    _, ranks = cut(case, 2, outputs=outputs)
    executors = [Executor(r.program, r.weights, backend="reference") for r in ranks]
    program = case.program(outputs)
    results = []
    for batch in (2, 1, 2, 2, 1, 2):
        x = case.input(batch)
        expected = interpret(program, case.weights, (x,))
        found = run_together(executors, (x,), InProcessHub(2).transports())
        results.append((found, expected))
    assert len(results) == 6
    for found, expected in results:
        for result in found:
            same(result, expected)


def test_pieces_do_not_overlap_and_are_aligned() -> None:
    shapes = {1: (2, 3, 5, 7), 2: (1, 1), 3: (0, 4), 4: (2, 3, 5, 7), 5: (3, 17)}
    layout = {}
    for slot, shape in shapes.items():
        x = torch.empty(shape, dtype=torch.bfloat16 if slot == 5 else torch.float32)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        layout[slot] = (x.shape, x.stride(), x.dtype, x.device)
    buffer_of = {1: 0, 2: 1, 3: 2, 4: 3, 5: 1}
    kept = Activations(layout, buffer_of)
    assert set(kept.out) == set(shapes)
    for slot, x in kept.out.items():
        assert (x.shape, x.stride(), x.dtype, x.device) == layout[slot]
        assert not x.numel() or x.data_ptr() % 64 == 0
    assert kept.out[1].data_ptr() % PAGE_BYTES == 0
    for slot in (1, 2, 4):
        kept.out[slot].fill_(slot)
    assert all(bool((kept.out[slot] == slot).all()) for slot in (1, 2, 4))
    assert kept.out[2].data_ptr() == kept.out[5].data_ptr(), "one buffer, used twice"
    assert kept.holds([1, 4], tokens=False) and not kept.holds([1, 2], tokens=False), (
        "only maps are bound"
    )


def test_without_a_layout_nothing_is_kept() -> None:
    assert Activations(None, {1: 0}).out == {}
    assert Activations({}, {}).out == {}


def test_blocks_one_after_another() -> None:
    """What was written onto a residual is in use until its own last reader."""
    case = Case(C, H, W)
    case.conv("a", "x", C, C)
    for i, (block, before) in enumerate(zip("bcd", "abc", strict=True)):
        case.conv(f"inner{i}", before, C, C, kernel=(3, 3), padding=(1, 1))
        case.conv(block, f"inner{i}", C, C, residual=Ref(before), activation="relu")
    case.op("aten.mean.dim", "y", Ref("d"), (2, 3))
    program = case.program()
    plan = plan_buffers(program, kept_of(program))
    assert len({plan[name] for name in "abcd"}) == 1 and len(set(plan.values())) == 2
    check(program, case.weights, [case.input(2), case.input(2), case.input(2)])
