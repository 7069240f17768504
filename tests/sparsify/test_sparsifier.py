"""`disco.Sparsifier` in a training loop: zeros, schedule, budget, partition, resuming, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import disco
from disco import Cluster, Node
from disco.errors import InputError
from disco.sparsify import find_groups
from disco_kernels import Pattern, find_selected
from tests.sparsify.nets import (
    EXAMPLE,
    READERS,
    Optimizers,
    Small,
    adam,
    attached,
    budget,
    check_zeros,
    random_net,
    sgd,
    train,
)


@pytest.mark.parametrize("optimizers", [sgd, adam])
@pytest.mark.parametrize("nodes", [2, 3])
def test_what_is_pruned_stays_zero(optimizers: Optimizers, nodes: int) -> None:
    """After every step, with momentum and weight decay, and also where the optimizer looks."""
    model = Small()
    optimizer = optimizers(model)
    sparsifier = attached(model, optimizer, nodes=nodes, begin_step=1, end_step=6, every=2)
    before: dict[str, Tensor] = {}
    zero_steps = 0

    def check(step: int) -> None:
        nonlocal zero_steps
        for name in READERS:
            weight = model.get_submodule(name).weight
            zeros = weight.detach() == 0
            if name in before:
                assert bool(zeros[before[name]].all()), "a weight came back"
            if step > 0:  # momentum may be zero by chance of the first step only
                for value in optimizer.state[weight].values():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        assert not value[zeros].any(), "momentum of a pruned weight"
            before[name] = zeros
            zero_steps += int(zeros.any())

    train(model, optimizer, sparsifier, range(10), check)
    assert zero_steps >= 8 * 3 - 3 and sparsifier.steps == 10
    assert check_zeros(model, sparsifier.finalize()) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{"score": "taylor"}, {"score": "activation"}, {}])
@pytest.mark.parametrize("method", ["magnitude", "group_lasso", "admm"])
def test_on_a_gpu(method: str, options: dict[str, Any]) -> None:
    if method != "magnitude" and options:
        options = {"allocation": "global"}
    model = Small().cuda()
    optimizer = adam(model)
    sparsifier = attached(model, optimizer, method=method, **options)
    train(model, optimizer, sparsifier, range(4))
    resumed = attached(model, optimizer, method=method, **options)
    resumed.load_state_dict(sparsifier.state_dict())
    train(model, optimizer, resumed, range(4, 8))
    assert check_zeros(model, resumed.finalize()) > 0 and model.b.weight.is_cuda


def test_without_the_optimizer_weights_are_zero_all_the_same() -> None:
    model = Small()
    optimizer = sgd(model)
    sparsifier = attached(model, None, end_step=2)
    train(model, optimizer, sparsifier, range(6))
    assert check_zeros(model, sparsifier.finalize()) > 0


def test_the_schedule_is_the_cubic_one() -> None:
    """Channel counts of every step against Zhu and Gupta's formula, worked out here."""
    model = nn.Sequential(nn.Conv2d(3, 400, 1), nn.Conv2d(400, 4, 1))
    sparsifier = attached(model, density=0.2, begin_step=2, end_step=12, every=3)
    seen = []
    for _ in range(14):
        sparsifier.step()
        seen.append(sparsifier.density_now)
    expected = [1.0]
    for step in range(1, 15):
        if (2 <= step < 12 and (step - 2) % 3 == 0) or step >= 12:
            sparsity = 0.8 * (1 - (1 - (min(step, 12) - 2) / 10) ** 3)
            expected.append(int((1 - sparsity) * 200 + 1e-9) / 200)
        else:
            expected.append(expected[-1])
    assert seen == expected[1:]
    assert sorted(set(seen)) == [0.2, 0.25, 0.47, 1.0]


@pytest.mark.parametrize(("period", "density"), [(1, 0.5), (2, 1.0), (3, 0.5), (5, 1.0)])
def test_periodic_exchanges_every_kth_tensor(period: int, density: float) -> None:
    layers = [nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 1) for _ in range(4))]
    model = nn.Sequential(*layers)
    sparsifier = attached(
        model, allocation="periodic", period=period, density=density, begin_step=0, end_step=4
    )
    left = []
    for _ in range(4):
        sparsifier.step()
        left.append(sparsifier.density_now)
    assert left == sorted(left, reverse=True)
    sparsifier.finalize()
    for number, layer in enumerate(layers[1:], 1):
        remote = torch.cat((layer.weight[:4, 4:], layer.weight[4:, :4]))
        columns = int((remote.flatten(1) != 0).sum()) / 32
        assert columns == (density if number % period == 0 else 0.0)


