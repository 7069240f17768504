"""The activations of the epilogue against float64: every value, the ends of the range, every op.

`test_isa.py` runs this file once for each instruction set; `test_conv2d.py` has them as an axis.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import disco_kernels as dk
from disco_kernels.backends.cpu import extension_status
from tests.kernels import activations
from tests.kernels.cases import BACKENDS, bits, run

pytestmark = pytest.mark.usefixtures("poison")

STATUS = extension_status()
needs_extension = pytest.mark.skipif(
    STATUS.error is not None, reason=f"no extension: {STATUS.error}"
)
both_backends = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=needs_extension if b == "cpu" else ()) for b in BACKENDS]
)
every_activation = pytest.mark.parametrize("activation", dk.ACTIVATIONS)

INF, NAN = math.inf, math.nan
# At -infinity, +infinity, -0.0 and 0.0; the sign of a zero counts. Where the definition has
# -infinity times zero, torch has NaN, and so have the kernels.
AT_THE_ENDS = {
    "none": (-INF, INF, -0.0, 0.0),
    "relu": (0.0, INF, -0.0, 0.0),
    "relu6": (0.0, 6.0, -0.0, 0.0),
    "silu": (NAN, INF, -0.0, 0.0),
    "gelu": (NAN, INF, -0.0, 0.0),
    "gelu_tanh": (NAN, INF, -0.0, 0.0),
    "hardswish": (NAN, INF, -0.0, 0.0),
    "hardsigmoid": (0.0, 1.0, 0.5, 0.5),
    "sigmoid": (0.0, 1.0, 0.5, 0.5),
}
# Finite values at which something changes, both signs: the ramps' corners, where e^-x becomes zero
# (87.68, for gelu_tanh and gelu at some 9.9 and 13.2) or would in other formulas, the largest
# float32 and some that overflow when multiplied by six or squared, denormal ones.
CORNERS = (
    *(1e-45, 1e-39, 2.0**-126, 1e-30, 1e-8, 0.5, 1.0, 2.9999998, 3.0, 3.0000002, 5.9999995, 6.0),
    *(9.8, 9.9, 10.0, 13.0, 13.2, 14.0, 16.6, 87.0, 87.68, 88.0, 88.03, 88.73, 104.0, 127.0, 1e4),
    *(1e13, 1e19, 1e20, 6e37, 1e38, 3.4028234e38),
)


def applied(values: Tensor, activation: str, backend: str, outputs: int = 47) -> Tensor:
    """The activation of exactly these values: a layer without inputs adds -0.0 to its residual."""
    tokens = -(-values.numel() // outputs)
    residual = torch.zeros(tokens * outputs)
    residual[: values.numel()] = values
    kernel = dk.PartialLinear(
        torch.empty(outputs, 0),
        [0],
        bias=torch.full((outputs,), -0.0),
        activation=activation,
        backend=backend,
    )
    rows = residual.view(tokens, outputs)
    y = run(lambda out: kernel([torch.empty(tokens, 0)], rows), "fresh", (), activation, backend)
    return y.reshape(-1)[: values.numel()]


def check(found: Tensor, x: Tensor, activation: str) -> None:
    """Within what is stated of the C++ kernels, everywhere."""
    exact, allowed = activations.exact(x, activation), activations.allowed(x, activation)
    wrong = ~((found.double() - exact).abs() <= allowed)
    assert not bool(wrong.any()), (
        f"{activation}: {int(wrong.sum())} of {x.numel()} are wrong, the first at "
        f"{float(x[wrong][0])!r}: {float(found[wrong][0])!r}, exact {float(exact[wrong][0])!r}, "
        f"allowed difference {float(allowed[wrong][0]):.3g}"
    )


@needs_extension
@every_activation
def test_accuracy_over_the_range_cpu(activation: str) -> None:
    """Every 401st float32 from 2^-30 to 2^7, of both signs, and the neighbours of the corners."""
    first, last = (int(bits(torch.tensor([e]))) for e in (2.0**-30, 2.0**7))
    steps = torch.arange(first, last, 401, dtype=torch.int32).view(torch.float32)
    corners = bits(torch.tensor(CORNERS))[:, None] + torch.arange(-40, 41, dtype=torch.int32)
    near = corners.clamp(0, int(bits(torch.tensor(CORNERS[-1:])))).view(torch.float32).reshape(-1)
    x = torch.cat([steps, -steps, near, -near])
    found = applied(x, activation, "cpu")
    assert bool(found.isfinite().all())
    check(found, x, activation)
    assert x.numel() > 1_500_000


@both_backends
@every_activation
def test_corners(activation: str, backend: str) -> None:
    """The reference is torch's own float32, whose gelu and hardswish overflow at the very end."""
    ends = [v for v in CORNERS if backend == "cpu" or v < 1e19]
    x = torch.tensor([*ends, *(-v for v in ends)])
    found = applied(x, activation, backend)
    if backend == "cpu":
        check(found, x, activation)
    error = (found.double() - activations.exact(x, activation)).abs()
    allowed = activations.bound(x.double(), torch.zeros_like(error), activation)
    assert bool((error <= allowed).all()), x[error > allowed]


