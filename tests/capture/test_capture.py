"""Capture: small models become the expected fused programs, and compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disco.capture import Captured, capture
from disco.errors import InputError
from disco.program import Program, interpret

EPS = torch.finfo(torch.float32).eps


def _randomise_batch_norms(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(torch.randn(module.num_features, generator=generator))
                    module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return model


@torch.no_grad()
def _check_equal(model: nn.Module, captured: Captured, *inputs: Tensor, factor: float = 16) -> None:
    """The program in float32 against the model in float64, within a few roundings of the scale."""
    exact = copy.deepcopy(model).eval().double()(*(x.double() for x in inputs))
    read = Program.from_json(captured.program.to_json())
    result = interpret(read, captured.weights, inputs)
    error, scale = float((result - exact).abs().max()), float(exact.abs().max())
    assert error <= factor * EPS * scale, f"error {error:.2e} at scale {scale:.2e}"


def _kinds(captured: Captured) -> list[str]:
    return [op.kind for op in captured.program.ops]


class Residual(nn.Module):
    """conv-bn-relu, conv-bn + shortcut, relu: the block that residual networks are made of."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 6 if shortcut else 4, 3, padding=1, bias=False)
        self.bn_a = nn.BatchNorm2d(self.a.out_channels)
        self.b = nn.Conv2d(self.a.out_channels, self.a.out_channels, 3, padding=1)
        self.bn_b = nn.BatchNorm2d(self.a.out_channels)
        self.shortcut = nn.Conv2d(4, 6, 1) if shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn_b(self.b(F.relu(self.bn_a(self.a(x)))))
        return F.relu(y + self.shortcut(x))


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_residual_block_is_folded_and_fused(shortcut: bool, batch: int) -> None:
    torch.manual_seed(0)
    model = _randomise_batch_norms(Residual(shortcut))
    captured = capture(model, (torch.randn(1, 4, 6, 6),))

    assert _kinds(captured) == ["disco.conv2d"] * (3 if shortcut else 2)
    last = captured.program.ops[-1]
    assert last.args[3] is not None and last.kwargs["activation"] == "relu"
    assert captured.program.values["x"].shape == ("s0", 4, 6, 6)
    _check_equal(model, captured, torch.randn(batch, 4, 6, 6))


def test_capture_leaves_the_model_alone() -> None:
    model = _randomise_batch_norms(Residual(True)).train()
    model.a.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    capture(model, (torch.randn(2, 4, 6, 6),))
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_folded_weights_know_the_parameter_behind_them() -> None:
    model = _randomise_batch_norms(Residual(False))
    captured = capture(model, (torch.randn(2, 4, 6, 6),))
    names = captured.program.weight_names()
    parameters = {captured.raw_name(name) for name in names}
    assert {"a.weight", "b.weight", "b.bias"} <= parameters
    for name in names:
        raw = captured.weights[captured.raw_name(name)]
        assert torch.equal(raw, model.get_parameter(captured.raw_name(name)))
        assert name == captured.raw_name(name) or not torch.equal(raw, captured.weights[name])