@pytest.mark.parametrize("end_step", [0, 1])
def test_a_schedule_without_length_is_one_shot(end_step: int) -> None:
    model, other = Small(), Small()
    nn.init.normal_(model.d.weight, generator=torch.Generator().manual_seed(1))
    other.load_state_dict(model.state_dict())
    expected = disco.sparsify_(other, 2, 0.3, EXAMPLE, score="l1", group_size=2)
    sparsifier = attached(model, density=0.3, score="l1", group_size=2, end_step=end_step)
    sparsifier.step()
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert sparsifier.finalize() == expected


@pytest.mark.parametrize("seed", range(6))
def test_budget_and_partition_of_random_networks(seed: int) -> None:
    """Each tensor keeps its budget exactly, the plan's bytes are those, and the zeros tell all."""
    model = random_net(seed)
    nodes, density = 2 + seed % 3, (0.0, 0.2, 0.5, 0.35, 0.75, 1.0)[seed]
    optimizer = sgd(model)
    sparsifier = attached(model, optimizer, nodes=nodes, density=density, end_step=3)
    train(model, optimizer, sparsifier, range(4))
    pattern = sparsifier.finalize()
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert list(pattern.layers) == layers[1:]
    for name, layer in pattern.layers.items():
        weight = model.get_submodule(name).weight
        assert find_selected(weight, layer.out_ownership, layer.in_ownership) == layer.selected
        for i, row in enumerate(layer.selected):
            for j, chosen in enumerate(row):
                idle = i == j or not layer.out_ownership.channels[i]
                owned = len(layer.in_ownership.channels[j])
                assert len(chosen) == (0 if idle else budget(density, owned))
    model.eval()
    partitioned = disco.partition(model, EXAMPLE, nodes, partial_sums=False)
    exchanges = [e for e in partitioned.plan.exchanges if not e.gathered_by]
    expected = 0
    for name, layer in pattern.layers.items():
        sent = sum(len(chosen) for row in layer.selected for chosen in row)
        expected += 4 * sent * (1 if name == layers[-1] else 36)  # the head reads means of the map
    assert sum(e.bytes_per_image for e in exchanges) == expected
    x = torch.randn(3, 3, 6, 6)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    error, scale = float((partitioned(x) - exact).abs().max()), float(exact.abs().max())
    assert error <= 64 * torch.finfo(torch.float32).eps * scale


