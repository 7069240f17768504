"""Co-location: less is lost by pruning, never more, and nothing else changes."""

from __future__ import annotations

import builtins
import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disco
from disco import Cluster, Node
from disco.errors import InputError
from disco.small_models import small_model
from disco.sparsify import find_groups, tensors_of
from disco.sparsify.groups import Group
from disco.sparsify.lost_score import Scores, score_matrices
from disco.sparsify.scores import weight_scores
from disco.sparsify.selection import select_uniform
from tests.sparsify.nets import random_net
from tests.sparsify.permuted import check_same_function, make_local_, permuted_copy, trained_like

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
UNEVEN = Cluster([Node("a", speed_gflops=3), Node("b", speed_gflops=1), Node("c", speed_gflops=2)])
CLUSTERS = {"2": Cluster(2), "4": Cluster(4), "8": Cluster(8), "uneven": UNEVEN}


def model_named(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return trained_like(small_model(name)(10, 16))


def groups_of(model: nn.Module, cluster: Cluster, density: float = 0.2) -> list[Group]:
    return find_groups(model, cluster, density, (X,))


def zeroed(before: nn.Module, after: nn.Module, power: int = 2) -> float:
    """Sum of squares (or magnitudes) of the weights that `after` lacks."""
    pairs = zip(tensors_of(before).values(), tensors_of(after).values(), strict=True)
    return sum(float(((a - b).detach().double().abs() ** power).sum()) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "nodes"), [*(("resnet8", nodes) for nodes in CLUSTERS), ("deit_micro", "4")]
)
def test_less_is_lost_and_the_report_says_how_much(name: str, nodes: str) -> None:
    cluster, model = CLUSTERS[nodes], model_named(name)
    before = copy.deepcopy(model)
    report = disco.colocate_(model, cluster, (X,), starts=0)

    check_same_function(before, model, X)
    assert groups_of(before, cluster) == groups_of(model, cluster)  # the usual ownership
    assert report.lost_after < 0.99 * report.lost_before < report.remote
    assert report.num_moved > 0
    for dense, lost in ((before, report.lost_before), (model, report.lost_after)):
        pruned = copy.deepcopy(dense)
        disco.sparsify_(pruned, cluster, 0.2, (X,))
        assert zeroed(dense, pruned) == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize("score", ["l2", "l1"])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_other_scores_and_densities(score: str, density: float) -> None:
    model = model_named("resnet8")
    before = copy.deepcopy(model)
    report = disco.colocate_(model, 2, (X,), density, score, starts=0)
    pruned = copy.deepcopy(model)
    disco.sparsify_(pruned, 2, density, (X,), score)
    power = 2 if score == "l2" else 1
    assert zeroed(model, pruned, power) == pytest.approx(report.lost_after, rel=1e-6, abs=1e-12)
    if density == 1.0:
        assert report.lost_before == report.lost_after == report.num_moved == 0
        assert zeroed(before, model) == 0
    else:
        assert report.lost_after < report.lost_before


@pytest.mark.parametrize("seed", range(8))
def test_random_models_never_lose_more(seed: int) -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    model = trained_like(random_net(seed), seed)
    before = copy.deepcopy(model)
    nodes = (2, 3, 4, 8)[seed % 4]
    report = disco.colocate_(model, nodes, (x,), 0.1 * (seed % 5), starts=1, seed=seed)
    assert report.lost_after <= report.lost_before
    check_same_function(before, model, x)


@pytest.mark.parametrize(("name", "nodes"), [("resnet8", 2), ("resnet20", 2), ("deit_micro", 4)])
def test_what_was_shuffled_is_put_right(name: str, nodes: int) -> None:
    """Nodes that need nothing of each other, their channels then shuffled over all of them."""
    model = model_named(name)
    make_local_(model, nodes, X)
    shuffled, _ = permuted_copy(model, X)
    report = disco.colocate_(shuffled, nodes, (X,), 0.0, starts=8)
    assert report.lost_before > 10
    assert report.lost_after <= 1e-12 * report.lost_before
    check_same_function(model, shuffled, X)
    sent = [disco.partition(m, (X,), nodes).plan.bytes_per_image for m in (model, shuffled)]
    assert sent[0] == sent[1]


