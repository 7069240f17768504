"""One-shot sparsification: exact zeros, the best channels, one selection per exchanged tensor."""

from __future__ import annotations

import copy
from itertools import product
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import disco
import disco_kernels as dk
from disco import Cluster, Node
from disco.errors import InputError
from disco_kernels import Ownership, find_selected

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Tied(nn.Module):
    """`a`'s result is read by `b` and `c`; the residual ties their outputs."""

    def __init__(self, width: int = 15) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = nn.Conv2d(width, 12, 3, padding=1)
        self.c = nn.Conv2d(width, 12, 1)
        self.fc = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.fc(torch.relu(self.b(x) + self.c(x)).mean((2, 3)))


def _tied(**options: Any) -> Tied:
    torch.manual_seed(0)
    return Tied(**options)


@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
def test_zeros_counts_and_what_is_left_alone(nodes: int, density: float) -> None:
    model, before = _tied(), _tied()
    pattern = disco.sparsify_(model, nodes, density, (X,))

    assert set(pattern.layers) == {"b", "c", "fc"}
    blocks = 0
    for name, layer in pattern.layers.items():
        new, old = (m.get_submodule(name).weight.detach() for m in (model, before))
        out, inputs = layer.out_ownership, layer.in_ownership
        assert inputs == Ownership.contiguous(old.shape[1], nodes)
        for i, j in product(range(nodes), repeat=2):
            rows, owned = list(out.channels[i]), inputs.channels[j]
            kept = set(layer.selected[i][j])
            assert len(kept) == (0 if i == j else floor(density * len(owned) + 1e-9))
            for channel in owned:
                column = new[rows, channel]
                if i == j or channel in kept:
                    assert torch.equal(column, old[rows, channel])
                else:
                    assert not column.any() and not torch.signbit(column).any()
                blocks += 1
        assert find_selected(new, out, inputs) == layer.selected
    assert blocks == nodes * (15 + 15 + 12)
    for name, value in before.state_dict().items():
        if name not in ("b.weight", "c.weight", "fc.weight"):
            assert torch.equal(model.state_dict()[name], value), name


def test_a_whole_number_that_floating_point_just_misses_is_not_floored() -> None:
    assert floor(0.29 * 100) == 28, "why"
    model = nn.Sequential(nn.Conv2d(3, 200, 1), nn.Conv2d(200, 2, 1))
    pattern = disco.sparsify_(model, 2, 0.29, (X,))
    assert [len(pattern.layers["1"].selected[i][1 - i]) for i in range(2)] == [29, 29]


def test_readers_of_one_tensor_share_the_selection_with_the_largest_weights() -> None:
    model = _tied()
    with torch.no_grad():
        for layer in (model.b, model.c):
            layer.weight.fill_(0.01)
        # Ranks own channels 0-7 and 8-14. Alone, b would take 9 and c 13; together 11 wins.
        model.b.weight[:6, 9] = 1.0
        model.b.weight[:6, 11] = 0.9
        model.c.weight[:6, 13] = 2.0
        model.c.weight[:6, 11] = 1.9
    pattern = disco.sparsify_(model, 2, 1 / 7, (X,))
    assert pattern.layers["b"].selected == pattern.layers["c"].selected
    assert pattern.layers["b"].selected[0][1] == (11,)
    plan = disco.partition(model, (X,), 2).plan
    assert plan.exchanges[0].consumers == ("b", "c")
    assert plan.exchanges[0].sent[0][1] == (11,)


def test_scores_differ() -> None:
    """One large weight wins by l2, many middling ones by l1."""
    chosen = {}
    for score in ("l2", "l1"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1))
        with torch.no_grad():
            model[1].weight.fill_(0.0)
            model[1].weight[0, 2] = 3.0
            model[1].weight[:4, 3] = 1.0
        chosen[score] = disco.sparsify_(model, 2, 0.5, (X,), score=score).layers["1"].selected[0][1]
    assert chosen == {"l2": (2,), "l1": (3,)}


