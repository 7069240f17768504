"""A model under simulation computes what the ranks of its partition do, in every wire dtype and
without any of them. In float64, so that nothing but the rounding to be simulated is rounded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import disco
from disco.executor import Executor, InProcessHub, run_together
from disco.program.message_layout import WIRE_DTYPES
from disco.small_models import small_model
from disco.sparsify.wire_rounding import rounding_error
from disco_kernels import Ownership
from disco_kernels.wire import message_shape, message_views, write_int8
from tests.executor.test_losses import MODELS

# Sums of some hundred terms, a few layers deep. What is rounded differs by as much before it is
# rounded, which only at a tie (none of the seeds has one) would make another step of the wire.
TOLERANCE = 512 * torch.finfo(torch.float64).eps


class Odd(nn.Module):
    """Weights that are computed, packed attention, a group norm cut by the shares, an op without a
    rule (so that each rank goes on with values of its own), uneven widths and a reused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 14, 3, padding=1), nn.GroupNorm(2, 14)
        self.standardised = nn.Parameter(torch.randn(13, 14, 1, 1))
        self.mixed, self.again = nn.Conv2d(13, 12, 1), nn.Conv2d(12, 12, 1)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.last_norm, self.fc = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        weight = self.standardised - self.standardised.mean((1, 2, 3), keepdim=True)
        x = torch.relu(F.conv2d(x, weight))
        x = self.mixed(x + x.cumsum(1).sigmoid())
        x = self.again(torch.relu(self.again(torch.relu(x)))) + x
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.fc(self.last_norm(tokens).mean(1))


class Pooled(nn.Module):
    """A gate (one value a channel), joined maps, and a map that is made larger after it travels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 9, 3, padding=1, stride=2), nn.Conv2d(9, 10, 1)
        self.squeeze, self.excite = nn.Linear(9, 4), nn.Linear(4, 9)
        self.depthwise, self.c = nn.Conv2d(9, 9, 3, padding=1, groups=9), nn.Conv2d(19, 8, 3)
        self.bn, self.fc = nn.BatchNorm2d(9), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.a(x)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        x = self.depthwise(x * gate[:, :, None, None])
        x = torch.cat((x, F.silu(self.b(x))), 1)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.fc(F.hardswish(self.c(x)))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet8": (lambda: small_model("resnet8")(10, 8), (3, 8, 8)),
    "deit_micro": (lambda: small_model("deit_micro")(10, 8), (3, 8, 8)),
    "odd": (Odd, (3, 6, 5)),
    "pooled": (Pooled, (3, 7, 6)),
}


def randomise(model: nn.Module) -> nn.Module:
    """Norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def made(name: str, nodes: int, density: float = 0.3) -> tuple[nn.Module, Tensor, Tensor]:
    """A sparsified model in float64, an example and a batch of another size."""
    torch.manual_seed(1)
    make, shape = CASES[name]
    model = randomise(make()).double().eval()
    example = torch.randn(2, *shape, dtype=torch.float64)
    disco.sparsify_(model, nodes, density, (example,))
    return model, example, torch.randn(3, *shape, dtype=torch.float64)


def of_ranks(
    partitioned: disco.Partitioned, x: Tensor, lost: Sequence[int] = ()
) -> list[tuple[int, Tensor]]:
    """The answers of the ranks that are left."""
    transports = InProcessHub(len(partitioned.ranks)).transports()
    for transport in transports:
        transport.lost = frozenset(lost)
    left = [rank for rank in range(len(transports)) if rank not in lost]
    executors = [Executor(r.program, r.weights, backend="reference") for r in partitioned.ranks]
    with torch.inference_mode():
        found = run_together([executors[r] for r in left], (x,), [transports[r] for r in left])
    return list(zip(left, found, strict=True))