def test_equal_calls_give_equal_models() -> None:
    models = [model_named("resnet8") for _ in range(2)]
    reports = [disco.colocate_(model, 4, (X,), starts=1, seed=3) for model in models]
    assert reports[0] == reports[1]
    for a, b in zip(tensors_of(models[0]).values(), tensors_of(models[1]).values(), strict=True):
        assert torch.equal(a, b)
    again = disco.colocate_(models[0], 4, (X,), starts=0)
    assert again.lost_after <= again.lost_before == pytest.approx(reports[0].lost_after)


class Mixed(nn.Module):
    """`a`'s channels are shuffled, `d`'s are an output; `b`'s are free, and `c`'s groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 3, padding=1)
        self.d = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = x.flip(1)
        return self.d(torch.relu(self.c(torch.relu(self.b(x)))))


def test_classes_that_cannot_move_are_listed_and_left_alone() -> None:
    model = Mixed()
    before = copy.deepcopy(model)
    report = disco.colocate_(model, 4, (X,))
    assert [c.name for c in report.classes] == ["c", "b"]  # as the groups read them
    assert report.left_alone == {"d (8)": "is of an output of the model"}
    assert torch.equal(before.a.weight, model.a.weight)
    assert torch.equal(before.d.bias, model.d.bias)
    check_same_function(before, model, X)
    text = str(report)
    assert "lost score" in text and "left alone (is of an output of the model): d (8)" in text


def test_moved_counts_are_those_of_the_weights() -> None:
    model = Mixed()
    before = copy.deepcopy(model)
    report = disco.colocate_(model, 4, (X,))
    for found in report.classes:
        old, new = (getattr(m, found.name).bias.tolist() for m in (before, model))
        rank = {value: place // 4 for place, value in enumerate(old)}
        moved = sum(rank[value] != place // 4 for place, value in enumerate(new))
        assert moved == found.moved


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6])
def test_lost_is_what_selection_drops(density: float) -> None:
    model = model_named("resnet8")
    tensors = tensors_of(model)
    groups = groups_of(model, UNEVEN, density)
    scores = Scores(groups, density, score_matrices(tensors, groups, "l2"))
    for number, group in enumerate(groups):
        columns = weight_scores(tensors, group)
        kept = select_uniform(columns, group, density, 1)
        np.testing.assert_allclose(scores.columns(number), columns.numpy(), rtol=1e-12)
        assert np.array_equal(scores.dropped(number), ~kept.numpy())
    assert scores.lost(range(len(groups))) > 0


def test_training_mode_and_gradients_are_left() -> None:
    model = model_named("resnet8").train()
    disco.colocate_(model, 2, (X,), starts=0)
    assert model.training and all(p.requires_grad and p.is_leaf for p in model.parameters())
    model(X).sum().backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"density": 1.5}, "density must be in"),
        ({"score": "taylor"}, "score must be one of l2, l1"),
        ({"starts": -1}, "starts must be a whole number"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"nodes": 0}, "nodes must be a whole number"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], message: str) -> None:
    model = model_named("resnet8")
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=message):
        disco.colocate_(model, **{"nodes": 2, "example_inputs": (X,), **changed})
    assert zeroed(before, model) == 0


def test_weights_that_are_not_finite() -> None:
    model = model_named("resnet8")
    with torch.no_grad():
        model.get_parameter("fc.weight")[0, 0] = torch.nan
    with pytest.raises(InputError, match="'fc.weight' are not finite"):
        disco.colocate_(model, 2, (X,))


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"scipy, which is not installed: pip install"):
        disco.colocate_(model_named("resnet8"), 2, (X,))
