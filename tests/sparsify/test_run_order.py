"""Channels put in order for reading in groups: the same function, pattern and owners."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disco
from disco.capture import capture
from disco.errors import InputError
from disco.partition import decide
from disco.partition.one_machine import SkippingLayer, skipping_layers
from disco.partition.read_groups import ChannelsRead, channels_read, in_whole_groups
from disco.small_models import small_model
from disco.sparsify import tensors_of
from disco_kernels.pattern import LayerPattern, Ownership
from tests.sparsify.permuted import check_same_function, trained_like

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def sparse(name: str, nodes: int, density: float = 0.2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = trained_like(small_model(name)(10, 16))
    disco.sparsify_(model, nodes, density, (X,))
    return model


def read_by(layers: Iterable[SkippingLayer], group_size: int) -> ChannelsRead:
    counted = (
        channels_read(a.inputs, a.selected, in_whole_groups(a.inputs, a.selected, group_size))
        for a in layers
    )
    return sum(counted, ChannelsRead())


def layers_of(model: nn.Module, nodes: int) -> list[SkippingLayer]:
    return skipping_layers(decide(*capture(model, (X,)), nodes))


def counts_of(layers: Iterable[SkippingLayer]) -> dict[str, Any]:
    """By layer its owners and how many channels each receiver selects of each sender."""
    return {
        layer.op.name: (layer.outputs, layer.inputs, [[*map(len, row)] for row in layer.selected])
        for layer in layers
    }


@pytest.mark.parametrize(
    ("name", "nodes", "group_size"),
    [("resnet8-w48", 2, 8), ("resnet8-w48", 3, 1), ("deit_micro-w96", 2, 8)],
)
def test_less_is_read_and_nothing_else_changes(name: str, nodes: int, group_size: int) -> None:
    model = sparse(name, nodes)
    before = copy.deepcopy(model)
    report = disco.order_channels_(model, nodes, (X,), group_size=group_size)
    check_same_function(before, model, X)
    old, new = layers_of(before, nodes), layers_of(model, nodes)
    assert counts_of(old) == counts_of(new)
    assert report.before == read_by(old, group_size)
    assert report.after == read_by(new, group_size)
    assert report.before.density == report.after.density < 0.2
    if group_size == 1:
        assert report.before == report.after
        assert report.runs_after < report.runs_before
    else:
        assert report.after.effective_density < 0.8 * report.before.effective_density
    assert f"{report.after.effective_density:.3f}" in str(report)


def test_selections_of_two_nodes_are_runs_beside_what_the_reader_owns() -> None:
    """A chain in which nothing is tied: two nodes read one run each, own channels included."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 16, 1)
    ).eval()
    disco.sparsify_(model, 2, 0.25, (X,))
    report = disco.order_channels_(model, 2, (X,))
    assert not [name for name in report.left_alone if name.startswith(("0", "2"))]
    layers = layers_of(model, 2)
    assert len(layers) == 2
    for layer in layers:
        pattern = LayerPattern(layer.outputs, layer.inputs, layer.selected)
        for rank, own in enumerate(layer.inputs.channels):
            read = pattern.input_channels(rank)
            assert list(read) == list(range(min(read), max(read) + 1))
            assert len(read) == len(own) * 1.25
    assert report.runs_after == 4  # two layers, two receivers


