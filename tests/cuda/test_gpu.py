"""The CUDA kernels on a GPU, built in and compiled by CuPy, against the reference on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import disco_kernels as dk
from disco_kernels import registry
from disco_kernels.cuda.launch_pack import CudaGatherPack
from disco_kernels.cuda.launch_widen import widen_
from disco_kernels.cuda.launcher import builtin_refusal, cupy_refusal, get_launcher
from disco_kernels.wire import message_views
from tests.cuda.cases import DTYPES, LISTS, WIRES, check_messages, hostile, maps, same

REQUIRED = os.environ.get("DISCO_KERNELS_REQUIRE_GPU") == "1"
HAS_GPU = torch.cuda.is_available()
if REQUIRED and not HAS_GPU:
    raise RuntimeError("DISCO_KERNELS_REQUIRE_GPU=1, but no CUDA device")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="no CUDA device"),
]


def _launcher(name: str, reason: str | None) -> object:
    # Where a GPU is required, so are both: what is missing fails, with its reason.
    skipped = pytest.mark.skipif(reason is not None and not REQUIRED, reason=f"{name}: {reason}")
    return pytest.param(name, marks=skipped)


each_launcher = pytest.mark.parametrize(
    "launcher", [_launcher("builtin", builtin_refusal()), _launcher("cupy", cupy_refusal())]
)


def there(x: Tensor) -> Tensor:
    """``x`` on the GPU, with the strides that it has and what lies between."""
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).cuda()
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def check(
    launcher: str,
    lists: Sequence[Sequence[int]],
    wire: torch.dtype,
    x: Tensor,
    label: object = "",
    offset_bytes: int = 0,
) -> int:
    pack = dk.GatherPack(lists, "reference", wire_dtype=wire)
    prepared = CudaGatherPack(pack.index, get_launcher(launcher))
    shown = (label, x.dtype, wire, x.shape, [len(one) for one in lists], offset_bytes)
    return check_messages(prepared, pack, x, there(x), shown, offset_bytes)


@each_launcher
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_messages(launcher: str, dtype: torch.dtype, wire: torch.dtype) -> None:
    torch.manual_seed(0)
    covered = sum(
        check(launcher, lists, wire, x, name) for lists in LISTS for name, x in maps(dtype)
    )
    assert covered == 7 * sum(map(len, LISTS))


@each_launcher
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_without_a_scale_and_misaligned_messages(
    launcher: str, dtype: torch.dtype, wire: torch.dtype
) -> None:
    torch.manual_seed(1)
    x = hostile(dtype)
    for lists in LISTS:
        for offset in (0, 4, 8, 12):
            check(launcher, lists, wire, x, "", offset)


@each_launcher
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float32, torch.int8])
def test_maps_of_resnet50(launcher: str, wire: torch.dtype) -> None:
    torch.manual_seed(2)
    for batch, channels, size in ((1, 256, 56), (3, 512, 28), (5, 1024, 14), (8, 2048, 7)):
        x = torch.randn(batch, channels, size, size).bfloat16()
        x = x.to(memory_format=torch.channels_last)
        half = channels // 2
        grouped = [g * 8 + c for g in range(1, half // 8, 5) for c in range(8)]
        single = torch.randperm(half)[: half // 5].sort().values.tolist()
        for lists in ([list(range(half))], [grouped, grouped[8:], grouped[:8]], [single, grouped]):
            check(launcher, lists, wire, x)


@each_launcher
def test_offsets_beyond_32_bits(launcher: str) -> None:
    images, channels = 1100, 2048
    x = torch.zeros(images, 1000, 1, channels, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.randn(3, 1000, 1, channels)
    x_bchw = x.permute(0, 3, 1, 2)
    lists = [[2047, 0, 5], list(range(1024, 2048))]
    for wire in (torch.bfloat16, torch.int8):
        pack = dk.GatherPack(lists, "reference", wire_dtype=wire)
        messages = pack.empty_messages((images, 1000, 1), x.dtype, "cuda")
        CudaGatherPack(pack.index, get_launcher(launcher)).run(x_bchw, messages)
        wanted = pack(x_bchw[-3:].cpu())
        for message, reference, count in zip(messages, wanted, pack.counts, strict=True):
            values, scale = message_views(message, (images, 1000, 1), count)
            tail, tail_scale = message_views(reference, (3, 1000, 1), count)
            assert torch.equal(values[-3:].cpu(), tail)
            assert not bool(values[:-3].any())
            if scale is not None and tail_scale is not None:
                assert torch.equal(scale[-3:].cpu(), tail_scale)


@each_launcher
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.int8])
def test_replayed_as_a_graph(launcher: str, wire: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 14, 14, 64, device="cuda").bfloat16().permute(0, 3, 1, 2)
    lists = [[1, 2, 40], list(range(8, 32))]
    pack = dk.GatherPack(lists, "reference", wire_dtype=wire)
    messages = pack.empty_messages((4, 14, 14), x.dtype, "cuda")
    prepared = CudaGatherPack(pack.index, get_launcher(launcher))
    bound = prepared.bind(x, messages)
    for run in (lambda: prepared.run(x, messages), bound):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for _ in range(3):
            x.normal_()
            graph.replay()
            torch.cuda.synchronize()
            for message, wanted in zip(messages, pack(x.cpu()), strict=True):
                assert same(message.cpu(), wanted)


@each_launcher
def test_the_current_stream_orders_the_work(launcher: str) -> None:
    torch.manual_seed(4)
    pack = dk.GatherPack([[3, 1]], "reference", wire_dtype=torch.int8)
    prepared = CudaGatherPack(pack.index, get_launcher(launcher))
    source = torch.randn(64, 56, 56, 64, device="cuda")
    messages = pack.empty_messages((64, 56, 56), source.dtype, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x = torch.zeros_like(source)
        torch.cuda._sleep(20_000_000)
        x.copy_(source)  # after the sleep: a launch elsewhere would pack zeros
        prepared.run(x.permute(0, 3, 1, 2), messages)
    stream.synchronize()
    assert same(messages[0].cpu(), pack(source.cpu().permute(0, 3, 1, 2))[0])


@each_launcher
def test_several_threads(launcher: str) -> None:
    """One prepared list; threads that never used CUDA, on streams of their own."""
    torch.manual_seed(5)
    pack = dk.GatherPack([[3, 1, 7], list(range(16))], "reference", wire_dtype=torch.int8)
    prepared = CudaGatherPack(pack.index, get_launcher(launcher))
    xs = [torch.randn(2, 9, 11, 24).permute(0, 3, 1, 2) for _ in range(6)]
    given = [there(x) for x in xs]
    found = [pack.empty_messages((2, 9, 11), torch.float32, "cuda") for _ in xs]
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(20):
                    prepared.run(given[number], found[number])
            stream.synchronize()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for x, messages in zip(xs, found, strict=True):
        for message, wanted in zip(messages, pack(x), strict=True):
            assert same(message.cpu(), wanted)


@each_launcher
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_another_device_than_the_current_one(launcher: str) -> None:
    x = torch.randn(2, 5, 7, 24).permute(0, 3, 1, 2)
    pack = dk.GatherPack([[3, 1]], "reference", wire_dtype=torch.int8)
    prepared = CudaGatherPack(pack.index, get_launcher(launcher))
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        messages = pack.empty_messages((2, 5, 7), x.dtype, device)
        prepared.run(x.to(device), messages)
        assert torch.cuda.current_device() == 0
        assert same(messages[0].cpu(), pack(x)[0])


@each_launcher
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("wire", WIRES)
def test_widened_messages(launcher: str, wire: torch.dtype, out_dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    for channels, before in ((3, 5), (24, 8), (104, 128)):
        x = torch.randn(4, channels, 14, 14).to(memory_format=torch.channels_last)
        message = dk.GatherPack([list(range(channels))], "reference", wire_dtype=wire)(x)[0]
        values, scale = message_views(message.cuda(), (4, 14, 14), channels)
        wide = torch.full((4, 14, 14, before + channels + 8), 7.0, dtype=out_dtype, device="cuda")
        out = wide.permute(0, 3, 1, 2)[:, before : before + channels]
        widen_(values, scale, out, get_launcher(launcher))
        exact = values.cpu().float()
        if scale is not None:
            exact = exact * scale.cpu()[:, None, None]
        assert torch.equal(wide[..., before : before + channels].cpu(), exact.to(out_dtype))
        beside = torch.cat([wide[..., :before], wide[..., before + channels :]], -1)
        assert bool((beside == 7).all())


def test_messages_are_packed_by_cuda_and_layers_by_another() -> None:
    x = torch.randn(1, 8, 3, 3).to(memory_format=torch.channels_last)
    assert registry.resolve(None, torch.device("cuda"), x.dtype, "gather_pack") == "cuda"
    for wire in WIRES:
        found = dk.GatherPack([[1, 5]], wire_dtype=wire)(x.cuda())[0]
        assert same(found.cpu(), dk.GatherPack([[1, 5]], "reference", wire_dtype=wire)(x)[0])
    row = torch.empty(18, dtype=torch.bfloat16, device="cuda")
    dk.gather_pack_(x.cuda(), torch.tensor([1, 5], dtype=torch.int32), [1, 1], row, backend="cuda")
    assert torch.equal(row.cpu(), x[0, [1, 5]].flatten(1).bfloat16().view(-1))
    if importlib.util.find_spec("triton") is not None:
        assert dk.PartialLinear(torch.zeros(2, 2, device="cuda"), [2]).backend == "triton"
    with pytest.raises(dk.BackendUnavailable, match="cuda: it has no layers.*\n  triton: "):
        dk.PartialLinear(torch.zeros(2, 2, device="cuda"), [2], backend="cuda")


_PACKS = """
import sys, torch, disco_kernels as dk
assert "cupy" not in sys.modules and not torch.cuda.is_initialized()
x = torch.arange(32.0).view(1, 2, 2, 8).permute(0, 3, 1, 2)
print(dk.GatherPack([[7, 0]])(x.cuda())[0].view(-1).tolist())
"""


@pytest.mark.skipif(cupy_refusal() is not None and not REQUIRED, reason=str(cupy_refusal()))
def test_processes_that_start_together_without_a_cache(tmp_path: Path) -> None:
    chosen = {"DISCO_KERNELS_CUDA": "cupy", "DISCO_KERNELS_CACHE": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PACKS],
            env={**os.environ, **chosen},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert out.strip() == "[7.0, 0.0, 15.0, 8.0, 23.0, 16.0, 31.0, 24.0]", err
    assert len(list(tmp_path.glob("*.cubin"))) == 1
