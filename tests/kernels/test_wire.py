"""Messages in every wire dtype: exact bits, layout, special values.

`test_isa.py` runs this file once for each instruction set.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import disco_kernels as dk
from disco_kernels import registry
from disco_kernels.wire import WIRE_DTYPES
from tests.kernels.cases import BACKENDS, THREADS, image, in_dtype, needs_extension, seed, threads
from tests.kernels.covering import covered_pairs, pairwise, possible_pairs

pytestmark = pytest.mark.usefixtures("poison")
both_backends = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=needs_extension if b == "cpu" else ()) for b in BACKENDS]
)
HALVES = (torch.float16, torch.bfloat16)

# What int8 may be off by: half a step, the rounding of 127 / max and of the product (2**-23 each of
# at most 127 steps), and that of value * scale.
INT8_STEPS = 0.5 + 127 * 2.0**-22


def raw(x: Tensor) -> Tensor:
    """The bytes, so that NaN and the sign of zero compare."""
    return x.contiguous().view(torch.uint8)


def row(values: Tensor) -> Tensor:
    """Values as an image of one channel, one pixel a value."""
    return values.reshape(1, 1, -1, 1).permute(0, 3, 1, 2)


def rounded_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even, found by comparing distances in float64."""
    down = (x.view(np.uint32) >> 16 << 16).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        up_bits = (down.view(np.uint32).astype(np.uint64) + 0x10000).astype(np.uint32)
        up = up_bits.view(np.float32).astype(np.float64)
        # Beyond the largest, the next step up is where infinity stands.
        up = np.where(np.isinf(up), np.copysign(2.0**128, x.astype(np.float64)), up)
        low, high = np.abs(x - down.astype(np.float64)), np.abs(up - x)
        even = (down.view(np.uint32) >> 16) % 2 == 0
        take_down = (low < high) | ((low == high) & even) | np.isinf(x)
    return np.where(take_down, down.view(np.uint32), up_bits) >> 16


