"""The plan: its numbers against hand calculation, its text, its JSON, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

import disco
from disco.errors import InputError
from disco.partition import Plan
from disco.program import Ref
from disco_kernels import LayerPattern, Ownership, Pattern
from tests.partition.harness import Case, cut

NEW_IN_1_2 = (
    *("form", "dense_bytes", "statistics", "statistics_bytes"),
    *("gather", "gather_before"),
)


def _two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1)
    )


def _zero(weight: torch.Tensor, rows: slice, columns: list[int]) -> None:
    with torch.no_grad():
        weight[rows, columns] = 0.0


def test_numbers_of_a_small_plan() -> None:
    """Two nodes; node 0 needs one channel of node 1, node 1 needs two of node 0."""
    model = _two_layers()
    _zero(model[2].weight, slice(0, 3), [4, 5, 7])
    _zero(model[2].weight, slice(3, 6), [1, 3])
    plan = disco.partition(model, (torch.randn(1, 3, 10, 10),), 2, partial_sums=False).plan

    first, second, output = plan.layers
    assert (first.name, second.name, output.name) == ("0", "2", "output")
    assert first.in_counts == () and first.out_counts == (4, 4)
    assert second.in_counts == (4, 4) and second.out_counts == (3, 3)
    assert second.selected_counts == ((0, 1), (2, 0))
    hidden, result = plan.exchanges
    assert hidden.sent == (((), (6,)), ((0, 2), ()))
    assert hidden.bytes_per_image == 3 * 10 * 10 * 4
    assert hidden.bytes_dense == 8 * 10 * 10 * 4
    assert result.bytes_per_image == result.bytes_dense == 6 * 5 * 5 * 4
    assert plan.bytes_matrix == ((0, 2 * 400 + 300), (1 * 400 + 300, 0))
    assert plan.bytes_per_image == 3 * 400 + 600
    assert plan.bytes_dense_exchange == 8 * 400 + 600

    stem = 2 * 100 * 27 * 8
    assert plan.flops_dense == stem + 2 * 25 * 9 * 8 * 6
    assert first.flops == (stem // 2, stem // 2)
    assert second.flops == (2 * 25 * 9 * 3 * 5, 2 * 25 * 9 * 3 * 6)
    assert plan.flops_per_rank == (stem // 2 + second.flops[0], stem // 2 + second.flops[1])

    assert plan.weight_bytes_dense == 4 * (27 * 8 + 8 + 72 * 6 + 6)
    kernels = [4 * (27 * 4 + 4 + 9 * 3 * inputs + 3) for inputs in (5, 6)]
    sends = [4 * (2 + 3), 4 * (1 + 3)]  # int32 positions: of the hidden channels, of the output's
    assert plan.weight_bytes_per_rank == tuple(a + b for a, b in zip(kernels, sends, strict=True))
    assert not plan.replicated


def test_dense_exchange_is_the_baseline() -> None:
    model = _two_layers()
    _zero(model[2].weight, slice(0, 3), [4, 5, 7])
    x = torch.randn(1, 3, 10, 10)
    sparse = disco.partition(model, (x,), 2).plan
    dense = disco.partition(model, (x,), 2, dense_exchange=True).plan
    assert dense.bytes_per_image == dense.bytes_dense_exchange == sparse.bytes_dense_exchange
    assert sparse.bytes_per_image < dense.bytes_per_image
    assert sum(dense.flops_per_rank) == dense.flops_dense == sparse.flops_dense


def test_json_round_trip_and_determinism() -> None:
    x = torch.randn(1, 3, 10, 10)
    plans = [disco.partition(_two_layers(), (x,), 3).plan for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()
    assert plans[0].digest == plans[1].digest
    assert Plan.from_json(plans[0].to_json()) == plans[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plans[0].world_size = 5  # type: ignore[misc]


def test_other_versions_are_refused() -> None:
    content = json.loads(disco.partition(_two_layers(), (torch.randn(1, 3, 9, 9),)).plan.to_json())
    for version in ([2, 0], [1, 5], [0, 9]):
        with pytest.raises(InputError, match=r"this release reads 1\.4"):
            Plan.from_json(json.dumps({**content, "version": version}))
    with pytest.raises(InputError, match="damaged plan"):
        Plan.from_json(json.dumps({**content, "surprise": 1}))
    with pytest.raises(InputError, match="not a plan"):
        Plan.from_json("[]")


def test_plans_of_the_first_version_are_read() -> None:
    """They do not say which activation is fused into a layer, nor in which form it exchanges."""
    plan = disco.partition(_two_layers(), (torch.randn(1, 3, 9, 9),)).plan
    content = json.loads(plan.to_json()) | {"version": [1, 0]}
    assert [layer.pop("activation") for layer in content["layers"]] == ["relu", "none", ""]
    for layer in content["layers"]:
        del layer["form"]
    for exchange in content["exchanges"]:
        for key in (
            "form",
            "dense_bytes",
            "statistics",
            "statistics_bytes",
            "gather",
            "gather_before",
        ):
            del exchange[key]
    del content["nearly_zero"]
    old = Plan.from_json(json.dumps(content))
    assert old.version == (1, 0) and [layer.activation for layer in old.layers] == [""] * 3


def test_the_table_has_a_row_a_layer_and_the_totals() -> None:
    example = (torch.randn(1, 3, 10, 10),)
    plan = disco.partition(_two_layers(), example, 2, partial_sums=False).plan
    lines = str(plan).splitlines()
    assert lines[0].split()[:5] == ["layer", "op", "in", "out", "selected"]
    assert lines[0].split()[5:7] == ["exchange", "activation"]
    assert "#0 d=1.00" in lines[2] and "#1 whole" in lines[3]
    assert "relu" in lines[1].split() and "none" in lines[2].split()
    assert lines[2].split()[:9] == "2 conv2d 2 x 4 2 x 3 2".split()  # noqa: SIM905
    assert "exchanged per image: 0.004 MB, dense exchange 0.004 MB (1.00x)" in str(plan)
    assert "(all nodes: 1.000)" in str(plan)


def test_a_layer_that_shares_an_exchange_says_so() -> None:
    case = Case(3, 4, 4)
    case.conv("a", "x", 6, 3)
    case.conv("b", "a", 4, 6)
    case.conv("c", "a", 4, 6, residual=Ref("b"))
    plan, _ = cut(case, 2)
    notes = {layer.name: layer.note for layer in plan.layers}
    assert notes["b"] == "" and notes["c"] == "shares exchange 0"
    assert plan.layers[2].bytes_per_image == 0
    assert sum(layer.bytes_per_image for layer in plan.layers) == plan.bytes_per_image


def test_tolerance_decides_what_zero_means() -> None:
    """It is about the model's weights, not about the folded ones, which a norm may scale up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight[:2, 2:] = 1e-4
        model[1].weight[2:, :2] = 1e-4
        model[2].weight.fill_(1e3)
    x = torch.randn(1, 3, 4, 4)
    exact, cut_off = (disco.partition(model, (x,), 2, tolerance=t).plan for t in (0.0, 1e-3))
    assert exact.layers[1].selected_counts == ((0, 2), (2, 0))
    assert cut_off.layers[1].selected_counts == ((0, 0), (0, 0))


