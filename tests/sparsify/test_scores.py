"""Scores against what they are by hand, and the budget of bytes over the whole model."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.errors import InputError
from disco.sparsify.groups import Group
from disco.sparsify.selection import everything, select_global, select_uniform
from disco.sparsify.statistics import taylor_scores
from disco_kernels import Ownership
from tests.sparsify.nets import EXAMPLE, Small, adam, attached, budget, sgd, train


def _chosen(scores: Tensor, owned: tuple[int, ...], count: int) -> tuple[int, ...]:
    order = sorted(owned, key=lambda channel: -float(scores[channel]))
    return tuple(sorted(order[:count]))


def _check(pattern: Any, scores: dict[tuple[str, int], Tensor], density: float) -> None:
    """The pattern of `Small` against scores by layer and receiver, `b` and `c` together."""
    for name, layer in pattern.layers.items():
        for i, j in product(range(2), repeat=2):
            if i != j:
                total = sum(scores[n, i] for n in ({"d"} if name == "d" else {"b", "c"}))
                owned = layer.in_ownership.channels[j]
                assert isinstance(total, Tensor)
                expected = _chosen(total, owned, budget(density, len(owned)))
                assert layer.selected[i][j] == expected, (name, i, j)


ROWS = {"b": (range(6), range(6, 12)), "c": (range(6), range(6, 12)), "d": (range(4), range(4, 7))}


def test_taylor_is_the_squared_change_of_the_loss() -> None:
    """Over b and c together, since a channel is dropped for both: the sum before the square. Means
    over three steps, of gradients and weights as the optimizer's step finds them."""
    model = Small()
    nn.init.normal_(model.d.weight)
    optimizer = sgd(model)
    sparsifier = attached(model, optimizer, score="taylor", density=0.4, end_step=3, decay=0.75)
    means: dict[tuple[str, int], Tensor] = {}

    def by_hand(*_: Any) -> None:
        # Runs beside the sparsifier's own hook, before the weights change.
        change = {}
        for name, rows in ROWS.items():
            weight = model.get_submodule(name).weight
            assert weight.grad is not None
            product = (weight.detach() * weight.grad).double().reshape(*weight.shape[:2], -1)
            for i in range(2):
                change[name, i] = product[list(rows[i])].sum((0, 2))
        joint = {("b", i): (change["b", i] + change["c", i]).square() for i in range(2)}
        joint |= {("d", i): change["d", i].square() for i in range(2)}
        for key, value in joint.items():
            means[key] = 0.75 * means[key] + 0.25 * value if key in means else value

    optimizer.register_step_pre_hook(by_hand)
    train(model, optimizer, sparsifier, range(3))
    means |= {("c", i): torch.zeros(15) for i in range(2)}
    _check(sparsifier.finalize(), means, 0.4)


def test_taylor_of_one_step_by_hand() -> None:
    """Rank 0 computes rows 0 and 2; gradients of b and c add up before the square."""
    torch.manual_seed(0)
    weights = {"b": torch.randn(3, 4, 3, 3), "c": torch.randn(2, 4), "frozen": torch.randn(2, 4)}
    out = {"b": ((0, 2), (1,)), "c": ((), (0, 1)), "frozen": ((0,), (1,))}
    group = Group(
        Ownership.contiguous(4, 2), {name: Ownership(owned) for name, owned in out.items()}
    )
    assert taylor_scores(weights, group) is None
    for name in ("b", "c"):
        weights[name].grad = torch.randn_like(weights[name])
    products = {n: (weights[n] * w).double() for n in "bc" if (w := weights[n].grad) is not None}
    expected = torch.stack(
        [
            products["b"][[0, 2]].sum((0, 2, 3)).square(),
            (products["b"][1].sum((1, 2)) + products["c"].sum(0)).square(),
        ]
    )
    found = taylor_scores(weights, group)
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_what_was_dropped_is_not_taken_again(group_size: int) -> None:
    """Even where it scores best now: means that last may remember a channel that is gone."""
    generator = torch.Generator().manual_seed(group_size)
    group = Group(Ownership.contiguous(42, 2), {"w": Ownership.contiguous(6, 2)}, 4)
    kept = everything(group)
    for density in (0.8, 0.55, 0.5, 0.21, 0.2, 0.05):
        scores = torch.rand(2, 42, generator=generator, dtype=torch.float64)
        scores[~kept] += 10
        fewer = select_uniform(scores, group, density, group_size, kept)
        assert not bool((fewer & ~kept).any())
        for i in range(2):
            count = int(fewer[i, 21 * (1 - i) : 21 * (2 - i)].sum())
            assert budget(density, 21) - group_size < count <= budget(density, 21)
        kept = fewer


