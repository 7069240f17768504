"""A swapped model trains as the unswapped one does, and compiles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import disco_kernels as dk
from disco_kernels.backends.cpu import extension_status
from tests.kernels.models import SWAPPABLE, close, conv, images, inference, linear, small, swappable
from tests.kernels.test_swap_life import uses_kernel

needs_extension = pytest.mark.skipif(
    extension_status().error is not None, reason=f"no extension: {extension_status().error}"
)
both_backends = pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=needs_extension), "reference"]
)
compilers = pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
Call = Callable[[Tensor], Tensor]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(backend: str | None = None) -> tuple[nn.Module, nn.Module]:
    """The same model swapped and not."""
    plain = small()
    swapped = copy.deepcopy(plain)
    dk.swap_(swapped, 2, backend=backend)
    return swapped, plain


def step(model: nn.Module, call: Call, x: Tensor, train: bool) -> tuple[Tensor, list[Tensor]]:
    """One SGD step in train or eval mode; the loss and all gradients."""
    model.train(train)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.zero_grad()
    loss = call(x).square().mean()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    return loss.detach(), gradients


def steps_agree(swapped: nn.Module, plain: nn.Module, call: Call, modes: tuple[bool, ...]) -> None:
    for number, train in enumerate(modes):
        x = images(4)
        loss, gradients = step(swapped, call, x, train)
        wanted_loss, wanted = step(plain, plain, x, train)
        assert close(loss, wanted_loss, 10), number
        assert len(gradients) == len(wanted) == len(list(plain.parameters()))
        for (name, _), a, b in zip(plain.named_parameters(), gradients, wanted, strict=True):
            assert close(a, b, 10), (number, name)
        # Whatever the mode, inference sees the weights that the step made.
        with torch.no_grad():
            assert close(call(x), plain(x), 10), number


@both_backends
@pytest.mark.parametrize("modes", [(True, True), (False, False), (False, True, False, True)])
def test_gradients_and_steps_equal_the_unswapped_models(
    backend: str, modes: tuple[bool, ...]
) -> None:
    swapped, plain = pair(backend)
    steps_agree(swapped, plain, swapped, modes)
    swapped.eval()
    assert uses_kernel(swapped) == list(swappable(backend))
    plain.eval()
    assert close(inference(swapped, images()), inference(plain, images()), 1e6)


@both_backends
def test_evaluation_in_grad_mode_runs_the_kernel(backend: str) -> None:
    """Forgetting no_grad costs nothing but memory."""
    swapped, plain = pair(backend)
    x = images()
    for _ in range(3):
        assert close(swapped(x), plain(x)) and swapped(x).requires_grad
        assert uses_kernel(swapped) == list(swappable(backend))


def test_any_gradient_that_reaches_the_weights_is_noticed() -> None:
    """By backward() or by grad(), with an update by hand."""
    x = torch.randn(3, 8)
    for how in ("backward", "grad", "bias only"):
        layer = linear()
        dk.swap_(layer, 2)
        assert uses_kernel(layer) == [""]
        if how == "backward":
            layer(x).sum().backward()
        elif how == "grad":
            torch.autograd.grad(layer(x).sum(), [layer.weight])
        else:
            layer.weight.requires_grad_(False)
            layer(x).sum().backward()
        assert not uses_kernel(layer), how
        with torch.no_grad():
            layer.weight.mul_(2)
            assert close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer.eval()
        assert uses_kernel(layer) == [""]


def test_second_derivatives() -> None:
    for layer, x in ((conv(4, 4), torch.randn(1, 4, 3, 3)), (linear(4, 4), torch.randn(2, 4))):
        layer.double()
        x = x.double().requires_grad_()
        dk.swap_(layer, 2, backend="reference")
        assert torch.autograd.gradcheck(lambda v, m=layer: m(v), (x,))
        assert torch.autograd.gradgradcheck(lambda v, m=layer: m(v), (x,))
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found = torch.autograd.grad(first.square().sum(), [layer.weight, x])
        dk.unswap_(layer)
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        wanted = torch.autograd.grad(first.square().sum(), [layer.weight, x])
        assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


def test_unbatched_gradients() -> None:
    layer, x = conv(), torch.randn(8, 5, 6, requires_grad=True)
    parameters = [x, *layer.parameters()]
    wanted = torch.autograd.grad(layer(x).square().sum(), parameters)
    dk.swap_(layer, 2)
    found = torch.autograd.grad(layer(x).square().sum(), parameters)
    assert len(found) == 3 and all(close(a, b, 10) for a, b in zip(found, wanted, strict=True))


@compilers
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_as_one_graph(compiler: str) -> None:
    swapped, plain = pair()
    compiled = torch.compile(swapped, backend=compiler, fullgraph=True)
    for batch in (2, 3, 5):
        x = images(batch)
        with torch.no_grad():
            assert close(compiled(x), plain(x)), batch
        assert close(compiled(x), plain(x)), batch
    with torch.inference_mode():
        assert close(compiled(x), plain(x))
    assert uses_kernel(swapped) == list(SWAPPABLE)


@compilers
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_model_trains(compiler: str) -> None:
    swapped, plain = pair()
    compiled = torch.compile(swapped, backend=compiler, fullgraph=True)
    steps_agree(swapped, plain, compiled, (False, False, True, False))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_model_unfrozen_after_the_swap_trains() -> None:
    plain = conv(3, 6)
    swapped = copy.deepcopy(plain).requires_grad_(False)
    dk.swap_(swapped, 2)
    swapped.requires_grad_(True)
    compiled = torch.compile(swapped, backend="aot_eager", fullgraph=True)
    x = images()
    with torch.no_grad():
        assert close(compiled(x), plain(x))
    assert uses_kernel(swapped) == [""]
    steps_agree(swapped, plain, compiled, (False, False))


@pytest.mark.usefixtures("fresh_dynamo")
def test_exports() -> None:
    swapped, plain = pair()
    x = images()
    exported = torch.export.export(swapped, (x,), dynamic_shapes=({0: torch.export.Dim("b")},))
    targets = {str(node.target) for node in exported.graph.nodes}
    print(targets)
    assert {"disco_kernels.gather_conv2d.default", "disco_kernels.gather_linear.default"} <= targets
    for batch in (2, 7):
        x = images(batch)
        assert close(inference(exported.module(), x), inference(plain, x))


def _half_read() -> nn.Sequential:
    """A linear and a convolution whose nodes read half of each other's, or nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(8, 8), nn.Linear(8, 8), nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 8, 1)
        )
    with torch.no_grad():
        model[1].weight[:4, 4:] = 0
        model[3].weight[:4, 4:] = 0
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_torchs(compiled: bool) -> None:
    plain, swapped = _half_read(), _half_read()
    assert len(dk.swap_(swapped, 2).swapped) == 2
    x = torch.randn(2, 8)
    run = torch.compile(swapped, fullgraph=True) if compiled else swapped
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = run(x), plain(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_derivatives_of_other_kinds_are_torchs() -> None:
    """Forward mode, and torch.func's transforms: nothing of them reaches the operators."""
    plain, swapped = _half_read(), _half_read()
    dk.swap_(swapped, 2)
    x, direction = torch.randn(2, 8), torch.randn(2, 8)

    def derivatives(model: nn.Module) -> tuple[Tensor, ...]:
        _, by_function = torch.func.jvp(model, (x,), (direction,))
        with forward_ad.dual_level():
            by_level = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
        gradient = torch.func.grad(lambda x: model(x).square().sum())(x)
        return by_function, by_level, gradient, torch.func.jacfwd(model)(x)

    for found, expected in zip(derivatives(swapped), derivatives(plain), strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found, expected)
