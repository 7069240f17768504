"""Dropout and stochastic depth under simulation are those of the modules that draw them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import disco
from disco.torchvision_compat import import_torchvision

TOLERANCE = 512 * torch.finfo(torch.float64).eps


class DropPath(nn.Module):
    """In training times a power of two, which rounds nothing; drawn by nobody."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor if self.training else x


Noise = Callable[[int], nn.Module]


class Net(nn.Module):
    """Noise on a residual branch, after a convolution, a norm, an activation, a pooling, a linear,
    and twice in a row."""

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.bn, self.fork = nn.BatchNorm2d(12), nn.Conv2d(12, 10, 1)
        self.to_tokens, self.norm = nn.Conv2d(10, 16, 1), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.last, self.fc = nn.LayerNorm(16), nn.Linear(16, 5)
        self.noise = nn.ModuleList(noise(i) for i in range(9))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g, h, i = self.noise
        x = a(torch.relu(self.stem(x)))
        x = b(self.bn(self.branch(x))) + x
        x = torch.relu(c(self.fork(x)))
        tokens = d(self.to_tokens(x).flatten(2).transpose(1, 2))
        y = e(self.norm(tokens))
        y = g(self.down(f(F.gelu(self.up(y)))))
        tokens = tokens + h(y)
        return self.fc(i(self.last(tokens).mean(1)))


FACTORS = (0.5, 2.0, 0.25, 4.0, 0.5, 2.0, 0.25, 2.0, 0.5)


def _scales() -> dict[str, float]:
    """By what parameters are to be multiplied to have the same effect."""
    a, b, c, d, e, f, g, h, i = FACTORS
    both = {"stem": a, "bn": b, "fork": c, "to_tokens": d, "norm": e}
    scales = {f"{name}.{part}": s for name, s in both.items() for part in ("weight", "bias")}
    return {**scales, "down.weight": f * g * h, "down.bias": g * h, "fc.weight": i}


def pair(nodes: int) -> tuple[Net, Net, Tensor]:
    """A sparsified model with noise of known factors, the same with other weights, and images."""
    torch.manual_seed(3)
    example = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    noisy = Net(lambda i: DropPath(FACTORS[i])).double()
    disco.sparsify_(noisy, nodes, 0.3, (example,))
    plain = Net(lambda i: nn.Identity()).double()
    plain.load_state_dict(noisy.state_dict())
    with torch.no_grad():
        for name, scale in _scales().items():
            plain.get_parameter(name).mul_(scale)
    return noisy.train(), plain.train(), torch.randn(3, 3, 6, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("wire", "nodes", "lost"),
    [("int8", 2, ()), ("bfloat16", 3, ()), ("int8", 3, (1,)), ("float32", 2, (0,))],
)
def test_as_a_model_whose_weights_have_the_factors(
    wire: str, nodes: int, lost: tuple[int, ...]
) -> None:
    noisy, plain, x = pair(nodes)
    found: list[Tensor] = []
    for model in (noisy, plain):
        simulation = disco.WireSimulation(nodes, wire, survivable=bool(lost))
        simulation.attach(model, (x[:2],))
        with simulation.without(lost):
            y = model(x)
        y.square().sum().backward()
        found.append(y.detach())
        simulation.detach()
    _check(found[0], found[1])
    for name, parameter in noisy.named_parameters():
        expected = plain.get_parameter(name).grad
        assert parameter.grad is not None and expected is not None, name
        _check(parameter.grad, expected * _scales().get(name, 1.0))


def _check(found: Tensor, expected: Tensor) -> None:
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    # Biases before a batch norm have gradients that are zero but for rounding.
    assert error <= TOLERANCE * max(scale, 1.0), f"{error:.2e} of {scale:.2e}"


def test_evaluation_has_none() -> None:
    noisy, plain, x = pair(2)
    plain.load_state_dict(noisy.state_dict())
    found = []
    for model in (noisy, plain):
        simulation = disco.WireSimulation(2, "int8")
        simulation.attach(model.eval(), (x[:2],))
        found.append(model(x).detach())
    _check(*found)