def test_activation_is_weights_times_mean_inputs() -> None:
    model = Small()
    nn.init.normal_(model.d.weight)
    optimizer = sgd(model)
    sparsifier = attached(model, optimizer, score="activation", density=0.4, end_step=9, decay=0.75)
    means: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def by_hand(module: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].detach().double().abs()
            value = x.mean(0) if x.dim() == 2 else x.mean((0, 2, 3))
            means[name] = 0.75 * means[name] + 0.25 * value if name in means else value

        return by_hand

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in ROWS]
    train(model, optimizer, sparsifier, range(3))
    for handle in handles:
        handle.remove()
    # Neither a validation nor a copy's training counts.
    model.eval()(100 * torch.rand(4, 3, 6, 6))
    other = copy.deepcopy(model).train()
    nn.init.normal_(other.norm.weight, std=30)
    other(torch.rand(4, 3, 6, 6))
    scores = {}
    for name, rows in ROWS.items():
        weight = model.get_submodule(name).weight.detach().double()
        squares = weight.square().reshape(*weight.shape[:2], -1)
        for i in range(2):
            scores[name, i] = squares[list(rows[i])].sum((0, 2)) * means[name].square()
    _check(sparsifier.finalize(), scores, 0.4)


@pytest.mark.parametrize("score", ["taylor", "activation"])
def test_what_was_never_seen_is_not_guessed(score: str) -> None:
    model = Small()
    sparsifier = attached(model, sgd(model), score=score, end_step=1)
    with pytest.raises(InputError, match=f"score '{score}' of .* 'b.weight', 'c.weight' .* not"):
        sparsifier.step()
    assert not any((m.weight == 0).any() for m in (model.b, model.c)), "nothing was zeroed"


def test_inputs_of_what_is_no_layer_cannot_be_watched() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow = nn.Linear(12, 24)
            self.attention = nn.MultiheadAttention(24, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.grow(x))
            y: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return y

    model = Attention()
    sparsifier = disco.Sparsifier(score="activation")
    with pytest.raises(InputError, match=r"in_proj_weight' is of a MultiheadAttention: take ano"):
        sparsifier.attach(model, (torch.zeros(2, 5, 12),))
    assert not any(m._forward_pre_hooks for m in model.modules())


def _groups(generator: torch.Generator) -> tuple[list[Group], list[Tensor]]:
    groups, scores = [], []
    for _ in range(4):
        channels = int(torch.randint(1, 20, (), generator=generator))
        order = torch.randperm(channels, generator=generator).tolist()
        cut = int(torch.randint(0, channels + 1, (), generator=generator))
        inputs = Ownership((tuple(order[:cut]), tuple(order[cut:]), ()))
        outputs = Ownership.contiguous(int(torch.randint(1, 5, (), generator=generator)), 3)
        size = 4 * int(torch.randint(1, 50, (), generator=generator))
        groups.append(Group(inputs, {"w": outputs}, size))
        scores.append(torch.rand(3, channels, generator=generator, dtype=torch.float64))
    return groups, scores


def _bytes(groups: list[Group], kept: list[Tensor], density: float | None = None) -> int:
    """Of what is selected, or of a density of everything."""
    total = 0
    for group, table in zip(groups, kept, strict=True):
        for i in group.receivers:
            for j, owned in enumerate(group.in_ownership.channels):
                if i != j:
                    chosen = int(table[i, list(owned)].sum())
                    count = chosen if density is None else budget(density, len(owned))
                    total += count * group.bytes_per_channel
    return total