def hard_floats() -> Tensor:
    """Every float16 and bfloat16, the points half way between, and the floats beside all these."""
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    with np.errstate(invalid="ignore", over="ignore"):
        wide = halves.astype(np.float32)
        between = ((wide.astype(np.float64) + np.roll(wide, 1)) / 2).astype(np.float32)
    tops = np.arange(1 << 16, dtype=np.uint64) << 16
    bits = [(tops + low).astype(np.uint32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    for values in (wide, between):
        at = values.view(np.uint32).astype(np.int64)
        bits += [np.clip(at + step, 0, 2**32 - 1).astype(np.uint32) for step in (-1, 0, 1)]
    return torch.from_numpy(np.concatenate(bits).view(np.float32))


@both_backends
@pytest.mark.parametrize("wire", HALVES, ids=str)
def test_casts_are_the_nearest_value(backend: str, wire: torch.dtype) -> None:
    x = hard_floats()
    (message,) = dk.GatherPack([[0]], backend, wire_dtype=wire)(row(x))
    found = message.view(torch.int16).numpy().view(np.uint16).ravel()
    values = x.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        if wire == torch.float16:
            exact = values.astype(np.float16).view(np.uint16)  # numpy rounds to even, too
        else:
            exact = rounded_to_bfloat16(values).astype(np.uint16)
    known = ~np.isnan(values)
    assert known.sum() > 700_000
    assert (found[known] == exact[known]).all()
    assert bool(message.ravel()[torch.from_numpy(~known)].isnan().all())
    # And back: reading a message gives the values of its dtype.
    identity = torch.ones(1, 1, 1, 1)
    some = message[..., ::977, :, :]
    y = dk.PartialConv2d(identity, [1], dk.ConvSpec(), backend=backend)([some.permute(0, 3, 1, 2)])
    back, wide = y.ravel(), some.float().ravel()
    assert torch.equal(back.isnan(), wide.isnan())
    assert torch.equal(back[~wide.isnan()], wide[~wide.isnan()]) and wide.numel() > 700


@needs_extension
def test_widening_keeps_every_value() -> None:
    every = torch.arange(1 << 16).to(torch.int16)
    for wire in HALVES:
        x = row(every.view(wire))
        for columns in (1, 64):  # one by one, and in vectors
            part = x.reshape(1, -1, 1, columns).permute(0, 3, 1, 2)
            kernel = dk.PartialConv2d(
                torch.eye(columns)[:, :, None, None], [columns], dk.ConvSpec()
            )
            y = kernel([part]) if columns == 1 else None
            if y is not None:
                exact = part.float()
                known = ~exact.isnan()
                assert torch.equal(y[known], exact[known]) and bool(y[~known].isnan().all())
            finite = torch.where(part.isfinite(), part, torch.zeros_like(part))
            assert torch.equal(kernel([finite]), finite.float())


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [images, pixels, n]`` as (values, scale), step by step in numpy's float32."""
    values = x.numpy()
    largest = np.abs(values).max(1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = (largest / np.float32(127)).astype(np.float32)
        inverse = (np.float32(127) / largest).astype(np.float32)
        scale[largest < 2.0**-100] = inverse[largest < 2.0**-100] = 0
        scale[~np.isfinite(largest)] = np.nan
        inverse[~np.isfinite(largest)] = 0
        steps = np.rint(values * inverse[:, None])
    steps[np.isnan(steps)] = 0
    return torch.from_numpy(steps.astype(np.int8)), torch.from_numpy(scale)


AXES: dict[str, Sequence[object]] = {
    "wire": WIRE_DTYPES,
    "channels": (1, 5, 15, 16, 17, 33, 130),
    "destinations": (1, 2, 3),
    "kind": ("none", "one", "some", "all", "repeated"),
    "layout": ("w", "c", "v", "h", "x", "tokens"),
    "batch": (0, 1, 2, 5),
    "h": (1, 2, 9),
    "w": (1, 7, 64),
    "out": ("fresh", "given"),
}


def lists(kind: str, destinations: int, channels: int, rng: random.Random) -> list[list[int]]:
    every = list(range(channels))
    number = {"none": 0, "one": 1, "some": (channels + 1) // 2, "all": channels, "repeated": 7}[
        kind
    ]
    if kind == "repeated":
        return [rng.choices(every, k=number) for _ in range(destinations)]
    found = [rng.sample(every, number) for _ in range(destinations)]
    return [sorted(one) if rng.random() < 0.5 else one for one in found]


@both_backends
def test_messages_hold_the_selected_channels(backend: str) -> None:
    cases = pairwise(AXES)
    for number, case in enumerate(cases):
        rng = seed(number)
        wire, channels = case["wire"], case["channels"]
        size = (case["batch"], channels, case["h"], case["w"])
        x = image("w" if case["layout"] == "tokens" else case["layout"], *size)
        # Channels of very different range, as the maps of a network have.
        if case["layout"] != "x":  # which is one image in several places
            x *= 2.0 ** torch.randint(-20, 20, (channels,))[:, None, None]
        if case["layout"] == "tokens":
            x = x.permute(0, 2, 3, 1)[0 if case["batch"] else slice(0, 0)]
        leading = (size[0], *size[2:]) if x.dim() == 4 and x.shape[1] == channels else None
        if leading is None:
            x = x.reshape(-1, *x.shape[-2:])
            leading = tuple(x.shape[:-1])
        last = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
        index = lists(case["kind"], case["destinations"], channels, rng)
        pack = dk.GatherPack(index, backend, wire_dtype=wire)
        for count in THREADS:
            out = None
            if case["out"] == "given":
                shapes = [message.shape for message in pack(x)]
                out = [torch.empty(shape, dtype=wire) for shape in shapes]
            with threads(count):
                messages = pack(x, out)
            for message, listed in zip(messages, index, strict=True):
                wanted = last[..., listed].contiguous()
                values, scale = dk.message_views(message, leading, len(listed))
                assert message.dtype == wire and values.shape == wanted.shape, case
                assert message.numel() == dk.message_numel(wire, leading, len(listed)), case
                if wire != torch.int8:
                    assert scale is None
                    assert torch.equal(raw(values), raw(wanted.to(wire))), case
                    continue
                images = leading[0] if len(leading) > 1 else 1
                assert scale is not None and scale.shape == (images, len(listed)), case
                rest = message[4 * scale.numel() + values.numel() :]
                assert rest.numel() < 4 and not rest.any() and message.numel() % 4 == 0, case
                if wanted.numel() == 0:
                    assert not scale.any(), case
                    continue
                rows = wanted.reshape(images, -1, len(listed))
                exact, exact_scale = quantised(rows)
                assert torch.equal(raw(scale), raw(exact_scale)), case
                assert torch.equal(values.reshape(rows.shape), exact), case
                error = (values.reshape(rows.shape) * scale[:, None].double() - rows.double()).abs()
                assert bool((error <= INT8_STEPS * scale[:, None]).all()), case
                used = scale > 0
                assert torch.equal(exact.abs().amax(1) == 127, used), case
    assert covered_pairs(AXES, cases) == possible_pairs(AXES)


@both_backends
@pytest.mark.parametrize("wire", WIRE_DTYPES, ids=str)
def test_large_messages(backend: str, wire: torch.dtype) -> None:
    """Beyond 16 MB a message is written in whole cache lines, whatever it begins with."""
    rng = seed(5)
    x = torch.randn(6, 61, 57, 211).permute(0, 3, 1, 2)
    narrow = torch.randn(9000, 40, 33)[..., 3:].permute(0, 2, 1).unsqueeze(-1)
    for source, counts in ((x, (57, 199, 1)), (x, (211,)), (narrow[:, :, ::2], (23, 5))):
        index = [sorted(rng.sample(range(source.shape[1]), n)) for n in counts]
        leading = (source.shape[0], *source.shape[2:])
        step = 4 // torch.empty(0, dtype=wire).element_size()
        out = []
        for offset, n in enumerate(counts, 1):
            size = dk.message_numel(wire, leading, n)
            buffer = torch.empty(size + 3 * step * offset, dtype=wire)
            out.append(buffer[step * offset : step * offset + size])
        shaped = [
            o if wire == torch.int8 else o.view(*leading, n)
            for o, n in zip(out, counts, strict=True)
        ]
        for count in THREADS[: 3 if backend == "cpu" else 1]:
            for message in out:
                message.fill_(77)
            with threads(count):
                dk.GatherPack(index, backend, wire_dtype=wire)(source, shaped)
            for message, listed in zip(out, index, strict=True):
                values, scale = dk.message_views(message, leading, len(listed))
                wanted = source.permute(0, 2, 3, 1)[..., listed]
                if scale is None:
                    assert torch.equal(values, wanted.to(wire))
                else:
                    exact, exact_scale = quantised(wanted.reshape(leading[0], -1, len(listed)))
                    assert torch.equal(scale, exact_scale)
                    assert torch.equal(values.reshape(exact.shape), exact)


@both_backends
def test_int8_of_special_values(backend: str) -> None:
    inf, nan, tiny, huge = float("inf"), float("nan"), 2.0**-100, 3.4028234663852886e38
    channels = {
        "zeros": ([0.0, -0.0, 0.0], 0.0, [0, 0, 0]),
        "below": ([tiny * 0.99, -tiny / 2, 1e-45], 0.0, [0, 0, 0]),
        "smallest": ([tiny, -tiny / 2, 1e-45], tiny / 127, [127, -64, 0]),
        "largest": ([huge, -huge, huge / 127], 2.679388344e36, [127, -127, 1]),
        "ties": ([127.0, 0.5, 1.5], 1.0, [127, 0, 2]),
        "negative ties": ([-127.0, -0.5, -2.5], 1.0, [-127, 0, -2]),
        "nan": ([nan, 1.0, -2.0], nan, [0, 0, 0]),
        "negative nan": ([1.0, -nan, -2.0], nan, [0, 0, 0]),
        "infinity": ([1.0, inf, -2.0], nan, [0, 0, 0]),
        "minus infinity": ([-inf, inf, nan], nan, [0, 0, 0]),
    }
    x = torch.tensor([values for values, _, _ in channels.values()]).view(1, len(channels), 3, 1)
    n = len(channels)
    for repeat in (1, 5):  # vectors and remainders
        listed = list(range(n)) * repeat
        (message,) = dk.GatherPack([listed], backend, wire_dtype=torch.int8)(x)
        values, scale = dk.message_views(message, (1, 3, 1), n * repeat)
        assert scale is not None
        exact = torch.tensor([s for _, s, _ in channels.values()] * repeat)
        assert torch.equal(scale[0].isnan(), exact.isnan())
        assert torch.equal(scale[0].nan_to_num(), exact.nan_to_num())
        steps = torch.tensor([q for _, _, q in channels.values()] * repeat, dtype=torch.int8)
        assert torch.equal(values[0, :, 0].t(), steps)
        # What arrives is NaN for the whole channel, and finite elsewhere.
        kernel = dk.PartialConv2d(torch.ones(1, 1, 1, 1), [1], dk.ConvSpec(), backend=backend)
        for c in range(n):
            y = kernel([values.permute(0, 3, 1, 2)[:, c : c + 1]], scale=[scale[:, c : c + 1]])
            assert bool(y.isnan().all() if exact[c].isnan() else y.isfinite().all()), c


@both_backends
def test_an_image_does_not_depend_on_its_batch(backend: str) -> None:
    x = image("w", 3, 20, 6, 5) * torch.tensor([1.0, 100.0, 0.01])[:, None, None, None]
    pack = dk.GatherPack([[3, 1, 19, 4]], backend, wire_dtype=torch.int8)
    values, scale = dk.message_views(*pack(x), (3, 6, 5), 4)
    assert scale is not None
    for n in range(3):
        alone, its_scale = dk.message_views(*pack(x[n : n + 1]), (1, 6, 5), 4)
        assert its_scale is not None
        assert torch.equal(values[n], alone[0]) and torch.equal(scale[n], its_scale[0])


@both_backends
@pytest.mark.parametrize("wire", WIRE_DTYPES, ids=str)
def test_the_operator_writes_the_same_messages(backend: str, wire: torch.dtype) -> None:
    x = image("v", 2, 9, 3, 5)
    lists = [[8, 0, 3], [], [1, 1, 7, 2, 0]]
    messages = dk.GatherPack(lists, backend, wire_dtype=wire)(x)
    sizes = [message.numel() for message in messages]
    margin = 8
    out = torch.empty(sum(sizes) + 2 * margin, dtype=wire).fill_(99)
    index = torch.tensor([c for one in lists for c in one], dtype=torch.int32)
    dk.gather_pack_(x, index, [3, 0, 5], out[margin:-margin], backend=backend)
    assert torch.equal(raw(out[margin:-margin]), raw(torch.cat([m.view(-1) for m in messages])))
    assert bool((out[:margin] == 99).all() and (out[-margin:] == 99).all())


@needs_extension
def test_wide_inputs_are_packed_by_the_reference() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        x = image("w", 2, 6, 3, 3).to(dtype)
        for wire in WIRE_DTYPES:
            (message,) = dk.GatherPack([[5, 0]], "reference", wire_dtype=wire)(x)
            values, scale = dk.message_views(message, (2, 3, 3), 2)
            wanted = x.permute(0, 2, 3, 1)[..., [5, 0]]
            if scale is None:
                assert torch.equal(values, wanted.to(wire))
            else:
                error = (values * scale[:, None, None] - wanted.float()).abs()
                assert bool((error <= INT8_STEPS * scale[:, None, None]).all())
        if dtype != torch.bfloat16:
            with pytest.raises(dk.BackendUnavailable, match="float32 and bfloat16 only"):
                dk.GatherPack([[0]], "cpu", wire_dtype=torch.int8)(x)


@needs_extension
def test_bfloat16_activations_are_packed_as_their_float32_values() -> None:
    for number, case in enumerate(pairwise(AXES, seed=1)):
        if case["layout"] == "tokens":
            continue
        rng = seed(number)
        size = (case["batch"], case["channels"], case["h"], case["w"])
        x = in_dtype(image(case["layout"], *size), torch.bfloat16)
        index = lists(case["kind"], case["destinations"], case["channels"], rng)
        pack = dk.GatherPack(index, "cpu", wire_dtype=case["wire"])
        found, wanted = pack(x), pack(x.float())
        assert all(torch.equal(raw(a), raw(b)) for a, b in zip(found, wanted, strict=True)), case


@needs_extension
def test_the_extension_reads_other_inputs_as_float32() -> None:
    prepared = registry.get("cpu").prepare_gather_pack([torch.tensor([4, 1], dtype=torch.int32)])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = image("w", 2, 7, 3, 4).to(dtype)[:, 1:, :, :3]
        for wire in (torch.float32, torch.bfloat16):
            message = torch.empty(2, 3, 3, 2, dtype=wire)
            prepared.run(x, [message])
            assert torch.equal(message, x.float().permute(0, 2, 3, 1)[..., [4, 1]].to(wire))


@both_backends
def test_packs_can_be_copied(backend: str) -> None:
    x = image("w", 1, 6, 3, 3)
    pack = dk.GatherPack([[5, 0]], backend, wire_dtype=torch.int8)
    (message,) = pack(x)
    for other in (copy.deepcopy(pack), pickle.loads(pickle.dumps(pack))):
        assert torch.equal(other(x)[0], message) and other.wire_dtype == torch.int8
