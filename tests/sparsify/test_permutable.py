"""What may be permuted is found, moves without changing the function, and all else stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from disco.errors import InputError
from disco.small_models import SMALL_MODELS, small_model
from disco.sparsify import tensors_of
from disco.sparsify.permute import Permutable, find_permutable, permute_
from disco.sparsify.permute.axes import Axes
from disco.zoo import build_model
from tests.sparsify.permuted import check_same_function, permuted_copy, trained_like

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A model of layers and a function of them."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], object], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, layer in layers.items():
            self.add_module(name, copy.deepcopy(layer))
        self._forward = forward

    def forward(self, x: Tensor) -> object:
        return self._forward(self, x)


def conv(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


def head(x: Tensor, layer: nn.Module) -> Tensor:
    out: Tensor = layer(x.mean((2, 3)))
    return out


def attended(model: nn.Module, x: Tensor, need_weights: bool) -> Tensor:
    tokens = model.a(x).flatten(2).transpose(1, 2)
    out: Tensor = model.att(tokens, tokens, tokens, need_weights=need_weights)[0]
    return out


def reasons(permutable: Permutable, parameter: str, dim: int) -> list[tuple[int, str]]:
    return [(axis.size, axis.reason) for axis in permutable.plain_axes([(parameter, dim)])]


# A function, layers, and per (parameter, dim) the sizes and reasons of its axes.
FREE = ""
CASES = {
    "chain": (
        lambda m, x: head(torch.relu(m.b(torch.relu(m.a(x)))), m.fc),
        {"a": conv(3, 8), "b": conv(8, 6), "fc": nn.Linear(6, 4)},
        {
            ("a.weight", 0): [(8, FREE)],
            ("b.weight", 0): [(6, FREE)],
            ("fc.bias", 0): [(4, "output")],
        },
    ),
    "residual": (
        lambda m, x: head((y := m.a(x)) + m.norm(m.b(y)), m.fc),
        {"a": conv(3, 8), "b": conv(8, 8), "norm": nn.BatchNorm2d(8), "fc": nn.Linear(8, 4)},
        {("b.weight", 1): [(8, FREE)], ("norm.running_var", 0): [(8, FREE)]},
    ),
    "residual of the input": (
        lambda m, x: head(x + m.b(m.a(x)), m.fc),
        {"a": conv(3, 8), "b": conv(8, 3), "fc": nn.Linear(3, 4)},
        {("b.weight", 0): [(3, "input")], ("a.weight", 0): [(8, FREE)]},
    ),
    "depthwise": (
        lambda m, x: head(m.c(m.b(m.a(x))), m.fc),
        {"a": conv(3, 8), "b": conv(8, 8, 8), "c": conv(8, 6), "fc": nn.Linear(6, 4)},
        {("b.weight", 0): [(8, FREE)], ("c.weight", 1): [(8, FREE)]},
    ),
    "depthwise, two outputs a channel": (
        lambda m, x: head(m.c(m.b(m.a(x))), m.fc),
        {"a": conv(3, 8), "b": conv(8, 16, 8), "c": conv(16, 6), "fc": nn.Linear(6, 4)},
        {("c.weight", 1): [(8, FREE), (2, FREE)]},
    ),
    "groups": (
        lambda m, x: head(m.c(m.b(m.a(x))), m.fc),
        {"a": conv(3, 12), "b": conv(12, 8, 4), "c": conv(8, 6), "fc": nn.Linear(6, 4)},
        {("a.weight", 0): [(4, FREE), (3, FREE)], ("c.weight", 1): [(4, FREE), (2, FREE)]},
    ),
    "groups that do not fit each other": (
        lambda m, x: head(m.c(m.b(m.a(x))), m.fc),
        {"a": conv(3, 12), "b": conv(12, 12, 4), "c": conv(12, 6, 6), "fc": nn.Linear(6, 4)},
        {("a.weight", 0): [(4, "conv2d"), (3, FREE)], ("b.weight", 0): [(4, "conv"), (3, "conv")]},
    ),
    "groups of groups": (
        lambda m, x: head(m.c(m.b(m.a(x))), m.fc),
        {"a": conv(3, 12), "b": conv(12, 12, 4), "c": conv(12, 6, 2), "fc": nn.Linear(6, 4)},
        {("b.weight", 0): [(2, FREE), (2, FREE), (3, FREE)], ("c.weight", 1): [(2, ""), (3, "")]},
    ),
    "concatenation": (
        lambda m, x: head(m.c(torch.cat((m.a(x), m.b(x)), 1)), m.fc),
        {"a": conv(3, 8), "b": conv(3, 5), "c": conv(13, 6), "fc": nn.Linear(6, 4)},
        {("c.weight", 1): [(8, FREE), (5, FREE)]},
    ),
    "slices": (
        lambda m, x: head(m.c((y := m.a(x))[:, :5] * y[:, 5:]), m.fc),
        {"a": conv(3, 10), "c": conv(5, 6), "fc": nn.Linear(6, 4)},
        {("a.weight", 0): [(5, FREE)], ("c.weight", 1): [(5, FREE)]},
    ),
    "every second channel": (
        lambda m, x: head(m.a(x)[:, ::2], m.fc),
        {"a": conv(3, 8), "fc": nn.Linear(4, 4)},
        {("a.weight", 0): [(8, "slice")], ("fc.weight", 1): [(4, "slice")]},
    ),
    "flattened": (
        lambda m, x: m.fc(F.adaptive_avg_pool2d(m.a(x), 2).flatten(1)),
        {"a": conv(3, 8), "fc": nn.Linear(32, 4)},
        {("a.weight", 0): [(8, FREE)], ("fc.weight", 1): [(8, FREE), (2, "image"), (2, "image")]},
    ),
    "channel shuffle": (
        lambda m, x: head(F.channel_shuffle(m.a(x), 2), m.fc),
        {"a": conv(3, 8), "fc": nn.Linear(8, 4)},
        {("a.weight", 0): [(8, "channel_shuffle")]},
    ),
    "pixel shuffle": (
        lambda m, x: head(m.b(F.pixel_shuffle(m.a(x), 2)), m.fc),
        {"a": conv(3, 20), "b": conv(5, 6), "fc": nn.Linear(6, 4)},
        {("a.weight", 0): [(5, FREE), (4, "image")], ("b.weight", 1): [(5, FREE)]},
    ),
    "views that mix": (
        lambda m, x: m.fc(m.a(x).reshape(x.shape[0], 4, -1)).mean(1),
        {"a": conv(3, 8), "fc": nn.Linear(2 * 16 * 16, 4)},
        {
            ("a.weight", 0): [(4, FREE), (2, FREE)],
            ("fc.weight", 1): [(2, FREE), (16, "image"), (16, "image")],
        },
    ),
    "cumulated": (
        lambda m, x: head(m.a(x).cumsum(1), m.fc),
        {"a": conv(3, 8), "fc": nn.Linear(8, 4)},
        {("a.weight", 0): [(8, "cumsum")]},
    ),
    "returned": (
        lambda m, x: ((y := m.a(x)), head(m.b(y), m.fc)),
        {"a": conv(3, 8), "b": conv(8, 6), "fc": nn.Linear(6, 4)},
        {("a.weight", 0): [(8, "output")], ("b.weight", 0): [(6, FREE)]},
    ),
    "one layer twice": (
        lambda m, x: head(m.b(torch.relu(m.b(m.a(x)))), m.fc),
        {"a": conv(3, 8), "b": conv(8, 8), "fc": nn.Linear(8, 4)},
        {("a.weight", 0): [(8, FREE)], ("b.weight", 1): [(8, FREE)]},
    ),
    "group norm": (
        lambda m, x: head(m.b(m.norm(m.a(x))), m.fc),
        {"a": conv(3, 8), "norm": nn.GroupNorm(2, 8), "b": conv(8, 6), "fc": nn.Linear(6, 4)},
        {("norm.weight", 0): [(2, FREE), (4, FREE)]},
    ),
    "squeeze and excite, prelu": (
        lambda m, x: head(m.act(y := m.a(x)) * m.b(y.mean((2, 3), True)).sigmoid(), m.fc),
        {"a": conv(3, 8), "act": nn.PReLU(8), "b": nn.Conv2d(8, 8, 1), "fc": nn.Linear(8, 4)},
        {("act.weight", 0): [(8, FREE)], ("b.weight", 0): [(8, FREE)]},
    ),
    "padded channels": (
        lambda m, x: head(F.pad(m.a(x), (0, 0, 0, 0, 2, 2)), m.fc),
        {"a": conv(3, 8), "fc": nn.Linear(12, 4)},
        {("a.weight", 0): [(8, "pad")], ("fc.weight", 1): [(12, "pad")]},
    ),
    "the largest": (
        lambda m, x: (m.a(x).mean((2, 3)).argmax(1), head(m.a(x), m.fc)),
        {"a": conv(3, 8), "fc": nn.Linear(8, 4)},
        {("a.weight", 0): [(8, "argmax")]},
    ),
    "multi-head attention": (
        lambda m, x: m.fc(attended(m, x, need_weights=False).mean(1)),
        {
            "a": nn.Conv2d(3, 12, 8, 8),
            "att": nn.MultiheadAttention(12, 3, batch_first=True),
            "fc": nn.Linear(12, 4),
        },
        {
            ("a.weight", 0): [(12, FREE)],
            ("att.out_proj.weight", 1): [(3, FREE), (4, FREE)],
            ("att.out_proj.weight", 0): [(12, FREE)],
        },
    ),
    "heads put into the batch": (
        lambda m, x: m.fc(attended(m, x, need_weights=True).mean(1)),
        {
            "a": nn.Conv2d(3, 12, 8, 8),
            "att": nn.MultiheadAttention(12, 3, batch_first=True),
            "fc": nn.Linear(12, 4),
        },
        {
            ("a.weight", 0): [(12, FREE)],
            ("att.out_proj.weight", 1): [(12, "view")],
            ("att.out_proj.weight", 0): [(12, FREE)],
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_free_moves_and_the_rest_has_a_reason(name: str) -> None:
    forward, layers, expected = CASES[name]
    model = trained_like(Net(forward, **layers))
    permutable = find_permutable(model, (X,))
    for (parameter, dim), wanted in expected.items():
        found = reasons(permutable, parameter, dim)
        assert [size for size, _ in found] == [size for size, _ in wanted], (parameter, found)
        for (_, reason), (_, part) in zip(found, wanted, strict=True):
            assert part in reason and bool(part) == bool(reason), (parameter, found)
    other, _ = permuted_copy(model, X)
    check_same_function(model, other, X)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_small_models(name: str) -> None:
    model = trained_like(small_model(name)(10, 16))
    other, moved = permuted_copy(model, X)
    assert moved >= 100
    check_same_function(model, other, X)


# With the least number of entries that are free: two thirds of those that were found.
ZOO = [
    ("torchvision", "resnet18", 32, 2000),
    ("torchvision", "mobilenet_v2", 32, 6000),
    ("torchvision", "shufflenet_v2_x0_5", 32, 1000),
    ("torchvision", "convnext_tiny", 32, 18000),
    ("torchvision", "vgg11_bn", 32, 7000),
    ("timm", "deit_tiny_patch16_224", 224, 6800),
    ("timm", "mixer_s32_224", 224, 6000),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "name", "size", "least"), ZOO)
def test_zoo(source: str, name: str, size: int, least: int) -> None:
    model = trained_like(build_model(source, name))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    other, moved = permuted_copy(model, x)
    assert moved >= least
    check_same_function(model, other, x)


def test_a_wrong_permutation_is_seen() -> None:
    """Of the check itself."""
    model = trained_like(small_model("resnet8")(10, 16))
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.get_parameter("stages.0.conv1.weight")
        weight.copy_(weight[torch.tensor([1, 0, *range(2, 16)])])
    with pytest.raises(AssertionError):
        check_same_function(model, other, X)


def test_tied_and_shared_memory() -> None:
    model = Net(
        lambda m, x: head(m.c(m.b(m.a(x))), m.fc),
        a=conv(3, 8),
        b=conv(8, 8),
        c=conv(8, 8),
        fc=nn.Linear(8, 4),
    )
    model.c.weight = model.b.weight  # one parameter
    permutable = find_permutable(trained_like(model), (X,))
    assert reasons(permutable, "c.weight", 1) == reasons(permutable, "a.weight", 0) == [(8, "")]
    other, _ = permuted_copy(model, X)
    check_same_function(model, other, X)

    model.c.weight = nn.Parameter(model.b.weight.detach())  # two of one memory
    permutable = find_permutable(model, (X,))
    for dim in (0, 1):
        assert "memory" in reasons(permutable, "b.weight", dim)[0][1]


def test_parameters_that_evaluation_does_not_read() -> None:
    model = Net(
        lambda m, x: (
            (m.aux(m.a(x)), m.fc(m.a(x).mean((2, 3)))) if m.training else head(m.a(x), m.fc)
        ),
        a=conv(3, 8),
        aux=conv(8, 2),
        fc=nn.Linear(8, 4),
    )
    with pytest.raises(InputError, match=r"does not read 2 .*'aux\.weight'.*None"):
        find_permutable(model, (X,))


def test_buffers_of_numbers_follow_on_any_dtype() -> None:
    model = trained_like(small_model("resnet8")(10, 16)).to(torch.bfloat16)
    permutable = find_permutable(model, (X.to(torch.bfloat16),))
    before = {name: t.clone() for name, t in tensors_of(model).items()}
    axis = permutable.plain_axes([("stages.0.conv1.weight", 0)])[0]
    order = np.random.default_rng(0).permutation(axis.size)
    permute_(tensors_of(model), permutable, {axis.number: order})
    index = torch.from_numpy(order)
    after = tensors_of(model)
    for name, dim in (("stages.0.conv1.weight", 0), ("stages.0.bn1.running_mean", 0)):
        assert torch.equal(after[name], before[name].index_select(dim, index))
    assert torch.equal(after["stages.0.conv2.weight"], before["stages.0.conv2.weight"][:, index])
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 6  # and weight, bias and variance of the norm


def test_axes_cut_each_other() -> None:
    axes = Axes()
    whole, a, b, c = axes.plain(24), axes.plain(2), axes.plain(12), axes.plain(4)
    axes.unify(whole, axes.product((a, b)), "x")
    axes.unify(whole, axes.product((axes.plain(6), c)), "x")
    assert [axes.size(p) for p in axes.plain_axes(whole)] == [2, 3, 4]
    axes.unify(whole, axes.joined((axes.plain(12), axes.plain(12))), "two halves")
    # The halves are one now, cut as before, and may not change places.
    assert [axes.size(p) for p in axes.plain_axes(whole)] == [3, 4, 3, 4]
    assert axes.reason(a) == "two halves" and not axes.reason(b)
    assert list(axes.places(whole, axes.find(c))) == [0, 1, 2, 3] * 6
    axes.unify(axes.plain(24, "fixed"), whole, "x")
    assert {axes.reason(p) for p in axes.plain_axes(whole)} == {"fixed"}


def test_axes_that_do_not_agree_are_fixed() -> None:
    axes = Axes()
    whole = axes.product((axes.plain(2), axes.plain(3)))
    other = axes.product((axes.plain(3), axes.plain(2)))
    axes.unify(whole, other, "shuffled")
    assert {axes.reason(p) for p in (*axes.plain_axes(whole), *axes.plain_axes(other))} == {
        "shuffled"
    }