def test_doing_it_twice_changes_nothing() -> None:
    model = sparse("resnet8-w48", 2)
    disco.order_channels_(model, 2, (X,))
    before = copy.deepcopy(model)
    report = disco.order_channels_(model, 2, (X,))
    assert report.before == report.after and report.runs_before == report.runs_after
    for a, b in zip(tensors_of(before).values(), tensors_of(model).values(), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_a_permuted_model_compiles_exactly_in_groups() -> None:
    model = sparse("resnet8-w48", 2)
    disco.order_channels_(model, 2, (X,), group_size=4)
    exact = copy.deepcopy(model).double()(X.double())
    layers = layers_of(model, 2)
    for group_size in (1, 4, 8):
        compiled = disco.compile(
            model, 2, example_inputs=(X,), winograd="off", group_size=group_size
        )
        error = float((compiled(X) - exact).abs().max() / exact.abs().max())
        assert error <= 64 * torch.finfo(torch.float32).eps
        # Where groups leave next to nothing to skip, a layer is dense.
        read = compiled.channels_read
        left = [layer for layer in layers if layer.op.name in read]
        assert sum(read.values(), ChannelsRead()) == read_by(left, group_size)
        assert compiled.effective_density == read_by(left, group_size).effective_density
        assert compiled.gathered == tuple(read) != ()


def test_what_is_read_without_weights_counts_for_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)).eval()
    x = torch.randn(2, 16, 4, 4)
    disco.sparsify_(model, 2, 0.25, (x,))
    whole = disco.compile(model, 2, example_inputs=(x,), group_size=8)
    few = disco.compile(model, 2, example_inputs=(x,), group_size=1)
    assert whole.effective_density > few.effective_density == pytest.approx(0.25)
    scale = float(few(x).abs().max())
    assert float((whole(x) - few(x)).abs().max()) <= 64 * torch.finfo(torch.float32).eps * scale


class Tied(nn.Module):
    """Joined channels whose places lie on different ranks for different readers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a = nn.Conv2d(3, 24, 3, padding=1)
        self.b = nn.Conv2d(24, 24, 3, padding=1)
        self.c = nn.Conv2d(48, 32, 1)
        self.d = nn.Conv2d(32, 32, 3, groups=4)
        self.e = nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        joined = torch.cat([a, torch.relu(self.b(a))], dim=1)
        return self.e(torch.relu(self.d(torch.relu(self.c(joined)))))


@pytest.mark.parametrize("nodes", [2, 4])
def test_concatenations_and_groups(nodes: int) -> None:
    model = Tied().eval()
    disco.sparsify_(model, nodes, 0.3, (X,))
    before = copy.deepcopy(model)
    report = disco.order_channels_(model, nodes, (X,), group_size=4)
    check_same_function(before, model, X)
    assert counts_of(layers_of(before, nodes)) == counts_of(layers_of(model, nodes))
    assert report.after.read <= report.before.read


def test_the_batch_norm_follows() -> None:
    """Its statistics are buffers, which move along."""
    model = sparse("resnet8-w48", 2)
    means = [b.clone() for n, b in model.named_buffers() if n.endswith("running_mean")]
    disco.order_channels_(model, 2, (X,))
    after = [b for n, b in model.named_buffers() if n.endswith("running_mean")]
    assert any(not torch.equal(a, b) for a, b in zip(means, after, strict=True))
    for a, b in zip(means, after, strict=True):
        assert np.array_equal(np.sort(a.numpy()), np.sort(b.numpy()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes must be a whole number, 1 or more; given 0"),
        ({"nodes": True}, "given True"),
        ({"group_size": 3}, "group_size must be one of 1, 2, 4, 8"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 20, 3)).eval()
    disco.sparsify_(model, 2, 0.2, (X,))
    before = copy.deepcopy(model)
    arguments: dict[str, Any] = {"nodes": 2, **options}
    with pytest.raises(InputError, match=message):
        disco.order_channels_(model, example_inputs=(X,), **arguments)
    for a, b in zip(tensors_of(before).values(), tensors_of(model).values(), strict=True):
        assert torch.equal(a, b)


def test_a_dense_model_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 20, 3)).eval()
    with pytest.raises(InputError, match="Sequential has no layer whose zeros are a pattern of 2"):
        disco.order_channels_(model, 2, (X,))


def test_compile_refuses_other_groups() -> None:
    with pytest.raises(InputError, match="group_size must be one of"):
        disco.compile(nn.Linear(4, 4), 2, example_inputs=(torch.randn(2, 4),), group_size=16)


def test_an_order_of_one_run_is_read_as_one() -> None:
    owned = Ownership(((0, 1, 2, 3), (4, 5, 6, 7)))
    pattern = LayerPattern(owned, owned, (((), (4, 5)), ((2, 3), ())))
    assert pattern.input_channels(0) == (0, 1, 2, 3, 4, 5)
    assert pattern.input_channels(1) == (2, 3, 4, 5, 6, 7)
    apart = LayerPattern(owned, owned, (((), (5,)), ((0,), ())))
    assert apart.input_channels(1) == (4, 5, 6, 7, 0)
