"""Messages that a kernel writes beside its output: the same bytes as packed from the output.

`test_isa.py` runs this file once for each instruction set.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import disco_kernels as dk
from disco_kernels import registry
from disco_kernels.backends.cpu import extension_status
from disco_kernels.core import execute
from disco_kernels.registry import Outgoing
from disco_kernels.spec import Channels, Conv2dDescriptor, Node, Segment
from disco_kernels.wire import NARROW_DTYPES, WIRE_DTYPES
from tests.kernels.cases import BACKENDS, image, in_dtype, output_of, seed, threads
from tests.kernels.covering import pairwise

pytestmark = pytest.mark.usefixtures("poison")
needs_extension = pytest.mark.skipif(
    extension_status().error is not None, reason=f"no extension: {extension_status().error}"
)
both_backends = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=needs_extension if b == "cpu" else ()) for b in BACKENDS]
)

SPECS = {
    "1x1": dk.ConvSpec(),
    "strided": dk.ConvSpec((3, 3), (2, 2), (1, 1), activation="relu"),
    "gelu": dk.ConvSpec((3, 3), padding=(1, 1), activation="gelu"),
    "f2": dk.ConvSpec((3, 3), padding=(1, 1), winograd="f2"),
    "f4": dk.ConvSpec((3, 3), padding=(1, 1), activation="relu", winograd="f4"),
}
AXES = {
    "spec": tuple(SPECS),
    "dtype": (torch.float32, torch.bfloat16),
    "wire": (None, *WIRE_DTYPES),
    "lists": ("some", "mixed", "repeated", "all", "none", "three"),
    "outputs": (1, 15, 33, 64, 65, 150),
    "batch": (0, 1, 3),
    "h": (1, 6, 9),
    "w": (1, 7, 16),
    "out": ("fresh", "dense", "slice", "crop"),
    "threads": (1, 2, 3),
}


def lists_of(kind: str, channels: int, rng: random.Random) -> list[list[int]]:
    every = list(range(channels))
    some = sorted(rng.sample(every, (channels + 4) // 5))
    mixed = rng.sample(every, (channels + 1) // 2)
    return {
        "some": [some],
        "mixed": [mixed],
        "repeated": [rng.choices(every, k=channels + 40)],
        "all": [every],
        "none": [[]],
        "three": [some, [], mixed],
    }[kind]


def filled(messages: Sequence[Tensor]) -> list[Tensor]:
    """The messages, full of bytes that a missed write leaves behind."""
    for message in messages:
        message.view(-1).view(torch.uint8).fill_(0xA5)
    return list(messages)


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """By their bytes: NaN and the sign of zero count."""
    pairs = zip(found, wanted, strict=True)
    return all(
        torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)) for a, b in pairs
    )


@both_backends
def test_messages_are_those_of_the_output(backend: str) -> None:
    for number, case in enumerate(pairwise(AXES)):
        rng = seed(number)
        spec, dtype, outputs = SPECS[case["spec"]], case["dtype"], case["outputs"]
        if backend == "reference" and spec.winograd != "off":
            continue
        x = in_dtype(image("w", case["batch"], 11, case["h"], case["w"]), dtype)
        weight = torch.randn(outputs, 11, *spec.kernel_size).to(dtype)
        pack = dk.GatherPack(
            lists_of(case["lists"], outputs, rng), backend, wire_dtype=case["wire"]
        )
        kernel = dk.PartialConv2d(weight, (11,), spec, backend=backend, pack=pack)
        size = spec.output_size(case["h"], case["w"])
        shape = (case["batch"], outputs, *size)
        residual = in_dtype(image("w", *shape), dtype)
        leading = (case["batch"], *size)
        out = output_of(case["out"], shape, dtype).target
        with threads(case["threads"]):
            messages = filled(pack.empty_messages(leading, dtype))
            y = kernel([x], residual, out, messages=messages)
            wanted = pack(y)
            assert same(messages, wanted), case
            assert torch.equal(y, kernel([x], residual)), "packing changes nothing else"
            if out is None:
                continue
            filled(messages)
            bound = kernel.bind([x], residual, out, messages)
            x.copy_(torch.randn(x.shape))
            filled(messages)
            bound()
            assert same(messages, pack(kernel([x], residual))), case


@both_backends
def test_second_pass_packs_the_sum(backend: str) -> None:
    """Of two accumulated passes, the last one packs what both have given."""
    seed(0)
    x = image("w", 2, 8, 5, 6)
    weight = torch.randn(20, 8, 1, 1)
    pack = dk.GatherPack([[3, 19, 4]], backend)
    first, descriptor = (
        registry.get(backend),
        Conv2dDescriptor(
            dk.ConvSpec(activation="relu"), (Node((Segment(0, Channels(8)),), Channels(20)),)
        ),
    )
    prepared = first.prepare(descriptor, torch.float32, pack.index)
    packed = first.prepack(weight, (8,))
    out = torch.randn(2, 20, 5, 6).contiguous(memory_format=torch.channels_last)
    messages = filled(pack.empty_messages((2, 5, 6), torch.float32))
    prepared.run([x], packed, None, None, out, True, None, Outgoing(messages, 2))
    assert same(messages, pack(out)) and float(out.min()) == 0


@both_backends
@pytest.mark.parametrize("winograd", ["off", "f2"])
@pytest.mark.parametrize("wire", WIRE_DTYPES, ids=str)
def test_outputs_of_several_nodes(backend: str, winograd: str, wire: torch.dtype) -> None:
    """Nodes whose outputs alternate, or come in mixed order, fill one message together."""
    if backend == "reference" and winograd != "off":
        pytest.skip("no Winograd there")
    rng = seed(3)
    order = rng.sample(range(90), 90)
    owned = [sorted(order[:30]), order[30:37], order[37:]]
    spec = dk.ConvSpec((3, 3), padding=(1, 1), winograd=winograd)
    nodes = tuple(
        Node((Segment(0, Channels(6)),), Channels(len(o), 0, torch.tensor(o, dtype=torch.int32)))
        for o in owned
    )
    descriptor = Conv2dDescriptor(spec, nodes)
    chosen = registry.get(backend)
    packed = torch.cat(
        [chosen.prepack(torch.randn(len(o), 6, 3, 3), (6,), winograd) for o in owned]
    )
    pack = dk.GatherPack([sorted(order[20:50]), order[::2]], backend, wire_dtype=wire)
    prepared = chosen.prepare(descriptor, torch.float32, pack.index)
    x = image("w", 2, 6, 10, 9)
    messages = filled(pack.empty_messages((2, 10, 9), torch.float32))
    outgoing = Outgoing(messages, 2)
    y = execute(prepared, descriptor, [x], packed, None, None, outgoing=outgoing)
    assert same(messages, pack(y))


@both_backends
@pytest.mark.parametrize("leading", [(7,), (3, 5), (2, 3, 4, 2), (0,), (0, 4), (4, 0)], ids=str)
def test_linears_pack_tokens(backend: str, leading: tuple[int, ...]) -> None:
    seed(1)
    x, weight = torch.randn(*leading, 12), torch.randn(70, 12)
    for wire, listed in itertools.product(WIRE_DTYPES, ([1, 69, 2], list(range(0, 70, 3)))):
        pack = dk.GatherPack([listed], backend, wire_dtype=wire)
        kernel = dk.PartialLinear(weight, (12,), activation="gelu", backend=backend, pack=pack)
        messages = filled(pack.empty_messages(leading, torch.float32))
        y = kernel([x], messages=messages)
        wanted = pack(y)
        assert [m.shape for m in wanted] == [m.shape for m in messages]
        assert same(messages, wanted), (wire, listed)
        out = torch.empty_like(y)
        bound = kernel.bind([x], None, out, messages)
        filled(messages)
        bound()
        assert same(messages, wanted) and torch.equal(out, y)


@both_backends
def test_narrow_segments_and_messages_meet(backend: str) -> None:
    """What was received in a wire dtype is read where it lies, and the output packed."""
    seed(2)
    x = image("w", 2, 9, 4, 5)
    weight = torch.randn(40, 14, 3, 3)
    spec = dk.ConvSpec((3, 3), padding=(1, 1))
    for wire in NARROW_DTYPES:
        sent = dk.GatherPack([[0, 2, 4, 6, 8]], backend, wire_dtype=wire)
        values, scale = dk.message_views(sent(x)[0], (2, 4, 5), 5)
        pack = dk.GatherPack([[39, 1]], backend, wire_dtype=wire)
        kernel = dk.PartialConv2d(weight, (9, 5), spec, backend=backend, pack=pack)
        messages = filled(pack.empty_messages((2, 4, 5), torch.float32))
        y = kernel([x, values.permute(0, 3, 1, 2)], scale=[None, scale], messages=messages)
        assert same(messages, pack(y))


@both_backends
def test_mistakes_are_named(backend: str) -> None:
    weight, x = torch.randn(4, 3, 1, 1), image("w", 2, 3, 5, 5)
    with pytest.raises(ValueError, match="pack lists channel 4; the kernel computes 4"):
        dk.PartialConv2d(weight, (3,), dk.ConvSpec(), backend=backend, pack=dk.GatherPack([[4]]))
    plain = dk.PartialConv2d(weight, (3,), dk.ConvSpec(), backend=backend)
    pack = dk.GatherPack([[0, 1], [3]], backend, wire_dtype=torch.float16)
    with pytest.raises(ValueError, match="made without a pack"):
        plain([x], messages=pack.empty_messages((2, 5, 5), torch.float32))
    kernel = dk.PartialConv2d(weight, (3,), dk.ConvSpec(), backend=backend, pack=pack)
    good = pack.empty_messages((2, 5, 5), torch.float32)
    with pytest.raises(ValueError, match="2 destinations need as many messages, given 1"):
        kernel([x], messages=good[:1])
    with pytest.raises(ValueError, match=r"message 1 must be a contiguous \[2, 5, 5, 1\]"):
        kernel([x], messages=[good[0], good[1][:1]])
    with pytest.raises(ValueError, match="message 0 must be"):
        kernel([x], messages=[good[0].float(), good[1]])
    with pytest.raises(ValueError, match="message 0 must be"):
        kernel.bind([x], None, plain([x]), [good[0].permute(0, 2, 1, 3), good[1]])


@needs_extension
def test_extension_checks_what_python_does_not() -> None:
    backend = registry.get("cpu")
    descriptor = Conv2dDescriptor(
        dk.ConvSpec(), (Node((Segment(0, Channels(3)),), Channels(2, 5)),)
    )
    for listed in (4, 7, -1):
        with pytest.raises(ValueError, match=f"channel {listed}, which the convolution does not"):
            backend.prepare(descriptor, torch.float32, [torch.tensor([listed], dtype=torch.int32)])
    prepared = backend.prepare(descriptor, torch.float32, [torch.tensor([6], dtype=torch.int32)])
    packed = backend.prepack(torch.randn(2, 3, 1, 1), (3,))
    x, out = image("w", 1, 3, 2, 2), image("w", 1, 8, 2, 2)
    message = torch.empty(1, 2, 2, 1)
    with pytest.raises(ValueError, match="1 lists need as many messages, given 2"):
        prepared.run([x], packed, None, None, out, False, None, Outgoing([message] * 2, 1))
    with pytest.raises(ValueError, match="4 pixels are no whole number of pixels in each of 3"):
        prepared.run([x], packed, None, None, out, False, None, Outgoing([message], 3))


@both_backends
def test_kernels_with_a_pack_can_be_copied(backend: str) -> None:
    x, pack = image("w", 1, 6, 3, 3), dk.GatherPack([[5, 0]], backend, wire_dtype=torch.int8)
    kernel = dk.PartialConv2d(
        torch.randn(8, 6, 1, 1), (6,), dk.ConvSpec(), backend=backend, pack=pack
    )
    wanted = pack(kernel([x]))
    for other in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        messages = filled(pack.empty_messages((1, 3, 3), torch.float32))
        other([x], messages=messages)
        assert same(messages, wanted)
