"""Packing: exact copies of the selected channels, one message a destination, in one pass."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import disco_kernels as dk
from disco_kernels.backends.cpu import extension_status
from tests.kernels.cases import BACKENDS, THREADS, bits, image, seed, threads
from tests.kernels.covering import covered_pairs, pairwise, possible_pairs

pytestmark = pytest.mark.usefixtures("poison")
needs_extension = pytest.mark.skipif(
    extension_status().error is not None, reason=f"no extension: {extension_status().error}"
)
both_backends = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=needs_extension if b == "cpu" else ()) for b in BACKENDS]
)

AXES: dict[str, Sequence[object]] = {
    "channels": (1, 2, 15, 16, 17, 40, 130),
    "destinations": (0, 1, 2, 3, 7),
    "kind": ("none", "one", "some", "runs", "all", "repeated"),
    "layout": ("w", "c", "p", "v", "h", "x"),
    "batch": (0, 1, 2, 5),
    "h": (1, 2, 9),
    "w": (1, 7, 64),
    "out": ("fresh", "given"),
}


def lists(kind: str, destinations: int, channels: int, rng: random.Random) -> list[list[int]]:
    every = list(range(channels))
    if kind == "runs":
        # Runs around 16 channels, from where on they are copied as one piece.
        cuts = [(rng.randrange(channels), rng.choice((1, 3, 15, 16, 17))) for _ in range(3)]
        return [[c for a, n in cuts for c in every[a : a + n]] for _ in range(destinations)]
    number = {"none": 0, "one": 1, "some": channels // 2, "all": channels, "repeated": 5}[kind]
    if kind == "repeated":
        return [rng.choices(every, k=number) for _ in range(destinations)]
    return [rng.sample(every, number) for _ in range(destinations)]


@both_backends
def test_messages_are_the_selected_channels(backend: str) -> None:
    cases = pairwise(AXES)
    for number, case in enumerate(cases):
        rng = seed(number)
        x = image(case["layout"], case["batch"], case["channels"], case["h"], case["w"])
        index = lists(case["kind"], case["destinations"], case["channels"], rng)
        pack = dk.GatherPack(index, backend=backend)
        wanted = [x.permute(0, 2, 3, 1)[..., listed].contiguous() for listed in index]
        for count in THREADS:
            out = None
            if case["out"] == "given":
                out = [torch.full_like(message, float("nan")) for message in wanted]
            with threads(count):
                messages = pack(x, out)
            assert len(messages) == len(wanted), case
            for message, exact in zip(messages, wanted, strict=True):
                assert message.shape == exact.shape and message.is_contiguous(), case
                assert torch.equal(bits(message), bits(exact)), case
            if out is not None:
                assert all(a is b for a, b in zip(messages, out, strict=True)), case
    assert covered_pairs(AXES, cases) == possible_pairs(AXES)


@both_backends
def test_tokens(backend: str) -> None:
    covered = 0
    for shape in ((3,), (5, 3), (2, 7, 3), (0, 3), (2, 2, 1, 2, 3), (300, 500, 3)):
        x = torch.randn(shape)
        for memory in (x, x.movedim(-1, 0).contiguous().movedim(0, -1)):
            whole, none, some = dk.GatherPack([[0, 1, 2], [], [2, 0]], backend=backend)(memory)
            assert torch.equal(whole, x) and torch.equal(some, x[..., [2, 0]])
            assert none.shape == (*shape[:-1], 0)
            covered += 1
    assert covered == 12


@both_backends
def test_a_message_is_read_in_place_as_a_segment(backend: str) -> None:
    x = image("w", 2, 9, 4, 5).mul_(4).round_()  # exact in whatever order they are summed
    (message,) = dk.GatherPack([[8, 0, 3]], backend=backend)(x)
    segment = message.permute(0, 3, 1, 2)
    assert segment.data_ptr() == message.data_ptr() and segment.stride(1) == 1
    weight = torch.randn(6, 3, 1, 1).mul_(4).round_()
    direct = dk.PartialConv2d(weight, [3], dk.ConvSpec(), index=[[8, 0, 3]], backend=backend)
    packed = dk.PartialConv2d(weight, [3], dk.ConvSpec(), backend=backend)
    assert torch.equal(packed([segment]), direct([x]))


@both_backends
def test_operator_writes_one_row(backend: str) -> None:
    x = image("v", 2, 6, 3, 4)
    index, splits = torch.tensor([5, 0, 2, 2], dtype=torch.int32), [1, 0, 3]
    out = torch.full((2 * 3 * 4 * 4 + 8,), float("nan"))
    dk.gather_pack_(x, index, splits, out[4:-4], backend=backend)
    first, second = out[4:28].view(2, 3, 4, 1), out[28:-4].view(2, 3, 4, 3)
    assert torch.equal(first, x.permute(0, 2, 3, 1)[..., [5]])
    assert torch.equal(second, x.permute(0, 2, 3, 1)[..., [0, 2, 2]])
    assert out[:4].isnan().all() and out[-4:].isnan().all()


@both_backends
def test_nothing_but_the_bits(backend: str) -> None:
    """NaN payloads, infinities, signed zeros and denormals pass unchanged."""
    odd = torch.tensor([0x7FC01234, 0x7F800000, -0x80000000, 1, -0x7FFFFFFF], dtype=torch.int32)
    x = odd.view(torch.float32).reshape(1, 1, 1, 5).permute(0, 3, 1, 2)
    (message,) = dk.GatherPack([[4, 3, 2, 1, 0]], backend=backend)(x)
    assert torch.equal(bits(message).flatten(), odd.flip(0))


@both_backends
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_lists(backend: str, data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 40))
    listed = st.lists(st.integers(0, channels - 1), max_size=50)
    index = data.draw(st.lists(listed, max_size=4))
    x = torch.arange(2.0 * 3 * channels).view(2, 1, 3, channels).permute(0, 3, 1, 2)
    for message, one in zip(dk.GatherPack(index, backend=backend)(x), index, strict=True):
        assert torch.equal(message, x.permute(0, 2, 3, 1)[..., one])


def test_other_dtypes_are_packed_by_the_reference() -> None:
    x = image("w", 1, 5, 2, 2)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        (message,) = dk.GatherPack([[4, 1]], backend="reference")(x.to(dtype))
        assert message.dtype == dtype
        assert torch.equal(message, x.to(dtype).permute(0, 2, 3, 1)[..., [4, 1]])


@both_backends
def test_bad_input(backend: str) -> None:
    x = image("w", 2, 4, 3, 3)
    pack = dk.GatherPack([[0, 3], [1]], backend=backend)
    good = [torch.empty(2, 3, 3, 2), torch.empty(2, 3, 3, 1)]

    def operator(index: Tensor, splits: list[int], out: Tensor) -> None:
        dk.gather_pack_(x, index, splits, out, backend=backend)

    i32 = torch.int32
    attempts = (
        (lambda: dk.GatherPack([[-1]], backend=backend), "holds channel -1"),
        (lambda: dk.GatherPack([[2**31]], backend=backend), "holds channel 2147483648"),
        (lambda: dk.GatherPack([[2**32 + 1]], backend=backend), "holds channel 4294967297"),
        (lambda: dk.GatherPack([torch.tensor([0.5])], backend=backend), "whole numbers"),
        (lambda: dk.GatherPack([torch.ones(3, dtype=torch.bool)], backend=backend), "whole"),
        (lambda: pack(image("w", 2, 3, 3, 3)), "names channel 3; the activation has 3"),
        (lambda: pack(x, good[:1]), "2 destinations need as many messages, given 1"),
        (lambda: pack(x, good[::-1]), "message 0 must be a contiguous"),
        (lambda: pack(x, [good[0].double(), good[1]]), "message 0 must be a contiguous"),
        (lambda: pack(x, [good[0], good[1].expand(2, 3, 3, 2)]), "message 1 must be"),
        (lambda: pack(x, [torch.empty(2, 3, 2, 3).mT, good[1]]), "message 0 must be"),
        (lambda: operator(torch.tensor([4], dtype=i32), [1], torch.empty(18)), "[Cc]hannel"),
        (lambda: operator(torch.tensor([-1], dtype=i32), [1], torch.empty(18)), "[Cc]hannel"),
        (lambda: operator(torch.tensor([1.0]), [1], torch.empty(18)), "must be int32"),
        (lambda: operator(torch.tensor([1], dtype=i32), [2], torch.empty(18)), "splits"),
        (lambda: operator(torch.tensor([1], dtype=i32), [2, -1], torch.empty(18)), "splits"),
        (lambda: operator(torch.tensor([1], dtype=i32), [1], torch.empty(17)), "18 elements"),
        (lambda: operator(torch.tensor([1], dtype=i32), [1], torch.empty(36)[::2]), "contiguous"),
        (lambda: operator(torch.tensor([1]), [1], torch.empty(18).double()), "wire dtype must be"),
    )
    for number, (attempt, message) in enumerate(attempts):
        with pytest.raises(ValueError, match=message):
            attempt()
        assert len(message) > 3, number
    with pytest.raises(dk.BackendUnavailable, match="no such backend"):
        dk.GatherPack([[0]], backend="nonsense")(x)


@pytest.mark.parametrize("wire", [None, torch.bfloat16, torch.int8], ids=str)
def test_bound_packs_take_what_is_there_by_then_cpu(wire: torch.dtype | None) -> None:
    pack = dk.GatherPack([[3, 1], [0], []], wire_dtype=wire)
    maps = torch.randn(2, 5, 4, 3).to(memory_format=torch.channels_last)
    for x in (maps, torch.randn(2, 7, 5)):
        leading = (2, 4, 3) if x.dim() == 4 else (2, 7)
        messages = pack.empty_messages(leading, x.dtype)
        again = pack.bind(x, messages)
        x.mul_(-2.5)
        again()
        for found, expected in zip(messages, pack(x), strict=True):
            assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="cannot be bound"):
        pack.bind(torch.randn(2, 5, 4, 3), pack.empty_messages((2, 4, 3), torch.float32))