@pytest.mark.parametrize("nodes", [2, 3])
def test_partition_then_sends_that_much_less(nodes: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 30, 3, padding=1),
        nn.BatchNorm2d(30),
        nn.ReLU(),
        nn.Conv2d(30, 30, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(30, 30, 3, padding=1),
    )
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(30, 3)).eval()
    dense = disco.partition(model, (X,), nodes, dense_exchange=True).plan
    pattern = disco.sparsify_(model, nodes, 0.2, (X,))
    partitioned = disco.partition(model, (X,), nodes, pattern=pattern)
    plan = partitioned.plan
    output = plan.exchanges[-1].bytes_per_image
    assert dense.bytes_per_image - output >= 5 * (plan.bytes_per_image - output) > 0
    x = torch.randn(4, 3, 8, 8)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    error, scale = float((partitioned(x) - exact).abs().max()), float(exact.abs().max())
    assert error <= 16 * torch.finfo(torch.float32).eps * scale
    off = float((_dense_again(model, X)(x) - exact).abs().max())
    assert off > 1e-3 * scale, "the zeros matter, so the comparison means something"


def _dense_again(model: nn.Module, x: Tensor) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter[parameter == 0] = 0.05
    return disco.partition(other, (x,), 2)


def test_a_module_used_twice_gets_one_pattern() -> None:
    """Its parameter has one set of zeros, so both tensors that it reads are selected alike."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)
            self.b = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    model = Twice()
    pattern = disco.sparsify_(model, 2, 0.25, (X,))
    plan = disco.partition(model, (X,), 2, pattern=pattern).plan
    assert [len(e.sent[0][1]) for e in plan.exchanges] == [1, 1, 4]
    assert plan.exchanges[0].sent == plan.exchanges[1].sent


def test_a_module_that_reads_two_ownerships_is_left_dense() -> None:
    """No zeros of its one parameter fit both: a concatenation is not owned in one range."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)
            self.b = nn.Conv2d(8, 4, 1)
            self.c = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x))
            return self.b(torch.cat([y, self.c(y)], 1))

    model = Twice()
    before = model.b.weight.detach().clone()
    assert set(disco.sparsify_(model, 2, 0.5, (X,)).layers) == {"c"}
    assert torch.equal(model.b.weight, before)


def test_a_tensor_that_travels_whole_anyway_is_left_dense() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)
            self.b = nn.Conv2d(8, 8, 1)
            self.c = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(self.b(x) + x.flip(1))

    model = Norm()
    before = model.b.weight.detach().clone()
    pattern = disco.sparsify_(model, 2, 0.25, (X,))
    assert set(pattern.layers) == {"c"}
    assert torch.equal(model.b.weight, before)


def test_a_model_with_nothing_to_drop_is_told() -> None:
    with pytest.raises(InputError, match=r"no layer whose inputs could be exchanged in part: 0"):
        disco.sparsify_(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), 2, 0.2, (X,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": -0.1}, r"density must be in \[0, 1\].* given -0\.1"),
        ({"density": 1.5}, "given 1.5"),
        ({"density": float("nan")}, "given nan"),
        ({"score": "taylor"}, "score must be one of l2, l1; given 'taylor'"),
        ({"nodes": 0}, "nodes must be a whole number"),
    ],
)
def test_wrong_arguments_change_nothing(options: dict[str, Any], message: str) -> None:
    model, before = _tied(), _tied()
    with pytest.raises(InputError, match=message):
        disco.sparsify_(model, **{"nodes": 2, "density": 0.2, "example_inputs": (X,), **options})
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_gradients_still_reach_what_is_kept() -> None:
    model = _tied()
    disco.sparsify_(model, 2, 0.2, (X,))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model.b.weight.requires_grad and model.b.weight.grad is not None