@both_backends
@every_activation
def test_infinities_zeros_and_nan(activation: str, backend: str) -> None:
    at = torch.tensor([-INF, INF, -0.0, 0.0])
    wanted = torch.tensor(AT_THE_ENDS[activation])
    exact = activations.exact(at, activation)
    torch.testing.assert_close(exact, wanted.double(), rtol=0, atol=0, equal_nan=True)
    nans = torch.tensor([NAN, -NAN]).repeat(20)
    for outputs in (1, 4, 16, 33):
        found = applied(at, activation, backend, outputs)
        if backend == "reference" and activation == "gelu":
            found[1] = INF  # torch 2.13 on the CPU: NaN in float32, infinity in float64
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        # The reference's empty sum is 0.0, and -0.0 added to it is lost.
        zeros = (found == 0) & (backend == "cpu")
        assert torch.equal(found.signbit()[zeros], wanted.signbit()[zeros])
        assert bool(applied(nans, activation, backend, outputs).isnan().all())


@needs_extension
def test_neighbours_do_not_matter_cpu() -> None:
    """A value's result does not depend on its place in a vector or on what lies beside it."""
    x = torch.randn(331) * 8
    for activation in dk.ACTIVATIONS:
        whole = applied(x, activation, "cpu", 331)
        spoiled = x.clone()
        spoiled[::3] = NAN
        keep = ~spoiled.isnan()
        assert torch.equal(applied(spoiled, activation, "cpu", 331)[keep], whole[keep])
        assert torch.equal(applied(x, activation, "cpu", 1), whole), activation


@both_backends
@every_activation
def test_they_are_torchs(activation: str, backend: str) -> None:
    """The names mean what torch's functions compute."""
    functions = {
        "none": lambda x: x,
        "relu": F.relu,
        "relu6": F.relu6,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
        "sigmoid": torch.sigmoid,
    }
    assert tuple(functions) == dk.ACTIVATIONS
    x = torch.randn(3001) * 4
    wanted = functions[activation](x.double())
    exact = activations.exact(x, activation)
    torch.testing.assert_close(exact, wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        applied(x, activation, backend).double(), wanted, rtol=2e-6, atol=2e-6
    )


@needs_extension
def test_unknown_numbers_are_refused_cpu() -> None:
    """Python and the extension agree on how many there are."""
    from disco_kernels import _C

    for number in (-1, len(dk.ACTIVATIONS)):
        with pytest.raises(ValueError, match=f"activation {number} is not one of the 9"):
            _C.Conv2d((1, 1, 1, 1, 0, 0, 1, 1), [], number)
    _C.Conv2d((1, 1, 1, 1, 0, 0, 1, 1), [], len(dk.ACTIVATIONS) - 1)


def test_the_bounds_would_notice() -> None:
    """Neighbouring activations, and cheaper formulas, are outside of what is allowed."""
    x = torch.linspace(-8, 8, 1001)
    for name in dk.ACTIVATIONS:
        for other in dk.ACTIVATIONS:
            if name != other:
                with pytest.raises(AssertionError, match="are wrong"):
                    check(activations.exact(x, other).float(), x, name)
        check(activations.exact(x, name).float(), x, name)
    with pytest.raises(AssertionError, match="are wrong"):
        check(0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))), x, "gelu")
    with pytest.raises(AssertionError, match="are wrong"):
        check(x * torch.sigmoid(1.702 * x), x, "gelu")
