"""Predicted memory against what the executor really holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import disco
from disco.executor import Executor, InProcessHub, run_together
from disco.program import Op, Program, Ref, WeightRef
from disco.zoo import build_model
from disco_kernels import Ownership
from disco_kernels.backends.cpu import extension_status
from tests.partition.harness import Case, cut

needs_extension = pytest.mark.skipif(
    extension_status().error is not None, reason=f"no extension: {extension_status().error}"
)


def test_a_chain_by_hand() -> None:
    """float64; two ranks; two maps of 4 x 4 are alive at once, the input besides."""
    case = Case(3, 4, 4)
    case.conv("a", "x", 8, 3)
    case.conv("b", "a", 4, 8)
    plan, ranks = cut(case, 2, {"a": Ownership(((0, 1, 2, 3, 4), (5, 6, 7)))})
    first, second = plan.memory
    # Sent and received: 5 and 3 hidden channels, 2 of the output each way, 16 pixels each.
    assert first.message_bytes == second.message_bytes == (5 + 3 + 2 + 2) * 16 * 8
    # Input, own part of both maps, each rounded up to lines; the whole output is assembled.
    assert first.activation_bytes == (3 + 5 + 2) * 16 * 8 + 4 * 16 * 8
    assert second.activation_bytes == (3 + 3 + 2) * 16 * 8 + 4 * 16 * 8
    # Outputs padded to 16; biases and int32 positions as they are.
    matrices = 16 * 3 * 8 + 16 * 8 * 8
    other = [
        sum(w.nbytes for name, w in rank.weights.items() if not name.endswith(".weight"))
        for rank in ranks
    ]
    assert [m.weight_bytes for m in plan.memory] == [matrices + o for o in other]
    assert first.total_bytes == first.weight_bytes + first.activation_bytes + first.message_bytes


def test_views_and_dead_values_cost_nothing() -> None:
    case = Case(4, 4, 4)
    case.conv("a", "x", 4, 4)
    case.op("aten.relu.default", "r", Ref("a"))
    case.op("aten.permute.default", "p", Ref("r"), (0, 2, 3, 1))
    case.op("aten.add.Tensor", "s", Ref("p"), 1.0)
    case.op("aten.mul.Tensor", "t", Ref("s"), 2.0)
    plan, _ = cut(case, 1)
    one = 4 * 16 * 8
    # The input, a's buffer, and of r, s and t at most two: p looks at r until s is there.
    assert plan.memory[0].activation_bytes == one + one + 2 * one


@needs_extension
@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@torch.no_grad()
def test_of_a_whole_model(name: str, nodes: int) -> None:
    """Packed weights within 3% (their headers), buffers and messages exactly."""
    model, x = build_model("torchvision", name).eval(), torch.randn(1, 3, 64, 64)
    if nodes > 1:
        disco.sparsify_(model, nodes, 0.2, (x,))
    partitioned = disco.partition(model, (x,), nodes)
    executors = [Executor(r.program, r.weights) for r in partitioned.ranks]
    for _ in range(2):
        run_together(executors, (x,), InProcessHub(nodes).transports())
    for memory, rank, executor in zip(
        partitioned.plan.memory, partitioned.ranks, executors, strict=True
    ):
        (known,) = executor._buffers._known.values()
        (kept,) = known.free
        buffers = [b for e in kept.exchanges.values() for b in (*e.incoming, *e.outgoing)]
        assert memory.message_bytes == sum(message.nbytes for _, message in buffers)
        maps = {view.untyped_storage().data_ptr(): view for view in kept.activations.out.values()}
        held = sum(view.untyped_storage().nbytes() for view in maps.values())
        assert held <= memory.activation_bytes + (4 << 20), "an allocation is whole pages of 2 MB"
        used = {
            (view.data_ptr(), view.nbytes) for view in kept.activations.out.values() if view.nbytes
        }
        end = max(begin + size for begin, size in used)
        assert end - min(begin for begin, _ in used) <= memory.activation_bytes
        packed = _matrix_bytes(rank.program, rank.weights, _lanes())
        assert executor.packed_bytes == pytest.approx(packed, rel=0.03)
        # The plan knows no machine, so it counts with the widest vectors.
        unpacked = sum(w.nbytes for w in _unpacked(rank.program, rank.weights))
        assert memory.weight_bytes == _matrix_bytes(rank.program, rank.weights, 16) + unpacked


def _lanes() -> int:
    """float32 values in a vector of the instruction set in use."""
    isa = extension_status().isa
    assert isa is not None
    return 16 if isa.startswith("avx512") else {"avx2": 8, "neon": 4, "scalar": 4}[isa]


def _unpacked(program: Program, weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    matrices = {_weight_of(op) for op in program.ops}
    return [w for name, w in weights.items() if name not in matrices]


def _matrix_bytes(program: Program, weights: dict[str, torch.Tensor], lanes: int) -> int:
    """Outputs padded to whole vectors."""
    total = 0
    for op in program.ops:
        name = _weight_of(op)
        if name is not None:
            weight = weights[name]
            outputs = weight.shape[0]
            total += weight.nbytes // max(outputs, 1) * (-(-outputs // lanes) * lanes)
    return total


def _weight_of(op: Op) -> str | None:
    """Of the matrix that a kernel packs, or None."""
    if not _is_matrix(op) or not isinstance(op.args[1], WeightRef):
        return None
    return op.args[1].name


def _is_matrix(op: Op) -> bool:
    return op.kind in (
        "disco.conv2d",
        "disco.linear",
        "disco.partial_conv2d",
        "disco.partial_linear",
    )


def test_it_is_small_where_a_rank_has_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    owned = Ownership((tuple(range(8)), ()))
    plan = disco.partition(
        model,
        (torch.randn(1, 3, 8, 8),),
        2,
        ownership={"0": owned, "2": Ownership.contiguous(8, 2)},
    ).plan
    assert plan.memory[1].weight_bytes < plan.memory[0].weight_bytes