@pytest.mark.parametrize("group_size", [2, 4, 8])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
def test_channels_are_chosen_in_groups(group_size: int, density: float) -> None:
    """Neighbours in the sender's channels, as many groups as fit; the last group may be smaller."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 42, 1), nn.ReLU(), nn.Conv2d(42, 8, 1))
    pattern = disco.sparsify_(model, 2, density, (X,), group_size=group_size)
    layer = pattern.layers["2"]
    for i in range(2):
        chosen = layer.selected[i][1 - i]
        places = [c - 21 * (1 - i) for c in chosen]
        budget = floor(density * 21 + 1e-9)
        assert budget - group_size < len(chosen) <= budget
        for place in places:
            first = place - place % group_size
            assert set(range(first, min(first + group_size, 21))) <= set(places)
    if density == 1.0:
        assert all(len(layer.selected[i][1 - i]) == 21 for i in range(2))


def test_a_group_is_as_good_as_its_channels_are_on_average() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        model[1].weight[:] = torch.tensor([3.0, 0.0, 2.5, 2.5, 1.0, 1.0, 0.0, 1.9])[
            None, :, None, None
        ]
    alone = disco.sparsify_(copy.deepcopy(model), 2, 0.5, (X,)).layers["1"].selected
    pairs = disco.sparsify_(model, 2, 0.5, (X,), group_size=2).layers["1"].selected
    assert (alone[1][0], alone[0][1]) == ((0, 2), (4, 7))
    assert (pairs[1][0], pairs[0][1]) == ((2, 3), (6, 7))


@pytest.mark.parametrize("group_size", [0, 3, 16, -1, 2.0, True, "2"])
def test_other_group_sizes_are_refused(group_size: object) -> None:
    with pytest.raises(InputError, match="group_size must be one of 1, 2, 4, 8 channels; given"):
        disco.sparsify_(_tied(), 2, 0.5, (X,), group_size=group_size)  # type: ignore[arg-type]


def test_groups_make_longer_runs() -> None:
    """Three receivers of every tensor, whose selections no order can all make runs."""
    lengths = []
    for group_size in (1, 8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 64, 1)).eval()
        pattern = disco.sparsify_(model, 4, 0.5, (X,), group_size=group_size)
        plan = disco.partition(model, (X,), 4, pattern=pattern, partial_sums=False).plan
        lengths.append(plan.gather.channels / plan.gather.runs)
    assert lengths[1] > lengths[0] > 1


@pytest.mark.parametrize("density", ["0.2", None, float("nan"), 1.1])
def test_a_density_that_is_none_is_refused(density: object) -> None:
    model, x = nn.Conv2d(3, 4, 1).eval(), torch.randn(2, 3, 4, 4)
    with pytest.raises(InputError, match=r"density must be in \[0, 1\]"):
        disco.sparsify_(model, 2, density, (x,))  # type: ignore[arg-type]


class _Attention(nn.Module):
    """torch keeps the projections of queries, keys and values in a parameter without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.Linear(12, 24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grow(x))
        return self.attention(x, x, x, need_weights=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("nodes", [2, 3, Cluster([Node("a", 3.0), Node("b", 1.0)])])
def test_the_pattern_of_a_parameter_without_a_module(nodes: int | Cluster, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Attention().eval()
    x = torch.randn(2, 5, 12)
    pattern = disco.sparsify_(model, nodes, 0.3, (x,))
    assert "attention.in_proj_weight" in pattern.layers
    pattern.save(tmp_path / "pattern.json")
    pattern = dk.Pattern.load(tmp_path / "pattern.json")
    partitioned = disco.partition(model, (x,), nodes, pattern=pattern)
    exact = copy.deepcopy(model).double()(x.double())
    assert float((partitioned(x) - exact).abs().max()) <= 1e-5 * float(exact.abs().max())
    dense = disco.partition(model, (x,), nodes, pattern=pattern, dense_exchange=True)
    assert partitioned.plan.bytes_per_image < dense.plan.bytes_per_image
    model.attention.in_proj_weight.fill_(0.5)
    with pytest.raises(InputError, match=r"attention\.in_proj_weight"):
        disco.partition(model, (x,), nodes, pattern=pattern)