def check(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    assert found.shape == expected.shape
    assert error <= tolerance * scale, f"{error:.2e} of {scale:.2e}"


# Every model in int8 for three, and every other wire dtype.
PAIRS = [(name, "int8", 3) for name in CASES]
PAIRS += [("resnet8", wire, 2) for wire in WIRE_DTYPES] + [("odd", "bfloat16", 2)]


@pytest.mark.parametrize(("name", "wire", "nodes"), PAIRS)
@torch.no_grad()
def test_as_the_ranks(name: str, wire: str, nodes: int) -> None:
    model, example, x = made(name, nodes)
    whole, dtype = model(x), getattr(torch, wire)
    partitioned = disco.partition(model, (example,), nodes, wire_dtype=dtype)
    assert any(exchange.is_narrow for exchange in partitioned.plan.exchanges)
    simulation = disco.WireSimulation(nodes, wire)
    simulation.attach(model, (example,))
    (_, expected), *_ = of_ranks(partitioned, x)
    check(model(x), expected)
    # Float64 to float32 is the least that is rounded.
    assert float((model(x) - whole).abs().max()) > 1e-9 * float(whole.abs().max())
    simulation.detach()
    assert torch.equal(model(x), whole)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_as_the_ranks_that_are_left(name: str) -> None:
    model, example, x = made(name, 3)
    wire = torch.int8
    partitioned = disco.partition(model, (example,), 3, wire_dtype=wire, survivable=True)
    simulation = disco.WireSimulation(3, "int8", survivable=True)
    simulation.attach(model, (example,))
    for lost in ((), (0,), (2,), (0, 1), ()):
        with simulation.without(lost):
            assert simulation.lost == lost
            check(model(x), of_ranks(partitioned, x, lost)[0][1])
        assert simulation.lost == ()


@pytest.mark.parametrize("name", ["residual", "normed"])
@torch.no_grad()
def test_as_the_model_without_their_channels(name: str) -> None:
    """The same as written down by hand, for the tests of the executor."""
    torch.manual_seed(0)
    make, shape, *_ = MODELS[name]
    model = make().eval()
    exact = copy.deepcopy(model).double()
    owned = (Ownership.contiguous(12, 3), Ownership.contiguous(18, 3))
    x = torch.randn(shape)
    simulation = disco.WireSimulation(3)
    simulation.attach(model, (x,))
    for lost in ((0,), (1,), (0, 2)):
        there = [torch.ones(one.num_channels, dtype=torch.float64) for one in owned]
        for mask, one in zip(there, owned, strict=True):
            mask[[channel for rank in lost for channel in one.channels[rank]]] = 0
        with simulation.without(lost):
            check(model(x), exact(x.double(), there), 64 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("wire", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("dim", [1, -1])
def test_rounding_is_the_kernels(wire: str, dim: int) -> None:
    x = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    channels = x.movedim(dim, -1)
    channels[0, ..., 0] = 0
    channels[1, ..., 1] = 1e-35
    channels[2, 0, 0, 2] = torch.nan
    channels[1, 0, 0, 3] = torch.inf
    channels[:, ..., -1] *= 1e4
    dtype = getattr(torch, wire)
    if wire == "int8":
        message = torch.empty(
            message_shape(dtype, channels.shape[:-1], channels.shape[-1]), dtype=dtype
        )
        write_int8(message, channels.contiguous())
        values, scale = message_views(message, channels.shape[:-1], channels.shape[-1])
        assert scale is not None
        arrived = values.float() * scale[:, None, None]
    else:
        arrived = channels.to(dtype).float()
    error = rounding_error(x, wire, dim % 4).movedim(dim, -1)
    torch.testing.assert_close(error, arrived - channels, rtol=0, atol=0, equal_nan=True)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 16, 3)
        self.c = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def test_gradients_pass_the_rounding() -> None:
    """Of y + (W without its local blocks) * (what arrives - x), the difference being a constant."""
    torch.manual_seed(0)
    model, by_hand = Two().double(), Two().double()
    by_hand.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    simulation = disco.WireSimulation(2, "int8", survivable=True)
    simulation.attach(model, (x,))
    model(x).square().sum().backward()
    h = torch.relu(by_hand.a(x))
    remote = by_hand.b.weight * _other_blocks(16, 8)
    error = rounding_error(h, "int8", 1)
    y = torch.relu(by_hand.b(h) + F.conv2d(error, remote))
    by_hand.c(y).square().sum().backward()
    for (name, mine), other in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None, name
        check(mine.grad, other.grad)


def _other_blocks(outputs: int, inputs: int) -> Tensor:
    rows = torch.arange(outputs) < outputs // 2
    columns = torch.arange(inputs) < inputs // 2
    return (rows[:, None] != columns).double()[:, :, None, None]


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rounding does nothing: outputs, gradients and the statistics of batch norms."""
    model, example, x = made(name, 2)
    plain = copy.deepcopy(model).train()
    simulation = disco.WireSimulation(2, "int8")
    simulation.attach(model.train(), (example,))
    monkeypatch.setattr(
        "disco.sparsify.wire_run.rounding_error", lambda x, wire, dim: torch.zeros_like(x)
    )
    for one in (plain, model):
        one(x).square().sum().backward()
    check(model(x).detach(), plain(x).detach())
    for (key, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None, key
        error = float((mine.grad - other.grad).abs().max())
        assert error <= 1e-11 * max(float(other.grad.abs().max()), 1.0), (key, error)
    for (key, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=key)


def test_batch_norms_stay_when_ranks_are_lost() -> None:
    model, example, x = made("resnet8", 2)
    model.train()
    simulation = disco.WireSimulation(2)
    simulation.attach(model, (example,))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with simulation.without((1,)):
        trained = model(x)
        trained.square().sum().backward()
        model.eval()
        assert torch.equal(trained, model(x))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    # What the lost rank computes is not trained; what is computed of its channels is not either.
    conv = model.get_parameter("backbone.stages.1.conv1.weight").grad
    assert conv is not None and not conv[16:].any() and not conv[:, 8:].any()
    assert conv[:16, :8].any()


def test_gradients_are_finite_whatever_is_lost() -> None:
    """Also where a group of a norm is lost with its rank, and where nothing of it is left."""
    model, example, x = made("odd", 2)
    simulation = disco.WireSimulation(2, "int8")
    simulation.attach(model.train(), (example,))
    for rank in range(2):
        model.zero_grad()
        with simulation.without((rank,)):
            model(x).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_weights_that_change_are_those_of_the_next_call() -> None:
    model, example, x = made("resnet8", 2)
    simulation = disco.WireSimulation(2, "int8")
    simulation.attach(model, (example,))
    with torch.no_grad():
        before = model(x)
        model.get_parameter("backbone.bn.bias").add_(1.0)
        after = model(x)
        state = model.state_dict()
        state["backbone.bn.bias"] = state["backbone.bn.bias"] - 1.0
        model.load_state_dict(state)
        check(model(x), before)
    assert not torch.allclose(before, after)


class Noisy(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return (y, y) if self.training else y


class OwnNorm(nn.Module):
    """Statistics that no module of torch keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.variance, training=self.training)


def _refused(model: nn.Module, text: str) -> None:
    simulation = disco.WireSimulation(2, "int8")
    with pytest.raises(disco.InputError, match=text):
        simulation.attach(model, (torch.randn(2, 3, 6, 6),))
    assert "forward" not in vars(model) and not simulation.attached


def test_what_would_be_left_out_is_refused() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    _refused(nn.Sequential(*layers, nn.RReLU()).train(), "random numbers in training elsewhere")
    _refused(Noisy(*layers).train(), "returns something else in training")
    _refused(OwnNorm().eval(), "how it trains is not known")
    model = nn.Sequential(*layers, nn.AlphaDropout(0.5)).eval()
    x = torch.randn(2, 3, 6, 6)
    simulation = disco.WireSimulation(2, "int8")
    simulation.attach(model, (x,))
    model(x)
    with pytest.raises(disco.InputError, match="random numbers"):
        model.train()(x)
    model[3].p = 0.0
    assert model(x).shape == (2, 4, 4, 4)


def test_wrong_arguments() -> None:
    for ranks, text in (((2,), "0 to 1 of 2"), ((0, 1), "at least one"), ((True,), "given True")):
        with pytest.raises(disco.InputError, match=text):
            disco.WireSimulation(2).lost = ranks
    with pytest.raises(disco.InputError, match="int8"):
        disco.WireSimulation(2, "int4")
    model, x = Two(), torch.randn(2, 3, 9, 9)
    simulation = disco.WireSimulation(2, "int8")
    simulation.attach(model, (x,))
    for other in (simulation, disco.WireSimulation(2)):
        with pytest.raises(disco.InputError, match="attached already"):
            other.attach(model, (x,))
    with pytest.raises(disco.InputError, match="must be a tensor"):
        model([x])
    simulation.detach()
    simulation.detach()
    assert model(x).shape == (2, 4, 5, 5)


def test_nothing_is_simulated_where_nothing_would_be() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5), nn.Conv2d(8, 4, 1)), torch.ones(1)
    simulation = disco.WireSimulation(2)
    simulation.attach(model.eval(), (torch.randn(2, 3, 4, 4),))
    x = torch.randn(2, 3, 4, 4)
    called = []
    model[0].register_forward_hook(lambda *_: called.append(1))
    model.train()(x)
    assert called