OPTIONS: list[dict[str, Any]] = [
    {"score": "l2", "group_size": 2},
    {"score": "taylor", "every": 3},
    {"score": "activation", "allocation": "global"},
    {"method": "group_lasso", "strength": 1e-3},
    {"method": "admm", "rho": 0.1, "every": 2, "begin_step": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_resuming_changes_no_bit(options: dict[str, Any], tmp_path: Any) -> None:
    """Stopped after every step there is, once with the sparsifier loaded before the model."""
    stops = (1, 2, 6)
    model = Small()
    optimizer = adam(model)
    sparsifier = attached(model, optimizer, **options)

    def save(step: int) -> None:
        if step in stops:
            state = [model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()]
            torch.save(state, tmp_path / f"{step}.pt")

    train(model, optimizer, sparsifier, range(9), save)
    expected = model.state_dict()
    pattern = sparsifier.finalize()
    for stop in stops:
        states = torch.load(tmp_path / f"{stop}.pt", weights_only=True)
        other = Small(seed=5)
        if stop != 2:
            other.load_state_dict(states[0])
        again = adam(other)
        resumed = attached(other, again, **options)
        resumed.load_state_dict(states[2])
        if stop == 2:
            other.load_state_dict(states[0])
        again.load_state_dict(states[1])
        assert resumed.steps == stop + 1
        train(other, again, resumed, range(stop + 1, 9))
        for name, value in other.state_dict().items():
            assert torch.equal(value, expected[name]), (stop, name)
        assert resumed.finalize() == pattern


def test_attach_finds_the_same_however_far_weights_are_pruned() -> None:
    """Also where nothing is exchanged any more."""
    model = Small()
    sparsifier = attached(model, density=0.0, end_step=1)
    sparsifier.step()
    resumed = disco.Sparsifier(density=0.0, end_step=1)
    resumed.attach(model, EXAMPLE)
    resumed.load_state_dict(sparsifier.state_dict())
    assert resumed.density_now == 0.0 and resumed.finalize() == sparsifier.finalize()


def test_zeros_do_not_move_ownership() -> None:
    """Whole groups of the grouped convolution belong together. Zeros that were made for halves
    would make halves the better choice, and the resumed training one of another structure."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.Conv2d(64, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 1, groups=3)
    )
    dense = find_groups(model, Cluster.of(2), 0.2, EXAMPLE)
    with torch.no_grad():
        model[1].weight[:6, 32:] = 0.0
        model[1].weight[6:, :32] = 0.0
    assert find_groups(model, Cluster.of(2), 0.2, EXAMPLE) != dense, "why"
    assert find_groups(model, Cluster.of(2), 0.2, EXAMPLE, ignore_zeros=True) == dense
    resumed = disco.Sparsifier(end_step=1)
    resumed.attach(model, EXAMPLE)
    resumed.step()
    assert resumed.finalize().layers["1"].out_ownership == dense[0].out_ownership["1.weight"]


def test_a_state_is_plain_and_flat() -> None:
    model = Small()
    sparsifier = attached(model, method="admm", end_step=50)
    sparsifier.penalty()
    sparsifier.step()
    state = sparsifier.state_dict()
    assert {type(value) for value in state.values()} <= {torch.Tensor, int, float, str, bool}
    assert {"steps", "kept.0", "z.b.weight", "u.b.weight", "settings.options.rho"} <= set(state)


@pytest.mark.parametrize("nodes", [2, Cluster([Node("a", 3.0), Node("b", 1.0)])])
def test_the_recorded_pattern_goes_into_partition(nodes: int | Cluster, tmp_path: Any) -> None:
    model = Small()
    sparsifier = attached(model, adam(model), nodes=nodes, density=0.3, end_step=2)
    train(model, adam(model), sparsifier, range(3))
    sparsifier.finalize().save(tmp_path / "pattern.json")
    pattern = Pattern.load(tmp_path / "pattern.json")
    partitioned = disco.partition(model.eval(), EXAMPLE, nodes, pattern=pattern)
    x = torch.randn(3, 3, 6, 6)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    error = float((partitioned(x) - exact).abs().max())
    assert error <= 64 * torch.finfo(torch.float32).eps * float(exact.abs().max())


def test_a_head_of_zeros_is_found_and_another_dtype_too() -> None:
    """Its zeros are where training begins, not a pattern."""
    model = Small().double()
    assert not model.d.weight.any()
    sparsifier = disco.Sparsifier(end_step=1)
    sparsifier.attach(model, (EXAMPLE[0].double(),))
    nn.init.normal_(model.d.weight)
    sparsifier.step()
    assert check_zeros(model, sparsifier.finalize()) > 0


def test_nothing_is_left_in_the_model() -> None:
    model, before = Small().train(), Small()
    for score in ("activation", "taylor"):
        optimizer = sgd(model)
        sparsifier = attached(model, optimizer, score=score, end_step=3)
        assert model.training, "attach leaves the mode alone"
        assert list(model.state_dict()) == list(before.state_dict())
        train(model, optimizer, sparsifier, range(2))
        sparsifier.finalize()
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes must be a whole number"),
        ({"density": 1.1}, r"density must be in \[0, 1\]"),
        ({"score": "l3"}, "score must be one of l2, l1, taylor, activation; given 'l3'"),
        ({"method": "lasso"}, "method must be one of magnitude, group_lasso, admm; given 'lasso'"),
        ({"allocation": "all"}, "allocation must be one of uniform, global, periodic; given"),
        ({"group_size": 3}, "group_size must be one of 1, 2, 4, 8 channels; given 3"),
        ({"begin_step": -1}, "begin_step must be a whole number, 0 or more; given -1"),
        ({"end_step": 2.5}, r"end_step must be a whole number, 0 or more; given 2\.5"),
        ({"every": 0}, "every must be a whole number, 1 or more; given 0"),
        ({"begin_step": 9, "end_step": 3}, "given begin_step=9, end_step=3"),
        ({"rho": 1.0}, "'l2' and allocation 'uniform' has no option 'rho'; its options: none"),
        ({"period": 2}, "allocation 'uniform' has no option 'period'"),
        ({"allocation": "periodic", "period": 0}, "period must be a whole number, 1 or more"),
        ({"allocation": "periodic", "period": 1.5}, "period must be a whole number, 1 or more"),
        ({"method": "admm", "rho": -1.0}, r"rho must be a number from 0 .* given -1\.0"),
        ({"score": "taylor", "decay": 1.0}, "decay must be a number from 0 to below 1; given 1"),
        ({"method": "admm", "score": "l1"}, "score is 'l2'; given 'l1'"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        disco.Sparsifier(**options)


def test_wrong_order() -> None:
    sparsifier, model = disco.Sparsifier(), Small()
    for action in (sparsifier.step, sparsifier.penalty, sparsifier.finalize, sparsifier.state_dict):
        with pytest.raises(InputError, match=f"{action.__name__} before attach: call attach"):
            action()
    with pytest.raises(InputError, match="load_state_dict before attach"):
        sparsifier.load_state_dict({})
    sparsifier.attach(model, EXAMPLE)
    with pytest.raises(InputError, match="attach was called before"):
        sparsifier.attach(model, EXAMPLE)
    sparsifier.finalize()
    for action in (sparsifier.step, sparsifier.finalize):
        with pytest.raises(InputError, match=f"{action.__name__} after finalize"):
            action()
    sparsifier.state_dict()  # a checkpoint of what has ended


def test_a_model_that_changed() -> None:
    model = Small()
    sparsifier = attached(model)
    sparsifier.step()
    model.d = nn.Linear(12, 8)
    with pytest.raises(InputError, match=r"'d.weight' was \[7, 12\] and is \[8, 12\]"):
        sparsifier.step()
    del model.d
    with pytest.raises(InputError, match="'d.weight' was .* and is gone"):
        sparsifier.finalize()


def test_weights_that_are_replaced_or_moved_are_followed() -> None:
    model = Small()
    sparsifier = attached(model, end_step=2)
    sparsifier.step()
    sparsifier.step()
    model.load_state_dict(copy.deepcopy(Small(seed=3)).state_dict(), assign=True)
    sparsifier.step()
    assert check_zeros(model, sparsifier.finalize()) > 0


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_training_that_diverged(allocation: str) -> None:
    model = Small()
    sparsifier = attached(model, end_step=1, allocation=allocation)
    with torch.no_grad():
        model.c.weight[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"channels that 'b.weight', 'c.weight' read are not fin"):
        sparsifier.step()


def test_wrong_optimizers() -> None:
    model = Small()
    with pytest.raises(InputError, match="has none of the 3 weights"):
        attached(model, sgd(Small()))
    with pytest.raises(InputError, match=r"must be a torch.optim.Optimizer or None; given str"):
        attached(model, "sgd")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'taylor' reads gradients .* give attach"):
        attached(model, None, score="taylor")


def test_states_of_something_else() -> None:
    model = Small()
    state = attached(model).state_dict()
    with pytest.raises(InputError, match="no state of a Sparsifier"):
        attached(model).load_state_dict(model.state_dict())
    with pytest.raises(InputError, match=r"saved with density=0\.2, and this .* has 0\.5"):
        attached(model, density=0.5).load_state_dict(state)
    with pytest.raises(InputError, match="saved with nodes=2, and this Sparsifier has 3"):
        attached(model, nodes=3).load_state_dict(state)
    with pytest.raises(InputError, match=r"another model: in.0 has 15 channels, .* 20 there"):
        attached(Small(width=20)).load_state_dict(state)
    with pytest.raises(InputError, match=r"another model: .* do not agree on layer '1.weight'"):
        other = nn.Sequential(nn.Conv2d(3, 15, 1), nn.Conv2d(15, 2, 1))
        attached(other).load_state_dict(state)
    sparsifier = attached(model)
    for key, value in (("kept.0", 3), ("in.0", torch.arange(4)), ("steps", "7"), ("kept.1", None)):
        with pytest.raises(InputError, match=f"state is (damaged|of another model): {key}"):
            sparsifier.load_state_dict({**state, key: value})  # type: ignore[dict-item]
    sparsifier = attached(model, method="admm")
    sparsifier.penalty()
    sparsifier.step()
    state = sparsifier.state_dict()
    with pytest.raises(InputError, match=r"state is damaged: z\.b\.weight fits no weight"):
        sparsifier.load_state_dict({**state, "z.b.weight": torch.zeros(3)})
    del state["u.c.weight"]
    with pytest.raises(InputError, match=r"state is damaged: u\. is not there for every weight"):
        sparsifier.load_state_dict(state)
    assert sparsifier.steps == 1, "nothing was taken over"


@pytest.mark.parametrize("method", ["group_lasso", "admm"])
def test_a_loss_without_the_penalty_is_told(method: str) -> None:
    model = Small()
    sparsifier = attached(model, method=method, begin_step=1, end_step=2)
    sparsifier.step()
    with pytest.raises(InputError, match=f"'{method}' works by its penalty, .* add sparsifier.pe"):
        sparsifier.step()
    sparsifier.penalty()
    sparsifier.step()
    sparsifier.step()  # masks are final, and so is the loss