class Calls(nn.Module):
    """A module whose forward is a function of it and the input: models in one line."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def test_one_convolution_with_two_batch_norms_is_folded_twice() -> None:
    modules = {"conv": _conv(), "one": nn.BatchNorm2d(4), "two": nn.BatchNorm2d(4)}
    model = Calls(lambda m, x: m.two(m.conv(m.one(m.conv(x)))), **modules)
    _randomise_batch_norms(model)
    captured = capture(model, (torch.randn(2, 4, 5, 5),))
    assert _kinds(captured) == ["disco.conv2d"] * 2
    first, second = (op.args[1] for op in captured.program.ops)
    assert first != second
    _check_equal(model, captured, torch.randn(3, 4, 5, 5))


def test_a_convolution_that_others_read_is_not_folded() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) * y

    model = _randomise_batch_norms(Calls(forward, conv=_conv(), bn=nn.BatchNorm2d(4)))
    captured = capture(model, (torch.randn(2, 4, 5, 5),))
    assert _kinds(captured) == ["disco.conv2d", "disco.channel_affine", "aten.mul.Tensor"]
    _check_equal(model, captured, torch.randn(3, 4, 5, 5))


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_without_convolution_becomes_scale_and_shift(affine: bool) -> None:
    model = Calls(lambda m, x: F.relu(m.bn(x)), bn=nn.BatchNorm2d(4, affine=affine))
    _randomise_batch_norms(model)
    captured = capture(model, (torch.randn(2, 4, 5, 5),))
    assert _kinds(captured) == ["disco.channel_affine"]
    assert captured.program.ops[0].kwargs["activation"] == "relu"
    _check_equal(model, captured, torch.randn(3, 4, 5, 5))


@pytest.mark.parametrize(
    ("forward", "kinds"),
    [
        # An activation between the convolution and the addition cannot be moved behind it.
        (lambda m, x: F.relu(m.conv(x)) + x, ["disco.conv2d", "aten.add.Tensor"]),
        # A broadcast addition is no residual.
        (lambda m, x: m.conv(x) + x.mean((2, 3), keepdim=True), None),
        (lambda m, x: m.conv(x) + x * 2, ["aten.mul.Tensor", "disco.conv2d"]),
        # Scaled additions are not fused.
        (lambda m, x: torch.add(m.conv(x), x, alpha=2), ["disco.conv2d", "aten.add.Tensor"]),
        # Read twice: the sum needs the convolution's own result elsewhere.
        (lambda m, x: (m.conv(x) + x) * m.conv(x), None),
        # Activations that the kernels do not have.
        (lambda m, x: F.elu(m.conv(x)), ["disco.conv2d", "aten.elu.default"]),
        (lambda m, x: F.hardtanh(m.conv(x)), ["disco.conv2d", "aten.hardtanh.default"]),
        (lambda m, x: m.conv(x).clamp(0, 5), ["disco.conv2d", "aten.clamp.default"]),
        (lambda m, x: m.conv(x).clamp(max=6), ["disco.conv2d", "aten.clamp.default"]),
        (lambda m, x: m.conv(x).clamp_min(1), ["disco.conv2d", "aten.clamp_min.default"]),
        # Only one: a second one finds the place taken.
        (lambda m, x: F.silu(F.relu(m.conv(x))), ["disco.conv2d", "aten.silu.default"]),
        # Read twice: the activation's input is needed itself.
        (lambda m, x: (y := m.conv(x)) * torch.sigmoid(y), None),
    ],
)
def test_what_is_fused_and_what_is_not(forward: Any, kinds: list[str] | None) -> None:
    torch.manual_seed(1)
    model = Calls(forward, conv=_conv())
    captured = capture(model, (torch.randn(2, 4, 5, 5),))
    if kinds is not None:
        assert _kinds(captured) == kinds
    _check_equal(model, captured, torch.randn(3, 4, 5, 5))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.relu, "relu"),
        (lambda x: x.clamp(min=0), "relu"),
        (lambda x: x.clamp_min(0), "relu"),
        (F.relu6, "relu6"),
        (lambda x: F.hardtanh(x, 0, 6), "relu6"),
        (lambda x: x.clamp(0, 6), "relu6"),
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (lambda x: F.gelu(x, approximate="none"), "gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (F.hardswish, "hardswish"),
        (F.hardsigmoid, "hardsigmoid"),
        (torch.sigmoid, "sigmoid"),
    ],
)
def test_activations_of_the_epilogue_are_fused(activation: Any, name: str) -> None:
    """After a convolution, a convolution with residual, a batch norm alone, and a linear."""
    torch.manual_seed(1)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = activation(m.conv(x))
        y = activation(m.bn(activation(m.conv(y) + x)))
        return activation(m.fc(y))

    modules = {"conv": _conv(), "bn": nn.BatchNorm2d(4), "fc": nn.Linear(5, 6)}
    model = _randomise_batch_norms(Calls(forward, **modules))
    captured = capture(model, (torch.randn(2, 4, 5, 5),))
    kinds = ["disco.conv2d", "disco.conv2d", "disco.channel_affine", "disco.linear"]
    assert _kinds(captured) == kinds
    assert [op.kwargs["activation"] for op in captured.program.ops] == [name] * 4
    _check_equal(model, captured, torch.randn(3, 4, 5, 5))


def test_a_result_that_is_also_returned_is_kept() -> None:
    def forward(m: Any, x: Tensor) -> dict[str, Any]:
        y, z = m.conv(x), m.conv(x)
        return {"sum": y + x, "parts": (y, F.relu(z), z)}

    model = Calls(forward, conv=_conv())
    captured = capture(model, (torch.randn(2, 4, 5, 5),))
    x = torch.randn(3, 4, 5, 5)
    result = interpret(captured.program, captured.weights, (x,))
    expected = model(x)
    assert list(result) == ["sum", "parts"] and isinstance(result["parts"], tuple)
    assert torch.allclose(result["sum"], expected["sum"], atol=1e-6)
    assert torch.equal(result["parts"][1], result["parts"][2].relu())
    assert torch.allclose(result["parts"][0], expected["parts"][0], atol=1e-6)
    assert not torch.allclose(result["parts"][0], result["sum"], atol=1e-2)


def test_linears_over_tokens_take_residuals() -> None:
    model = Calls(lambda m, x: m.fc(x) + x, fc=nn.Linear(8, 8))
    captured = capture(model, (torch.randn(2, 5, 8),))
    assert _kinds(captured) == ["disco.linear"]
    _check_equal(model, captured, torch.randn(1, 5, 8))


def test_dropout_copies_and_unread_results_go() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.conv(x)  # unread
        return torch.cat([m.drop(m.conv(x)).contiguous()], 1)

    model = Calls(forward, conv=_conv(), drop=nn.Dropout(0.5))
    captured = capture(model, (torch.randn(2, 4, 5, 5),))
    assert _kinds(captured) == ["disco.conv2d"]


def _over_all(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, :4] += x
    return y


def _over_all_by_copying(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:] = m.conv(x)
    return y + x


@pytest.mark.parametrize("forward", [_over_all, _over_all_by_copying])
def test_what_is_written_over_as_a_whole_is_what_is_written(forward: Any) -> None:
    """GhostNet adds its shortcuts so; left as it is it would be an op that no rule shards."""
    model = Calls(forward, conv=_conv())
    captured = capture(model, (torch.randn(2, 4, 5, 5),))
    assert _kinds(captured) == ["disco.conv2d"]
    _check_equal(model, captured, torch.randn(3, 4, 5, 5))


@pytest.mark.parametrize("part", [(0, 2), (1, 3), (-1, None), (1, 1), (3, 99), (-99, -2)])
@pytest.mark.parametrize("dim", [1, 2])
def test_what_is_written_into_a_part_is_joined_with_the_rest(
    part: tuple[int, int | None], dim: int
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y.movedim(dim, 0)[slice(*part)] *= 2
        return y

    model = Calls(forward, conv=_conv())
    captured = capture(model, (torch.randn(2, 4, 4, 4),))
    kinds = _kinds(captured)
    assert ("aten.cat.default" in kinds) == (part != (1, 1)), kinds
    assert "aten.slice_scatter.default" not in kinds or part == (1, 1)
    _check_equal(model, captured, torch.randn(3, 4, 4, 4))


def test_what_is_written_into_a_constant() -> None:
    """Its slices are folded, what is left is one tensor to join with."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn.weight[None, :, None, None].repeat(2, 1, 5, 5)
        y[:, 1:3] = m.conv(x)[:, :2]
        return y

    model = Calls(forward, conv=_conv(), bn=nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 5, 5)
    captured = capture(model, (x,), dynamic_batch=False)
    assert _kinds(captured) == ["disco.conv2d", "aten.slice.Tensor", "aten.cat.default"]
    _check_equal(model, captured, x)


