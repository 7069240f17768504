"""Segments in a narrow wire dtype: convolutions and linears that read messages where they lie.

`test_isa.py` runs this file once for each instruction set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import disco_kernels as dk
from disco_kernels.wire import NARROW_DTYPES
from tests.kernels import oracle
from tests.kernels.cases import THREADS, image, seed, segments, threads
from tests.kernels.covering import covered_pairs, pairwise, possible_pairs
from tests.kernels.test_wire import INT8_STEPS, both_backends

pytestmark = pytest.mark.usefixtures("poison")


def narrowed(x: Tensor, wire: torch.dtype, groups: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """``[B, C, H, W]`` as (segment, scale, the exact values it stands for), strides as they are."""
    if wire == torch.float32:
        return x, None, x
    if wire != torch.int8:
        narrow = x.to(wire)
        return narrow, None, narrow.float()
    scale = 2.0 ** torch.randint(-12, 4, (groups, x.shape[1])).float() * (
        1 + torch.rand(x.shape[1])
    )
    steps = (x * 40).round().clamp(-127, 127).to(torch.int8)
    each = scale.repeat_interleave(x.shape[0] // max(groups, 1), 0)[:, :, None, None]
    return steps, scale, steps.float() * each


SEGMENT_AXES: dict[str, Sequence[object]] = {
    "layout": ("wp", "pw", "ipv", "wi", "c", "dcsx", "wpp", "h", "p", "es"),
    "wires": ("8", "h", "b", "f8", "8f", "hb8", "bf", "8b"),
    "k": (1, 2, 7, 8, 9, 16, 40),
    "outputs": (1, 17),
    "kernel": (1, 3),
    "batch": (0, 1, 4),
    "groups": ("one", "all"),
    "h": (1, 6),
    "w": (3, 31),
    "through": ("kernel", "operator", "accumulate"),
}
WIRES = {"8": torch.int8, "h": torch.float16, "b": torch.bfloat16, "f": torch.float32}


@both_backends
def test_convolutions_over_narrow_segments(backend: str) -> None:
    cases = pairwise(SEGMENT_AXES)
    for number, case in enumerate(cases):
        rng = seed(number)
        batch = case["batch"]
        tensors, index = segments(case["layout"], case["k"], batch, case["h"], case["w"], rng)
        groups = 1 if case["groups"] == "one" or batch == 0 else batch
        parts = [
            narrowed(x, WIRES[case["wires"][s % len(case["wires"])]], groups)
            for s, x in enumerate(tensors)
        ]
        narrow, scale, exact = (list(one) for one in zip(*parts, strict=True))
        every = oracle.concatenated(exact, index, 1)
        k, size = every.shape[1], case["kernel"]
        weight, bias = torch.randn(case["outputs"], k, size, size), torch.randn(case["outputs"])
        spec = dk.ConvSpec((size,) * 2, padding=(size // 2,) * 2, activation="relu")
        counts = [
            x.shape[1] if one is None else one.numel() for x, one in zip(narrow, index, strict=True)
        ]
        geometry = {"kernel_size": size, "padding": size // 2, "backend": backend}
        expected = oracle.conv2d(every, weight, spec, bias)
        for count in THREADS[: 3 if backend == "cpu" else 1]:
            with threads(count):
                if case["through"] == "kernel":
                    kernel = dk.PartialConv2d(
                        weight, counts, spec, bias=bias, index=index, backend=backend
                    )
                    y = kernel(narrow, scale=scale)
                elif case["through"] == "operator":
                    y = dk.partial_conv2d(
                        narrow,
                        index,
                        dk.prepack(weight, counts, backend=backend),
                        out_channels=case["outputs"],
                        bias=bias,
                        activation="relu",
                        scale=scale,
                        **geometry,
                    )
                else:
                    y = torch.zeros(batch, case["h"], case["w"], case["outputs"])
                    y = y.permute(0, 3, 1, 2) + bias[:, None, None]
                    y = y.contiguous(memory_format=torch.channels_last)
                    packed = dk.prepack(weight, counts, backend=backend)
                    dk.partial_conv2d_(
                        y, narrow, index, packed, activation="relu", scale=scale, **geometry
                    )
            assert y.dtype == torch.float32, case
            oracle.check(y, expected, case)
    assert covered_pairs(SEGMENT_AXES, cases) == possible_pairs(SEGMENT_AXES)


@both_backends
def test_linears_over_narrow_segments(backend: str) -> None:
    covered = 0
    for leading in ((), (5,), (3, 7), (2, 3, 4), (0, 4)):
        for wire in NARROW_DTYPES:
            local, remote = torch.randn(*leading, 6), torch.randn(*leading, 19)
            pack = dk.GatherPack([[18, 0, 4, 4]], "reference", wire_dtype=wire)
            # Four dimensions would be an image's.
            flat = remote.flatten(1, 2) if len(leading) == 3 else remote
            (message,) = pack(flat)
            values, scale = dk.message_views(message, tuple(flat.shape[:-1]), 4)
            payload = values.reshape(*leading, 4)
            exact = values.float()
            if scale is not None:  # one row for tokens [T, C], else one for each of the first
                exact = exact * (scale[:, None] if flat.dim() > 2 else scale)
            weight = torch.randn(11, 10)
            expected = oracle.linear(torch.cat([local, exact.reshape(*leading, 4)], -1), weight)
            kernel = dk.PartialLinear(weight, [6, 4], backend=backend)
            oracle.check(kernel([local, payload], scale=[None, scale]), expected, (leading, wire))
            y = dk.partial_linear(
                [local, payload],
                [None, None],
                dk.prepack(weight, [6, 4], backend=backend),
                out_features=11,
                scale=[None, scale],
                backend=backend,
            )
            oracle.check(y, expected, (leading, wire))
            covered += 1
    assert covered == 15


@both_backends
@pytest.mark.parametrize("wire", NARROW_DTYPES, ids=str)
def test_from_one_rank_to_the_other(backend: str, wire: torch.dtype) -> None:
    """Packed, taken apart and convolved: off by no more than the cast allows."""
    x, mine = image("w", 2, 48, 10, 9), image("w", 2, 8, 10, 9)
    listed = [5, 40, 7, 8, 9, 47]
    (message,) = dk.GatherPack([listed], backend, wire_dtype=wire)(x)
    values, scale = dk.message_views(message, (2, 10, 9), 6)
    assert values.data_ptr() == message.data_ptr() + (0 if scale is None else 4 * scale.numel())
    weight = torch.randn(12, 14, 3, 3)
    spec = dk.ConvSpec((3, 3), padding=(1, 1))
    y = dk.PartialConv2d(weight, [8, 6], spec, backend=backend)(
        [mine, values.permute(0, 3, 1, 2)], scale=[None, scale]
    )
    sent = x[:, listed]
    exact = oracle.conv2d(torch.cat([mine, sent], 1), weight, spec)
    if scale is None:
        off = sent.abs() * torch.finfo(wire).eps / 2 + torch.finfo(wire).smallest_normal
    else:
        off = (INT8_STEPS * scale)[:, :, None, None].expand_as(sent)
    allowed = torch.nn.functional.conv2d(
        torch.cat([torch.zeros_like(mine), off], 1).double(), weight.abs().double(), padding=1
    )
    assert bool(((y - exact.value).abs() <= allowed + exact.bound).all())
    assert float((y - exact.value).abs().max()) > 1e-4  # the cast is there


@both_backends
def test_compiles_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    weight = torch.randn(6, 5, 1, 1)
    packed = dk.prepack(weight, [3, 2], backend=backend)

    def exchange(x: Tensor, remote: Tensor) -> Tensor:
        b, _, h, w = remote.shape
        message = torch.empty((4 * b * 2 + b * h * w * 2 + 3) // 4 * 4, dtype=torch.int8)
        index = torch.tensor([6, 1], dtype=torch.int32)
        dk.gather_pack_(remote, index, [2], message, backend=backend)
        values, scale = dk.message_views(message, (b, h, w), 2)
        return dk.partial_conv2d(
            [x, values.permute(0, 3, 1, 2)],
            [None, None],
            packed,
            out_channels=6,
            kernel_size=1,
            scale=[None, scale],
            backend=backend,
        )

    compiled = torch.compile(exchange, backend="aot_eager", fullgraph=True)
    for batch, size in ((2, 4), (1, 6)):
        tensors = image("w", batch, 3, size, size), image("w", batch, 7, size, size)
        assert torch.equal(compiled(*tensors), exchange(*tensors))


@both_backends
def test_bad_input(backend: str) -> None:
    x, index = image("w", 2, 4, 3, 3), torch.tensor([1, 3], dtype=torch.int32)
    int8 = torch.int8
    message = dk.GatherPack([[1, 3]], backend, wire_dtype=int8)(x)[0]
    values, scale = dk.message_views(message, (2, 3, 3), 2)
    assert scale is not None
    payload = values.permute(0, 3, 1, 2)
    buffer = torch.empty(64, dtype=int8)
    odd = buffer[1:53]
    weight = torch.randn(5, 6, 1, 1)
    kernel = dk.PartialConv2d(weight, [4, 2], dk.ConvSpec(), backend=backend)
    linear = dk.PartialLinear(torch.randn(5, 2), [2], backend=backend)
    packed = dk.prepack(weight, [6], backend=backend)

    def conv(segment: Tensor, scale: object) -> Callable[[], object]:
        return lambda: kernel([x, segment], scale=scale)

    def operator(out: Tensor) -> Callable[[], object]:
        return lambda: dk.gather_pack_(x, index, [2], out, backend=backend)

    attempts = (
        (lambda: dk.GatherPack([[0]], wire_dtype=torch.float64), "wire dtype must be one of"),
        (lambda: dk.GatherPack([[0]], wire_dtype=torch.uint8), "wire dtype must be one of"),
        (lambda: dk.GatherPack([[0]], backend, wire_dtype=int8)(x, [buffer]), "message 0 must be"),
        (
            lambda: dk.GatherPack([[1, 3]], backend, wire_dtype=int8)(x, [odd]),
            "multiple of 4 bytes",
        ),
        (
            lambda: dk.GatherPack([[1, 3]], backend, wire_dtype=torch.float16)(x, [message]),
            r"message 0 must be a contiguous \[2, 3, 3, 2\] torch.float16",
        ),
        (operator(torch.empty(36, dtype=torch.float64)), "wire dtype must be one of"),
        (operator(torch.empty(36, dtype=int8)), "row of 52 elements in torch.int8"),
        (operator(torch.empty(35, dtype=torch.float16)), "row of 36 elements in torch.float16"),
        (operator(odd), "must begin at a multiple of 4 bytes"),
        (lambda: dk.message_views(message[:-1], (2, 3, 3), 2), "has 52 elements"),
        (lambda: dk.message_views(odd, (2, 3, 3), 2), "at a multiple of 4 bytes of its memory"),
        (lambda: dk.message_views(message[::2], (1, 3, 3), 2), "contiguous"),
        (conv(payload, None), "segment 1 is torch.int8 and its scale is None"),
        (conv(payload, [None, None]), "segment 1 is torch.int8 and its scale is None"),
        (conv(payload, [None]), "2 segments need as many scales .*given 1"),
        (conv(payload.half(), [None, scale]), "segment 1 is torch.float16 and its scale is"),
        (conv(payload.float(), [None, scale]), "segment 1 is torch.float32 and its scale is"),
        (conv(payload, [None, scale[:, :1]]), r"scale 1 must be float32 \[G, 2\]"),
        (conv(payload, [None, scale.double()]), r"scale 1 must be float32 \[G, 2\]"),
        (conv(payload, [None, scale[0]]), r"scale 1 must be float32 \[G, 2\]"),
        (conv(payload, [None, scale.repeat(2, 1)]), "G a divisor of 2"),
        (conv(payload, [None, scale[:0]]), "G a divisor of 2"),
        (conv(payload.to(torch.uint8), None), "segment 1 is .* or a narrow wire dtype"),
        (conv(payload.double(), None), "segment 1 is .* or a narrow wire dtype"),
        (lambda: linear([torch.zeros(3, 2, dtype=int8)]), "its scale is None"),
        (
            lambda: linear([torch.zeros(3, 2, dtype=int8)], scale=[torch.ones(2, 2)]),
            "G a divisor of 3",
        ),
        (
            lambda: dk.gather_conv2d(
                image("w", 1, 6, 3, 3).half(),
                torch.arange(6, dtype=torch.int32),
                [6],
                [5],
                packed,
                kernel_size=1,
                backend=backend,
            ),
            "convert one of them",
        ),
    )
    for number, (attempt, match) in enumerate(attempts):
        with pytest.raises(ValueError, match=match) as raised:
            attempt()
        assert len(str(raised.value).splitlines()) == 1, number
    assert len(attempts) == 27


@both_backends
def test_gradients_are_refused(backend: str) -> None:
    """A cast to whole numbers has no gradient; the operators say so instead of giving none."""
    x, half = image("w", 1, 3, 4, 4), image("w", 1, 2, 4, 4).half().requires_grad_()
    packed = dk.prepack(torch.randn(5, 5, 1, 1), [3, 2], backend=backend)
    options = {"out_channels": 5, "kernel_size": 1, "backend": backend}
    with pytest.raises(RuntimeError, match="partial_conv2d records no gradient"):
        dk.partial_conv2d([x, half], [None, None], packed, **options)
    steps, scale = half.detach().to(torch.int8), torch.ones(1, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="partial_conv2d records no gradient"):
        dk.partial_conv2d([x, steps], [None, None], packed, scale=[None, scale], **options)
    index = torch.tensor([0], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="gather_pack_ records no gradient"):
        dk.gather_pack_(
            x.requires_grad_(), index, [1], torch.empty(20, dtype=torch.int8), backend=backend
        )
