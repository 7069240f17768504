"""The penalties by hand, and where they lead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import disco
from disco.sparsify.groups import Group
from disco.sparsify.penalties import Admm, group_lasso
from disco.sparsify.scores import weight_scores
from disco.sparsify.selection import everything, select_uniform
from disco_kernels import Ownership
from tests.sparsify.nets import READERS, Small, adam, attached, check_zeros, sgd, train


def _case() -> tuple[dict[str, Tensor], Group]:
    """A convolution and a linear on one tensor of 5 channels, in no order; outputs 3 + 1 and 2."""
    torch.manual_seed(0)
    weights = {"b": torch.randn(4, 5, 3, 3), "c": torch.randn(2, 5)}
    inputs = Ownership(((4, 0, 2), (1, 3)))
    out = {"b": Ownership(((0, 1, 3), (2,))), "c": Ownership(((), (0, 1)))}
    return {n: w.requires_grad_() for n, w in weights.items()}, Group(inputs, out)


@pytest.mark.parametrize("group_size", [1, 2])
def test_group_lasso_by_hand(group_size: int) -> None:
    weights, group = _case()
    b, c = weights["b"], weights["c"]
    chunks = (
        {1: [[4], [0], [2]], 2: [[4, 0], [2]]}[group_size],
        {1: [[1], [3]], 2: [[1, 3]]}[group_size],
    )
    # Rank 0 has rows 0, 1, 3 of b and takes channels of rank 1; rank 1 row 2 of b and all of c.
    expected = torch.zeros((), dtype=torch.float64)
    for chunk in chunks[1]:
        block = b[[0, 1, 3]][:, chunk].double()
        expected = expected + (block.numel() * block.square().sum()).sqrt()
    for chunk in chunks[0]:
        both = [b[[2]][:, chunk].double(), c[:, chunk].double()]
        size = sum(block.numel() for block in both)
        expected = expected + (size * sum(block.square().sum() for block in both)).sqrt()
    found = group_lasso(weights, [group], group_size)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    wanted = torch.autograd.grad(expected, [b, c])
    for value, other in zip(torch.autograd.grad(found, [b, c]), wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
    assert not wanted[0][2, [1, 3]].any(), "local weights are left alone"


def test_columns_of_zeros_have_no_gradient() -> None:
    weights, group = _case()
    with torch.no_grad():
        weights["b"][[0, 1, 3], 1] = 0.0
    found = torch.autograd.grad(group_lasso(weights, [group], 1), [weights["b"]])[0]
    assert bool(torch.isfinite(found).all())
    assert not found[[0, 1, 3], 1].any() and found[0, 3].any()


def test_group_lasso_shrinks_what_it_then_prunes() -> None:
    model, plain = Small(), Small()
    for each, strength in ((model, 0.03), (plain, 0.0)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        sparsifier = attached(each, None, method="group_lasso", strength=strength, end_step=99)
        train(each, optimizer, sparsifier, range(30))
    new, old = (m.b.weight.detach()[:6] for m in (model, plain))
    assert float(new[:, 8:].norm()) < 0.6 * float(old[:, 8:].norm())
    assert float(new[:, :8].norm()) > 0.9 * float(old[:, :8].norm()), "its own channels stay"


@pytest.mark.parametrize("method", ["group_lasso", "admm"])
def test_when_penalties_are_there(method: str) -> None:
    model = Small()
    optimizer = sgd(model)
    sparsifier = attached(model, optimizer, method=method, begin_step=2, end_step=5)
    seen, dense = [], []

    def look(step: int) -> None:
        seen.append(float(sparsifier.penalty().detach()) > 0)
        dense.append(sparsifier.density_now == 1.0)

    train(model, optimizer, sparsifier, range(7), look)
    # After 2 steps ADMM has just projected for the first time.
    assert seen == [False, True, True, True, False, False, False]
    assert dense == [True] * 4 + [False] * 3
    assert check_zeros(model, sparsifier.finalize()) > 0


@pytest.mark.parametrize("method", ["magnitude", "group_lasso", "admm"])
def test_one_node_has_nothing_to_leave_out(method: str) -> None:
    model, before = Small(), Small()
    sparsifier = attached(model, nodes=1, method=method, end_step=2)
    for _ in range(3):
        assert float(sparsifier.penalty().detach()) == 0.0
        sparsifier.step()
    assert sparsifier.density_now == 1.0
    assert all(torch.equal(model.state_dict()[n], v) for n, v in before.state_dict().items())


def test_magnitude_adds_nothing() -> None:
    model = Small()
    penalty = attached(model).penalty()
    assert penalty.shape == () and float(penalty) == 0.0


def test_admm_by_hand() -> None:
    """Two updates, with the selection done by the norms of W + U."""
    weights, group = _case()
    select_from: list[dict[str, Tensor]] = []

    def select(shifted: object) -> list[Tensor]:
        assert isinstance(shifted, dict)
        select_from.append({n: w.clone() for n, w in shifted.items()})
        scores = weight_scores(shifted, group)
        return [select_uniform(scores, group, 0.5, 1, everything(group))]

    admm = Admm([group], rho=0.5)
    assert admm.penalty(weights) is None
    admm.update(weights, select)
    w1 = {n: w.detach().clone() for n, w in weights.items()}
    z1 = {n: z.clone() for n, z in admm.z.items()}
    assert all(torch.equal(select_from[0][n], w1[n]) and not admm.u[n].any() for n in w1)
    # floor(0.5 x 3) = 1 of rank 0's channels stays for rank 1, floor(0.5 x 2) = 1 for rank 0.
    away = [int((z1["b"][rows] == 0).all(0).all(-1).all(-1).sum()) for rows in ([0, 1, 3], [2])]
    assert away == [1, 2]
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.1 * torch.randn_like(weight)
    remote = {"b": torch.zeros(4, 5, 1, 1), "c": torch.zeros(2, 5)}
    remote["b"][[[0], [1], [3]], [1, 3]] = 1
    remote["b"][2, [0, 2, 4]] = 1
    remote["c"][:, [0, 2, 4]] = 1
    penalty = admm.penalty(weights)
    expected = sum(((weights[n] - z1[n]) * remote[n]).square().sum() for n in weights) * 0.25
    assert penalty is not None and isinstance(expected, Tensor)
    torch.testing.assert_close(penalty, expected)
    admm.update(weights, select)
    for name, weight in weights.items():
        assert torch.equal(select_from[1][name], weight), "the first U is 0"
        torch.testing.assert_close(admm.u[name] + admm.z[name], weight.detach())
    third = {n: weights[n].detach() + admm.u[n] for n in weights}
    admm.update(weights, select)
    for name in weights:
        torch.testing.assert_close(select_from[2][name], third[name])
        torch.testing.assert_close(admm.u[name], third[name] - admm.z[name])


def test_admm_converges_to_weights_within_the_budget() -> None:
    """Least squares: the remote columns beyond the budget go to zero by themselves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 1))
    goal = model[1].weight.detach().clone()
    sparsifier = attached(
        model, None, method="admm", rho=1.0, density=0.5, end_step=10_000, every=5
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(600):
        optimizer.zero_grad()
        (0.5 * (model[1].weight - goal).square().sum() + sparsifier.penalty()).backward()
        optimizer.step()
        sparsifier.step()
    weight = model[1].weight.detach().clone()
    pattern = sparsifier.finalize()
    cut = model[1].weight.detach() != weight
    assert int(cut.sum()) == 2 * 3 * 3, "half of the 6 channels, for 3 outputs of 2 ranks"
    assert float(weight[cut].abs().max()) < 1e-3 * float(goal[cut].abs().max())
    # What is kept is what the loss alone would have.
    torch.testing.assert_close(weight[~cut], goal[~cut], rtol=0, atol=1e-3)
    assert check_zeros(model, pattern) == 6


def test_methods_end_at_the_budget_of_the_one_shot_one() -> None:
    counts = set()
    for method in ("magnitude", "group_lasso", "admm"):
        model = Small()
        optimizer = adam(model)
        sparsifier = attached(model, optimizer, method=method, density=0.4, group_size=2)
        train(model, optimizer, sparsifier, range(8))
        layers = sparsifier.finalize().layers
        assert set(layers) == set(READERS)
        counts.add(
            str({n: [[len(c) for c in row] for row in x.selected] for n, x in layers.items()})
        )
    other = Small()
    nn.init.normal_(other.d.weight)
    one_shot = disco.sparsify_(other, 2, 0.4, (torch.zeros(2, 3, 6, 6),), group_size=2).layers
    assert counts == {
        str({n: [[len(c) for c in row] for row in x.selected] for n, x in one_shot.items()})
    }
