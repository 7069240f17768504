"""Layers that send partial sums of their outputs where those are fewer bytes than their inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import disco
from disco.partition import Plan
from disco.program import Ref
from disco_kernels import ACTIVATIONS, Ownership
from tests.partition.harness import Case, check_exact, cut, ownerships
from tests.partition.test_rules import property_test, world_sizes

pytestmark = pytest.mark.filterwarnings("ignore:disco_kernels.*:RuntimeWarning")


def _forms(plan: Plan) -> dict[str, str]:
    return {layer.name: layer.form for layer in plan.layers if layer.form}


@property_test
@given(st.data(), world_sizes, st.booleans(), st.booleans())
def test_convolutions_with_few_small_outputs(
    data: st.DataObject, world_size: int, residual: bool, other_owner: bool
) -> None:
    """Any ownership, sparse or dense, with bias, residual and activation after the addition."""
    case = Case(3, 7, 6)
    case.conv("a", "x", 7, 3)
    case.conv("skip", "x", 4, 3, stride=(2, 2))
    case.conv(
        "b",
        "a",
        4,
        7,
        kernel=(3, 3),
        stride=(2, 2),
        padding=(1, 1),
        activation=data.draw(st.sampled_from(ACTIVATIONS)),
        zero_columns=data.draw(st.sampled_from([0.0, 0.6, 0.9, 1.0])),
        residual=Ref("skip") if residual else None,
    )
    owned = {
        "a": data.draw(ownerships(7, world_size)),
        "skip": data.draw(ownerships(4, world_size)),
    }
    if other_owner:
        owned["b"] = data.draw(ownerships(4, world_size))
    inputs = check_exact(case, world_size, owned)
    sums = check_exact(case, world_size, owned, partial_sums=True)
    assert sums.bytes_per_image <= inputs.bytes_per_image
    assert sum(sums.flops_per_rank) >= sum(map(max, [la.flops for la in sums.layers if la.flops]))


@property_test
@given(st.data(), world_sizes, st.integers(1, 6), st.sampled_from([0.0, 0.5, 0.9]))
def test_linears(data: st.DataObject, world_size: int, outputs: int, zeros: float) -> None:
    case = Case(5, 3)
    case.linear("a", "x", 6, 3)
    case.linear("b", "a", outputs, 6, activation="gelu", zero_columns=zeros)
    owned = {
        "a": data.draw(ownerships(6, world_size)),
        "b": data.draw(ownerships(outputs, world_size)),
    }
    inputs = check_exact(case, world_size, owned)
    sums = check_exact(case, world_size, owned, partial_sums=True)
    assert sums.bytes_per_image <= inputs.bytes_per_image
    if sums.bytes_per_image == inputs.bytes_per_image:
        assert sums == inputs, "of equals inputs are sent"


def test_bytes_are_those_of_the_rows_that_are_not_zero() -> None:
    """Two nodes, four inputs each, one output each; node 0 reads two inputs of node 1."""
    case = Case(3, 4, 4)
    case.conv("a", "x", 8, 3)
    case.conv("b", "a", 2, 8)
    case.weights["b.weight"][1, :4] = 0.0
    case.weights["b.weight"][0, 5:7] = 0.0
    plan = check_exact(case, 2, partial_sums=True)
    assert _forms(plan) == {"b": "partial sums"}
    exchange = plan.exchanges[0]
    assert exchange.form == "partial sums" and exchange.consumers == ("b",)
    assert exchange.bytes_per_image == 16 * 8, "one map of float64 instead of two"
    assert exchange.bytes_dense == 8 * 16 * 8, "what sending all inputs would cost"
    assert plan.layers[1].selected_counts == ((0, 1), (0, 0))
    assert plan.layers[1].flops == (2 * 16 * 4, 2 * 16 * 4 + 2 * 16 * 2)


def test_readers_of_one_tensor_leave_its_exchange_together_or_not_at_all() -> None:
    """Alone neither saves a byte: what one leaves the other still needs."""
    case = Case(3, 4, 4)
    case.conv("a", "x", 8, 3)
    case.conv("b", "a", 2, 8)
    case.conv("c", "a", 2, 8)
    together = check_exact(case, 2, outputs=(Ref("b"), Ref("c")), partial_sums=True)
    assert _forms(together) == {"b": "partial sums", "c": "partial sums"}
    dense = [e.bytes_dense for e in together.exchanges if e.form == "partial sums"]
    assert dense == [8 * 16 * 8, 0], "the inputs of both, once"
    case.conv("d", "a", 12, 8)
    outputs = (Ref("b"), Ref("c"), Ref("d"))
    mixed = check_exact(case, 2, outputs=outputs, partial_sums=True)
    assert set(_forms(mixed).values()) == {"inputs"}


def test_a_tensor_that_is_needed_whole_anyway_is_sent() -> None:
    case = Case(3, 4, 4)
    case.conv("a", "x", 8, 3)
    case.conv("b", "a", 1, 8)
    plan = check_exact(case, 2, outputs=(Ref("a"), Ref("b")), partial_sums=True)
    assert _forms(plan) == {"b": "inputs"}


def test_ranks_that_own_nothing_compute_for_others() -> None:
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.conv("b", "a", 2, 6, activation="relu")
    owned = {"a": Ownership(((), (0, 1, 2), (3, 4, 5))), "b": Ownership(((1, 0), (), ()))}
    plan = check_exact(case, 3, owned, partial_sums=True)
    assert _forms(plan) == {"b": "partial sums"}
    assert plan.layers[1].selected_counts == ((0, 2, 2), (0, 0, 0), (0, 0, 0))


def test_the_dense_baseline_sends_inputs() -> None:
    case = Case(3, 4, 4)
    case.conv("a", "x", 8, 3)
    case.conv("b", "a", 2, 8)
    plan, _ = cut(case, 2, dense_exchange=True, partial_sums=True)
    assert _forms(plan) == {"b": "inputs"}


def test_squeeze_and_excitation_of_a_partitioned_model() -> None:
    """The squeezing layer has few outputs; the plan's text names the form."""
    torch.manual_seed(0)
    squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 2, 1), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), squeeze, nn.Conv2d(2, 8, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    partitioned = disco.partition(model, (x,), 2)
    assert _forms(partitioned.plan)["2.1"] == "partial sums"
    assert "partial sums" in str(partitioned.plan)
    inputs = disco.partition(model, (x,), 2, partial_sums=False).plan
    assert set(_forms(inputs).values()) == {"inputs"}
    assert partitioned.plan.bytes_per_image < inputs.bytes_per_image
    with torch.no_grad():
        exact = model.double()(x.double())
        error = float((partitioned(x) - exact).abs().max())
    assert error <= 16 * torch.finfo(torch.float32).eps * float(exact.abs().max())
