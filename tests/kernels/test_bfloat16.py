"""Bfloat16 tensors: sums in float32, one rounding at the end.

The oracle is float64 of the rounded inputs; `oracle.rounded` adds the result's rounding. Winograd
with bfloat16 activations is in `test_winograd`. `test_isa.py` runs this file on each instruction
set.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import disco_kernels as dk
from disco_kernels.backends.cpu import extension_status
from tests.kernels import oracle
from tests.kernels.cases import fits, fresh, image, in_dtype, run
from tests.kernels.cases import spec_of as spec_of_windows
from tests.kernels.covering import Case, covered_pairs, pairwise, possible_pairs
from tests.kernels.layers import GATHER_AXES, PARTIAL_AXES, run_gather, run_partial

STATUS = extension_status()
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(STATUS.error is not None, reason=f"no extension: {STATUS.error}"),
]

BF16 = torch.bfloat16


def spec_of(case: Case) -> dk.ConvSpec:
    return spec_of_windows(case["gh"], case["gw"], case["activation"])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


def check(y: Tensor, expected: oracle.Expected, what: object = "") -> None:
    assert y.dtype == BF16
    oracle.check(y, oracle.rounded(expected, BF16), what)


def test_partial_conv2d_cpu() -> None:
    cases = pairwise(PARTIAL_AXES, fits)
    for number, case in enumerate(cases):
        run_partial(case, spec_of(case), BF16, number)
    assert covered_pairs(PARTIAL_AXES, cases) == possible_pairs(PARTIAL_AXES, fits)


def test_gather_conv2d_cpu() -> None:
    cases = pairwise(GATHER_AXES, fits)
    for number, case in enumerate(cases):
        run_gather(case, spec_of(case), BF16, number)
    assert covered_pairs(GATHER_AXES, cases) == possible_pairs(GATHER_AXES, fits)


def test_every_number_of_channels_cpu() -> None:
    """1..130 output and listed input channels, unsorted, of up to 261: windows of 32 words."""
    for number in range(1, 131):
        count = number * 37 % 131 or 130
        owned = count + number
        stride = 1 + number % 2
        x = in_dtype(image("w", 2, owned, 5, 9), BF16)
        listed = torch.randperm(owned)[:count].to(torch.int32)
        if number % 3:
            listed = listed.sort().values
        spec = dk.ConvSpec(stride=(stride, stride))
        weight = randn(number, count, 1, 1)
        kernel = dk.PartialConv2d(weight, [count], spec, index=[listed], backend="cpu")
        y = run(fresh(kernel, [x]), "fresh", (), number, "cpu", BF16)
        check(y, oracle.conv2d(x[:, listed.long()], weight, spec), (number, count))


LISTS = {
    "single": [5],
    "odd run": [4, 5, 6],
    "pairs in reverse": [8, 9, 6, 7, 2, 3],
    "unaligned pairs": [1, 2, 5, 6, 37, 38],
    "repeated": [3, 3, 3, 3],
    "run, then one": [*range(10, 26), 31],
    "across windows": [30, 31, 32, 33, 34, 62, 63, 64],
    "the last ones": [69, 68, 0],
    "every other": list(range(0, 70, 2)),
}


@pytest.mark.parametrize("name", LISTS)
def test_unselected_neighbours_do_not_leak_cpu(name: str) -> None:
    """A pair is one operand: a channel that nobody selected, NaN or infinite, must not be in it."""
    listed = torch.tensor(LISTS[name], dtype=torch.int32)
    others = [c for c in range(70) if c not in LISTS[name]]
    for kernel_size, stride, padding in ((1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 2)):
        spec = dk.ConvSpec((kernel_size,) * 2, (stride,) * 2, (padding,) * 2)
        x = in_dtype(image("w", 2, 70, 7, 5), BF16)
        weight = randn(33, len(listed), kernel_size, kernel_size)
        expected = oracle.conv2d(x[:, listed.long()], weight, spec)
        x[:, others[::2]], x[:, others[1::2]] = float("nan"), float("inf")
        kernel = dk.PartialConv2d(weight, [len(listed)], spec, index=[listed], backend="cpu")
        check(run(fresh(kernel, [x]), "fresh", (), name, "cpu", BF16), expected, name)
        # As the last of a node's segments, and as an image of few channels.
        few = in_dtype(image("c", 2, 3, 7, 5), BF16)
        more = randn(33, 1 + len(listed), kernel_size, kernel_size)
        expected = oracle.conv2d(torch.cat([few[:, 1:2], x[:, listed.long()]], 1), more, spec)
        few[:, 0], few[:, 2] = float("nan"), float("inf")
        index = [torch.tensor([1], dtype=torch.int32), listed]
        both = dk.PartialConv2d(more, [1, len(listed)], spec, index=index, backend="cpu")
        check(both([few, x]), expected, name)


def test_images_of_planes_cpu() -> None:
    for channels in range(1, 9):
        for kernel_size, stride, padding in ((7, 2, 3), (3, 1, 0), (1, 1, 0), (1, 2, 0)):
            spec = dk.ConvSpec((kernel_size,) * 2, (stride,) * 2, (padding,) * 2)
            x = in_dtype(image("c", 2, channels, 9, 13), BF16)
            weight, bias = randn(19, channels, kernel_size, kernel_size), randn(19)
            kernel = dk.PartialConv2d(weight, [channels], spec, bias=bias, backend="cpu")
            y = run(fresh(kernel, [x]), "fresh", (), channels, "cpu", BF16)
            check(y, oracle.conv2d(x, weight, spec, bias), (channels, spec))


def test_special_values_cpu() -> None:
    """NaN and infinities go where they belong; results round to the nearest, ties to even."""
    spec = dk.ConvSpec()
    values = [0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 3.3e38, 2.0**-120]
    x = torch.tensor(values, dtype=BF16)[:, None, None, None].expand(-1, 2, 1, 1).contiguous()
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=BF16)[:, :, None, None]
    x[:, 1] = 0.0
    y = dk.PartialConv2d(weight, [2], spec, backend="cpu")([x])
    torch.testing.assert_close(y[:, 1, 0, 0], x[:, 0, 0, 0], rtol=0, atol=0, equal_nan=True)
    # 1 + k 2^-9 lies between two bfloat16 numbers, or at half way.
    k = torch.arange(16).float()
    x = torch.stack([torch.ones(16), k * 2.0**-9], 1)[:, :, None, None].to(BF16)
    ones = torch.ones(17, 2, 1, 1, dtype=BF16)
    y = dk.PartialConv2d(ones, [2], spec, backend="cpu")([x])
    exact = (1 + k * 2.0**-9).to(BF16)
    assert torch.equal(y[:, :, 0, 0], exact[:, None].expand(-1, 17))
    # Beyond the largest number lies infinity.
    x = torch.full((1, 2, 1, 1), 3.3e38, dtype=BF16)
    assert bool(dk.PartialConv2d(ones, [2], spec, backend="cpu")([x]).isposinf().all())


def test_linear_cpu() -> None:
    for inputs, outputs in ((1, 1), (7, 33), (40, 130), (129, 16)):
        weight, bias = randn(outputs, inputs), randn(outputs)
        x, residual = randn(2, 5, inputs), randn(2, 5, outputs)
        kernel = dk.PartialLinear(weight, [inputs], bias=bias, activation="gelu", backend="cpu")
        expected = oracle.linear(x, weight, bias, residual, "gelu")
        check(kernel([x], residual), expected, (inputs, outputs))


def test_dtypes_must_agree_cpu() -> None:
    weight = randn(4, 6, 1, 1)
    with pytest.raises(ValueError, match="bias must be .*bfloat16"):
        dk.PartialConv2d(weight, [6], dk.ConvSpec(), bias=torch.randn(4), backend="cpu")
    kernel = dk.PartialConv2d(weight, [6], dk.ConvSpec(), bias=randn(4), backend="cpu")
    x = in_dtype(image("w", 1, 6, 3, 3), BF16)
    with pytest.raises(ValueError, match="convert one of them"):
        kernel([x.float()])
    with pytest.raises(ValueError, match="residual must be .*bfloat16"):
        kernel([x], torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match="out must be .*bfloat16"):
        kernel([x], out=torch.zeros(1, 3, 3, 4).permute(0, 3, 1, 2))
    # Weights packed in one data type do not pass for the other's.
    single = dk.PartialConv2d(weight.float(), [6], dk.ConvSpec(), backend="cpu")
    kernel._finished = single.packed_weight.view(BF16), kernel._prepared
    with pytest.raises(ValueError, match="pack them again"):
        kernel([x])


def test_operators_cpu() -> None:
    """Through the dispatcher, whose index lists are not cut into runs."""
    x = in_dtype(image("w", 2, 21, 6, 5), BF16)
    weight, bias = randn(10, 5, 3, 3), randn(10)
    listed = torch.tensor([20, 3, 4, 0, 7], dtype=torch.int32)
    spec = dk.ConvSpec((3, 3), padding=(1, 1), activation="relu")
    read = x[:, listed.long()]
    packed = dk.prepack(weight, [5], backend="cpu")
    assert packed.dtype == BF16
    y = dk.partial_conv2d(
        [x],
        [listed],
        packed,
        out_channels=10,
        kernel_size=3,
        padding=1,
        bias=bias,
        activation="relu",
        backend="cpu",
    )
    check(y, oracle.conv2d(read, weight, spec, bias))
    total = in_dtype(image("w", 2, 10, 6, 5), BF16)
    expected = oracle.conv2d(read, weight, spec, None, None, total)
    dk.partial_conv2d_(
        total, [x], [listed], packed, kernel_size=3, padding=1, activation="relu", backend="cpu"
    )
    check(total, expected)
    order = torch.randperm(10)
    y = dk.gather_conv2d(
        x,
        torch.cat([listed, listed]),
        [5, 5],
        [4, 6],
        torch.cat(
            [dk.prepack(weight[order[k]], [5], backend="cpu") for k in (slice(4), slice(4, 10))]
        ),
        kernel_size=3,
        padding=1,
        out_index=order.to(torch.int32),
        bias=bias,
        activation="relu",
        backend="cpu",
    )
    check(y, oracle.conv2d(read, weight, spec, bias))


def test_swap_cpu() -> None:
    for layer, x in (
        (nn.Conv2d(12, 10, 3, padding=1), in_dtype(image("w", 2, 12, 6, 5), BF16)),
        (nn.Linear(12, 10), randn(3, 12)),
    ):
        layer = layer.to(BF16).eval()
        with torch.no_grad():
            layer.weight[:5, 7:] = 0
            layer.weight[5:, :5] = 0
        model = nn.Sequential(layer)
        weight, bias = layer.weight.detach(), layer.bias.detach()
        assert len(dk.swap_(model, 2, backend="cpu").swapped) == 1
        with torch.no_grad():
            y = model(x)
        if isinstance(layer, nn.Linear):
            expected = oracle.linear(x, weight, bias)
        else:
            expected = oracle.conv2d(x, weight, dk.ConvSpec((3, 3), padding=(1, 1)), bias)
        check(y, expected)
        # To another dtype and back: packed again each time.
        with torch.no_grad():
            single = model.float()(x.float())
            assert single.dtype == torch.float32
            check(model.to(BF16)(x), expected)