def _check_greedy(
    groups: list[Group],
    scores: list[Tensor],
    before: list[Tensor],
    kept: list[Tensor],
    limit: int,
) -> None:
    """What was dropped did not fit beside what is worth more a byte."""
    items = [
        (float(scores[n][i, c]) / g.bytes_per_channel, g.bytes_per_channel, bool(kept[n][i, c]))
        for n, g in enumerate(groups)
        for i in g.receivers
        for c in range(g.in_ownership.num_channels)
        if before[n][i, c] and c not in g.in_ownership.channels[i]
    ]
    for worth, size, stays in items:
        better = sum(s for w, s, k in items if k and w > worth)
        assert stays == (better + size <= limit)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("group_size", [1, 4])
def test_the_bytes_of_a_global_budget(seed: int, group_size: int) -> None:
    """Within the budget, nothing that would still fit is left out, the better a byte first; and as
    the density goes down, a part of what was there."""
    groups, scores = _groups(torch.Generator().manual_seed(seed))
    kept = [everything(group) for group in groups]
    for density in (1.0, 0.7, 0.3, 0.1, 0.0):
        before, limit = kept, _bytes(groups, kept, density)
        kept = select_global(scores, groups, density, group_size, before)
        left = limit - _bytes(groups, kept)
        assert left >= 0
        for number, group in enumerate(groups):
            assert not bool((kept[number] & ~before[number]).any())
            for j, owned in enumerate(group.in_ownership.channels):
                assert bool(kept[number][j, list(owned)].all()), "a rank has its own"
        if group_size == 1:
            _check_greedy(groups, scores, before, kept, limit)
    assert _bytes(groups, kept) == 0


def test_global_takes_what_is_worth_most_a_byte() -> None:
    inputs, out = Ownership(((0, 1), (2, 3))), {"w": Ownership(((0,), (1,)))}
    dear, cheap = Group(inputs, out, 40), Group(inputs, out, 8)
    scores = [
        torch.tensor([[0.0, 0, 9, 1], [3, 8, 0, 0]], dtype=torch.float64),
        torch.tensor([[0.0, 0, 1, 1], [1, 0.5, 0, 0]], dtype=torch.float64),
    ]
    kept = select_global(scores, [dear, cheap], 0.5, 1, [everything(g) for g in (dear, cheap)])
    # A budget of 96 bytes. A byte is worth 9/40, 8/40, 3/40, 1/40 there and 1/8 (three), 1/16 here:
    # two of the dear ones, and of the cheap ones what fits into the 16 bytes left.
    assert kept[0].tolist() == [[True, True, True, False], [False, True, True, True]]
    assert kept[1].tolist() == [[True, True, True, True], [False, False, True, True]]
    each = [select_uniform(s, g, 0.5, 1) for s, g in zip(scores, (dear, cheap), strict=True)]
    assert _bytes([dear, cheap], kept) == _bytes([dear, cheap], each) == 96


@pytest.mark.parametrize("score", ["l2", "taylor"])
def test_a_model_with_a_global_budget(score: str) -> None:
    model, other = Small(), Small()
    optimizer = adam(model)
    sparsifier = attached(model, optimizer, score=score, allocation="global", density=0.3)
    train(model, optimizer, sparsifier, range(7))
    pattern = sparsifier.finalize()
    nn.init.normal_(other.d.weight)
    uniform = disco.sparsify_(other, 2, 0.3, EXAMPLE)
    plans = [
        disco.partition(m.eval(), EXAMPLE, 2, pattern=p, partial_sums=False).plan
        for m, p in ((model, pattern), (other, uniform))
    ]
    assert 0 < plans[0].bytes_per_image <= plans[1].bytes_per_image
    counts = {tuple(len(c) for row in x.selected for c in row) for x in pattern.layers.values()}
    assert counts != {tuple(len(c) for r in x.selected for c in r) for x in uniform.layers.values()}
