"""The device code and its launches against the reference, bit for bit, on the CPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import disco_kernels as dk
from disco_kernels.cuda.arguments import MAX_PART_CHANNELS, MAX_PARTS, magic_of
from disco_kernels.cuda.launch_pack import CudaGatherPack
from disco_kernels.cuda.launch_widen import widen_
from disco_kernels.cuda.lists import ChannelLists
from disco_kernels.cuda.tiles import magnitude_blocks, quantised_tile_pixels, tile_pixels
from tests.cuda.cases import DTYPES, LISTS, WIRES, check_messages, hostile, maps
from tests.cuda.emulator import EmulatedLauncher, cpu_as_device, needs_compiler
from tests.kernels.process import python

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedLauncher]:
    with cpu_as_device():
        yield EmulatedLauncher(tmp_path_factory.mktemp("emulation"))


def check(
    launcher: EmulatedLauncher,
    lists: list[list[int]],
    wire: torch.dtype,
    x: torch.Tensor,
    label: object = "",
    offset_bytes: int = 0,
) -> int:
    pack = dk.GatherPack(lists, "reference", wire_dtype=wire)
    prepared = CudaGatherPack(pack.index, launcher)
    shown = (label, lists if len(str(lists)) < 200 else "", x.dtype, wire, x.shape, offset_bytes)
    return check_messages(prepared, pack, x, x, shown, offset_bytes)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_messages(launcher: EmulatedLauncher, dtype: torch.dtype, wire: torch.dtype) -> None:
    torch.manual_seed(0)
    covered = sum(
        check(launcher, lists, wire, x, name) for lists in LISTS for name, x in maps(dtype)
    )
    assert covered == 7 * sum(map(len, LISTS))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_without_a_scale_and_misaligned_messages(
    launcher: EmulatedLauncher, dtype: torch.dtype, wire: torch.dtype
) -> None:
    torch.manual_seed(1)
    x = hostile(dtype)
    offsets = [0, 4, 8, 12] if wire.itemsize in (1, 4) else [0, 2, 4, 6, 8, 10]
    covered = sum(
        check(launcher, lists, wire, x, "", offset) for lists in LISTS for offset in offsets
    )
    assert covered == len(offsets) * sum(map(len, LISTS))


def test_every_pack_kernel_was_launched(launcher: EmulatedLauncher) -> None:
    torch.manual_seed(2)
    launcher.launched.clear()
    lists = ([list(range(8))], [[4, 5, 6, 7]], [[3]])
    for dtype, wire, one in itertools.product(DTYPES, WIRES, lists):
        check(launcher, one, wire, torch.randn(2, 3, 4, 8).to(dtype).permute(0, 3, 1, 2))
    # 19 that cast, 8 that find magnitudes, 8 that quantise.
    assert len(set(launcher.launched)) == 35


def test_random_sizes(launcher: EmulatedLauncher) -> None:
    """From one pixel to some tiles; lists in random groups, of one size or many."""
    rng = random.Random(3)
    torch.manual_seed(3)
    for _ in range(120):
        group = rng.choice((1, 1, 4, 8))
        channels = group * rng.randint(1, 40)
        shape = (rng.randint(1, 4), rng.randint(1, 40), rng.randint(1, 40), channels)
        x = torch.randn(shape).to(rng.choice(DTYPES)).permute(0, 3, 1, 2)
        lists = []
        for _ in range(rng.randint(1, 5)):
            picked = rng.choices(range(channels // group), k=rng.randint(0, channels // group))
            lists.append([g * group + c for g in picked for c in range(group)])
        with cpu_as_device(rng.choice((1, 3, 132))):
            check(launcher, lists, rng.choice(WIRES), x)


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.int8])
def test_long_lists_and_many_messages(launcher: EmulatedLauncher, wire: torch.dtype) -> None:
    torch.manual_seed(4)
    channels = 2 * MAX_PART_CHANNELS + 40
    x = torch.randn(2, 1, 3, channels).to(torch.bfloat16).permute(0, 3, 1, 2)
    whole, odd = list(range(channels)), torch.randperm(channels).tolist()[:-3]
    for lists in ([whole], [odd], [[1], odd, []]):
        check(launcher, lists, wire, x)
    launcher.launched.clear()
    few = torch.randn(1, 4, 5, 16).to(torch.bfloat16).permute(0, 3, 1, 2)
    check(launcher, [[d % 16] for d in range(2 * MAX_PARTS + 1)], wire, few)
    assert len(launcher.launched) == (3 if wire == torch.bfloat16 else 4)


def test_one_launch_for_all_and_two_in_int8(launcher: EmulatedLauncher) -> None:
    x = torch.randn(2, 5, 7, 24).permute(0, 3, 1, 2)
    for wire, launches in ((torch.float16, 1), (torch.int8, 2)):
        launcher.launched.clear()
        check(launcher, [[0, 1], [5, 6, 7], [8]], wire, x)
        assert len(launcher.launched) == launches


def test_maps_without_pixels_or_images(launcher: EmulatedLauncher) -> None:
    """In int8 an image without pixels still has scales."""
    for shape in ((2, 4, 0, 3), (0, 4, 2, 3)):
        for wire in WIRES:
            check(launcher, [[1, 2], []], wire, torch.zeros(shape))


def test_bound_messages_follow_the_map(launcher: EmulatedLauncher) -> None:
    x = torch.randn(2, 5, 7, 24).permute(0, 3, 1, 2)
    for wire in (torch.bfloat16, torch.int8):
        pack = dk.GatherPack([[0, 1], [8]], "reference", wire_dtype=wire)
        messages = pack.empty_messages((2, 5, 7), x.dtype)
        run = CudaGatherPack(pack.index, launcher).bind(x, messages)
        x.normal_()
        run()
        assert all(torch.equal(m, w) for m, w in zip(messages, pack(x), strict=True))


def test_wrong_calls_are_named(launcher: EmulatedLauncher) -> None:
    prepared = CudaGatherPack([torch.tensor([3, 9])], launcher)
    x = torch.zeros(1, 4, 2, 2).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="channel 9 is listed, but only 0 to 3 exist"):
        prepared.run(x, [torch.zeros(8)])
    with pytest.raises(ValueError, match="1 messages are needed, given 2"):
        prepared.run(torch.zeros(1, 2, 2, 10).permute(0, 3, 1, 2), [torch.zeros(8)] * 2)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("wire", WIRES)
def test_widened_messages(
    launcher: EmulatedLauncher, wire: torch.dtype, out_dtype: torch.dtype
) -> None:
    """At a channel of a wider activation, whose other channels stay."""
    torch.manual_seed(5)
    covered = 0
    for channels, before, after, images in itertools.product(
        (1, 3, 8, 24), (0, 3, 8), (0, 5, 8), (1, 2)
    ):
        if wire == torch.int8:
            values = torch.randint(-128, 128, (4, 3, 5, channels), dtype=torch.int8)
            scale = torch.rand(4 // images, channels)
            scale[0, 0] = float("nan")
            wanted = values.float() * scale.repeat_interleave(images, 0)[:, None, None]
        else:
            values, scale = torch.randn(4, 3, 5, channels).to(wire), None
            wanted = values
        wide = torch.full((4, 3, 5, before + channels + after), 7.0, dtype=out_dtype)
        out = wide.permute(0, 3, 1, 2)[:, before : before + channels]
        widen_(values, scale, out, launcher)
        found = wide[..., before : before + channels]
        assert torch.equal(found.nan_to_num(-9), wanted.to(out_dtype).nan_to_num(-9)), channels
        assert bool((wide[..., :before] == 7).all() and (wide[..., before + channels :] == 7).all())
        covered += 1
    assert covered == 72


def test_widening_rows_that_are_not_even(launcher: EmulatedLauncher) -> None:
    values = torch.randn(2, 3, 5, 8)
    wide = torch.zeros(2, 4, 6, 8)
    widen_(values, None, wide.permute(0, 3, 1, 2)[:, :, :3, 1:], launcher)
    assert torch.equal(wide[:, :3, 1:], values) and int((wide == 0).sum()) == 2 * 8 * (24 - 15)


def test_widening_refuses_what_does_not_fit(launcher: EmulatedLauncher) -> None:
    out = torch.zeros(2, 3, 5, 8).permute(0, 3, 1, 2)
    values, scale = torch.zeros(2, 3, 5, 8, dtype=torch.int8), torch.zeros(2, 8)
    attempts = (
        ((values, None, out), "int8 values need a scale"),
        ((values.float(), scale, out), "int8 values need a scale"),
        ((values[..., :4], scale, out), "values must be contiguous"),
        ((values, scale[:, :4], out), "scale must be contiguous float32"),
        ((values, torch.zeros(3, 8), out), "G a divisor of 2 images"),
        ((values, scale, out.contiguous()), "channel stride of 1"),
        ((values.long(), scale, out), "wire dtype"),
    )
    for arguments, message in attempts:
        with pytest.raises(ValueError, match=message):
            widen_(*arguments, launcher)


def test_division_by_multiplication() -> None:
    """What the device code does, up to where it says that it is exact."""
    for divisor in (*range(1, 200), 255, 256, 257, 1000, 4095, 4096, 32767):
        magic, most = magic_of(divisor), (2**31 - 1) // divisor
        assert magic < 2**32
        tried = {0, 1, divisor - 1, divisor, most - 1, most, most // divisor * divisor - 1}
        for i in tried | {random.randrange(most) for _ in range(20)}:
            if 0 <= i <= most:
                assert (2 * i * magic) >> 32 == i // divisor, (i, divisor)


def test_tiles_stay_where_that_division_is_exact() -> None:
    for pixels, groups, parts, processors in itertools.product(
        (1, 49, 3136, 10**6, 2**31 - 1), (1, 13, 128, 4096), (1, 7, 32), (1, 132)
    ):
        # The mean of the lists, where one is the longest that there is.
        mean = max(1, (groups + parts - 1) // parts)
        tile = tile_pixels(pixels, mean, 4, parts, processors)
        assert 1 <= tile <= pixels and (tile * groups + 4) * groups < 2**31
        for images in (1, 64):
            one = quantised_tile_pixels(pixels, images, groups, tile, parts, processors)
            assert 1 <= one <= pixels and (one * groups + 4) * groups < 2**31
            chunk, chunks, split = magnitude_blocks(pixels, images, groups, processors)
            assert chunk * chunks >= groups and 1 <= chunk <= 64 and split >= 1


def test_groups_of_lists() -> None:
    groups = [
        ([[0, 1, 2, 3, 4, 5, 6, 7]], 8),
        ([[8, 9, 10, 11, 12, 13, 14, 15], [4, 5, 6, 7]], 4),
        ([[1, 2, 3, 4]], 1),
        ([[4, 5, 6]], 1),
        ([[4, 5, 7, 6]], 1),
        ([[], []], 8),
    ]
    for lists, group in groups:
        assert ChannelLists([torch.tensor(one) for one in lists]).group == group, lists


def test_nothing_beside_the_buffers_is_touched(tmp_path: Path) -> None:
    done = python("-m", "tests.cuda.guarded", str(tmp_path))
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    assert done.stdout.split() == ["guarded", str(2 * 3 * 4 * sum(map(len, LISTS)))]