def test_every_second_row_is_still_written() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y[:, :, ::2] = x[:, :, ::2]
        return y

    model = Calls(forward, conv=_conv())
    captured = capture(model, (torch.randn(2, 4, 5, 5),))
    assert "aten.slice_scatter.default" in _kinds(captured)
    _check_equal(model, captured, torch.randn(3, 4, 5, 5))


def test_captures_are_equal() -> None:
    model = _randomise_batch_norms(Residual(True))
    texts = {capture(model, (torch.randn(1, 4, 6, 6),)).program.to_json() for _ in range(2)}
    assert len(texts) == 1


def test_a_static_batch_is_kept() -> None:
    captured = capture(Residual(False), (torch.randn(3, 4, 6, 6),), dynamic_batch=False)
    assert captured.program.values["x"].shape == (3, 4, 6, 6)


@pytest.mark.parametrize(
    ("example_inputs", "message"),
    [
        (torch.randn(1, 4, 6, 6), "pass a tuple"),
        ((), "is empty"),
        ((3,), "hold no tensor"),
        (({"x": [torch.randn(2, 4), object()]},), "only tensors and constants are supported"),
        ({"x": torch.randn(2, 4)}, "is a dict; pass a tuple"),
        ((torch.randn(()),), "first dimension must be the batch"),
        ((torch.randn(0, 4),), "first dimension must be the batch"),
        (([torch.randn(2, 4), torch.randn(3, 4)],), "differ in batch size"),
        ((torch.randn(2, 4), torch.randn(2, 4)), "does not take these example inputs: too many"),
    ],
)
def test_wrong_examples(example_inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(Residual(False), example_inputs)


def test_data_dependent_control_flow_is_one_line() -> None:
    model = Calls(lambda m, x: x * 2 if float(x.sum()) > 0 else x)
    with pytest.raises(InputError, match=r"Calls cannot be captured by torch\.export") as caught:
        capture(model, (torch.randn(2, 3),))
    assert "\n" not in str(caught.value)


def test_a_model_that_changes_its_buffers_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x * self.calls

    with pytest.raises(InputError, match="changes 'calls' while it runs"):
        capture(Counts(), (torch.randn(2, 3),))


def test_an_op_outside_the_allow_list_is_named() -> None:
    model = Calls(lambda m, x: torch.linalg.matrix_exp(x))
    with pytest.raises(InputError, match=r"linalg_matrix_exp.*register_op"):
        capture(model, (torch.randn(2, 3, 3),))