@pytest.mark.parametrize("kind", ["dropout", "dropout2d", "rows", "batch", "timm"])
def test_real_modules_draw_anew_for_each_pass_and_once_in_it(kind: str) -> None:
    """The answer is the model's own from the same state of the generator, but for rounding."""
    make = _modules()[kind]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), make(), nn.Conv2d(12, 8, 1), make()
    ).double()
    x = torch.randn(16, 3, 5, 5, dtype=torch.float64)
    simulation = disco.WireSimulation(2, "int8")
    simulation.attach(model.train(), (x[:2],))
    torch.manual_seed(1)
    first = model(x)
    assert not all(torch.equal(first, model(x)) for _ in range(5))
    torch.manual_seed(1)
    assert torch.equal(first, model(x))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    for channels in (12, 8):
        model[2](torch.ones(16, channels, 5, 5, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), state)
    # The same, but for the rounding: half a step of 127 for each of 12 channels.
    torch.manual_seed(1)
    simulation.detach()
    whole = model(x)
    zeros = whole == 0
    assert torch.equal(zeros, first == 0)
    assert zeros.any() or kind == "batch"  # where it is all or nothing, here all
    assert (first - whole).abs().max() < 0.05 * whole.abs().max()
    assert not torch.equal(first, whole)


def _modules() -> dict[str, Callable[[], nn.Module]]:
    torchvision = import_torchvision()

    def of_timm() -> nn.Module:
        layers = pytest.importorskip("timm.layers")
        made: nn.Module = layers.DropPath(0.5)
        return made

    return {
        "dropout": lambda: nn.Dropout(0.5, inplace=True),
        "dropout2d": lambda: nn.Dropout2d(0.5),
        "rows": lambda: torchvision.ops.StochasticDepth(0.5, "row"),
        "batch": lambda: torchvision.ops.StochasticDepth(0.5, "batch"),
        "timm": of_timm,
    }


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.drop = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.last(x + self.drop(x))


class ReadTwiceThroughAnother(ReadTwice):
    """The first does nothing, and yet the second's input is one with what others read."""

    def __init__(self) -> None:
        super().__init__()
        self.still = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.last(x + self.drop(self.still(x)))


class Functional(ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.conv(x), 0.5, self.training))


class OfTheInput(ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(self.drop(x)))


class OfAWeight(ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.drop(self.last.weight * 2.0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.MultiheadAttention(6, 2, dropout=0.25, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        return self.mixer(tokens, tokens, tokens, need_weights=False)[0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (ReadTwice, "'drop' draws random numbers in training for what is read without them"),
        (OfTheInput, "'drop' draws random numbers in training for .* an input"),
        (OfAWeight, "'drop' draws random numbers in training for .* made of parameters alone"),
        (Functional, "Functional draws random numbers in training elsewhere"),
        (Attention, r"\(perhaps in mixer\), which cannot be simulated: set these rates to 0"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.AlphaDropout(0.5), nn.Conv2d(4, 4, 1)),
            r"\(perhaps in 1\)",
        ),
    ],
)
def test_noise_that_cannot_be_simulated(make: Callable[[], nn.Module], text: str) -> None:
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    simulation = disco.WireSimulation(2, "int8")
    with pytest.raises(disco.InputError, match=text):
        simulation.attach(model, (torch.randn(2, 3, 3, 2),))
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("make", [ReadTwice, ReadTwiceThroughAnother, OfTheInput, OfAWeight])
def test_it_matters_only_while_it_is_drawn(make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), torch.randn(2, 3, 3, 2)
    simulation = disco.WireSimulation(2, "int8")
    simulation.attach(model, (x,))
    expected = model(x)
    with pytest.raises(disco.InputError, match="'drop' draws random numbers"):
        model.train()(x)
    model.get_submodule("drop").p = 0.0
    assert torch.equal(model(x), expected)
    simulation.detach()
    simulation.attach(model, (x,))
    assert torch.equal(model(x), expected)


def test_modules_have_their_own_forward_again() -> None:
    model = Net(lambda i: nn.Dropout(0.1)).train()
    model.noise[0].forward = own = lambda x: x
    simulation = disco.WireSimulation(2, "int8")
    simulation.attach(model, (torch.randn(2, 3, 6, 5),))
    assert model.noise[0].forward is own
    assert not any("forward" in vars(module) for module in model.noise[1:])