def test_ownership_and_pattern_are_followed() -> None:
    x = torch.randn(1, 3, 6, 6)
    owned = Ownership(((7, 0, 2), (1, 3, 4, 5, 6)))
    plan = disco.partition(_two_layers(), (x,), 2, ownership={"0": owned}, partial_sums=False).plan
    assert plan.exchanges[0].ownership == owned.channels

    model = _two_layers()
    pattern = disco.sparsify_(model, 2, 0.25, (x,))
    plan = disco.partition(model, (x,), 2, pattern=pattern, partial_sums=False).plan
    assert plan.layers[1].selected_counts == ((0, 1), (1, 0))


def test_a_contradicted_pattern_names_layer_block_and_value() -> None:
    x = torch.randn(1, 3, 6, 6)
    model = _two_layers()
    pattern = disco.sparsify_(model, 2, 0.25, (x,))
    unselected = next(c for c in range(4, 8) if c not in pattern.layers["2"].selected[0][1])
    with torch.no_grad():
        model[2].weight[1, unselected, 0, 0] = 0.625
    with pytest.raises(InputError, match=r"layer '2': block \(0, 1\) holds \|0\.625\|"):
        disco.partition(model, (x,), 2, pattern=pattern)
    plan = disco.partition(model, (x,), 2, partial_sums=False).plan
    assert plan.layers[1].selected_counts[0][1] == 2, "without the record it is simply sent"


@pytest.mark.parametrize("nodes", [0, -1, 1.5, "2", True])
def test_wrong_numbers_of_nodes(nodes: object) -> None:
    for call in (disco.partition, disco.compile):
        with pytest.raises(InputError, match="nodes must be a whole number, 1 or more"):
            call(_two_layers(), example_inputs=(torch.randn(1, 3, 6, 6),), nodes=nodes)  # type: ignore[arg-type]


def test_wrong_ownership_and_tolerance() -> None:
    x = (torch.randn(1, 3, 6, 6),)
    owned = Ownership.contiguous(8, 2)
    with pytest.raises(InputError, match=r"'9', which is no layer .* called like '0', '2'"):
        disco.partition(_two_layers(), x, 2, ownership={"9": owned})
    with pytest.raises(InputError, match="covers 8 channels on 2 nodes; the layer has 6 outputs"):
        disco.partition(_two_layers(), x, 2, ownership={"2": owned})
    with pytest.raises(InputError, match=r"covers 8 channels on 2 nodes; .* 3 nodes"):
        disco.partition(_two_layers(), x, 3, ownership={"0": owned})
    with pytest.raises(InputError, match="tolerance must be a number, 0 or more; given -1.0"):
        disco.partition(_two_layers(), x, 2, tolerance=-1.0)
    inputs = Ownership.contiguous(3, 3)
    none = tuple(((),) * 3 for _ in range(3))
    pattern = Pattern({"0": LayerPattern(Ownership.contiguous(8, 3), inputs, none)})
    with pytest.raises(InputError, match="is for 3 nodes, and the model is partitioned for 2"):
        disco.partition(_two_layers(), x, 2, pattern=pattern)


def test_a_grouped_layer_keeps_its_inputs_ownership() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(InputError, match="'1' is a grouped convolution"):
        owned = Ownership(((0, 1, 2), (3,)))
        disco.partition(model, (torch.randn(1, 3, 6, 6),), 2, ownership={"1": owned})
