"""Run the kernels on buffers that end, or begin, at a page that may not be touched.

    python -m tests.kernels.guard

A forbidden access ends the process with SIGSEGV. Two children do so on purpose, first; then it
prints ``guarded N``, the number of guarded calls that did not.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
from dataclasses import replace

import torch
from torch import Tensor

import disco_kernels as dk
from tests.kernels import oracle

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Pages:
    """Memory between two forbidden pages, for the calls of one case."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self._mapped: list[tuple[int, int]] = []

    def guarded(self, values: Tensor) -> Tensor:
        """The same values, contiguous, right before (or after) a forbidden page."""
        values = values.contiguous()
        num_bytes = values.numel() * values.element_size()
        room = (num_bytes + _PAGE - 1) // _PAGE * _PAGE
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = _libc.mmap(None, room + 2 * _PAGE, prot, flags, -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        self._mapped.append((start, room + 2 * _PAGE))
        for page in (start, start + _PAGE + room):
            if _libc.mprotect(page, _PAGE, _PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        if num_bytes == 0:
            return values
        first = start + _PAGE + (room - num_bytes if self.at_end else 0)
        memory = (ctypes.c_char * num_bytes).from_address(first)
        copy = torch.frombuffer(memory, dtype=values.dtype).view(values.shape)
        copy.copy_(values)
        return copy

    def image(
        self, batch: int, channels: int, h: int, w: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return self.guarded(torch.randn(batch, h, w, channels).to(dtype)).permute(0, 3, 1, 2)

    def close(self) -> None:
        for start, size in self._mapped:
            _libc.munmap(start, size)


def _convolution(pages: Pages, outputs: int, inputs: int, kernel: int, stride: int, w: int) -> None:
    counts = [inputs - inputs // 3, inputs // 3, 1]
    tensors = [pages.image(2, counts[0], 5, w), pages.image(2, counts[1], 5, w)]
    tensors.append(pages.image(2, 4, 5, w))
    index = [None, None, pages.guarded(torch.tensor([3], dtype=torch.int32))]
    weight = pages.guarded(torch.randn(outputs, sum(counts), kernel, kernel))
    bias = pages.guarded(torch.randn(outputs))
    spec = dk.ConvSpec((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, activation="relu")
    size = spec.output_size(5, w)
    residual = pages.image(2, outputs, *size)
    expected = oracle.conv2d(oracle.concatenated(tensors, index, 1), weight, spec, bias, residual)
    out = pages.image(2, outputs, *size)
    dk.PartialConv2d(weight, counts, spec, bias=bias, index=index, backend="cpu")(
        tensors, residual, out
    )
    oracle.check(out, expected, "PartialConv2d")
    # Activations that are no comparison are written by code of their own.
    smooth = replace(spec, activation="gelu")
    expected = oracle.conv2d(oracle.concatenated(tensors, index, 1), weight, smooth, bias, residual)
    packed = pages.guarded(dk.prepack(weight, counts, backend="cpu"))
    y = dk.partial_conv2d(
        tensors,
        index,
        packed,
        out_channels=outputs,
        kernel_size=kernel,
        stride=stride,
        padding=kernel // 2,
        bias=bias,
        residual=residual,
        activation="gelu",
        backend="cpu",
    )
    oracle.check(y, expected, "partial_conv2d")
    # Scattered output channels go through a copy of the tile.
    order = torch.randperm(outputs)
    whole = torch.cat(tensors[:2], 1).permute(0, 2, 3, 1)
    x = pages.guarded(whole).permute(0, 3, 1, 2)
    dense = weight[:, : x.shape[1]]
    z = dk.gather_conv2d(
        x,
        pages.guarded(torch.arange(x.shape[1], dtype=torch.int32)),
        [x.shape[1]],
        [outputs],
        pages.guarded(dk.prepack(dense[order], [x.shape[1]], backend="cpu")),
        kernel_size=kernel,
        stride=stride,
        padding=kernel // 2,
        out_index=pages.guarded(order.to(torch.int32)),
        bias=bias,
        residual=residual,
        activation="relu",
        backend="cpu",
    )
    oracle.check(z, oracle.conv2d(x, dense, spec, bias, residual), "gather_conv2d")


def _grouped(pages: Pages, groups: int, inputs: int, outputs: int, kernel: int, w: int) -> None:
    """In both data types, with the input where rows are copied and where they are not."""
    spec = dk.ConvSpec((3, kernel), (1, 2), (1, kernel // 2), activation="hardswish")
    size = spec.output_size(5, w)
    for dtype in (torch.float32, torch.bfloat16):
        x = pages.image(2, groups * inputs, 5, w, dtype)
        weight = pages.guarded(torch.randn(groups * outputs, inputs, 3, kernel).to(dtype))
        bias = pages.guarded(torch.randn(groups * outputs).to(dtype))
        residual = pages.image(2, groups * outputs, *size, dtype)
        out = pages.image(2, groups * outputs, *size, dtype)
        dk.GroupedConv2d(weight, groups, spec, bias=bias, backend="cpu")(x, residual, out)
        expected = oracle.conv2d(x, weight, spec, bias, residual, groups=groups)
        oracle.check(out, oracle.rounded(expected, dtype), "GroupedConv2d")


def _packing(pages: Pages, channels: int) -> None:
    x = pages.image(2, channels, 3, 5)
    index = [list(range(channels)), [channels - 1], [], list(range(0, channels, 2))]
    guarded = [pages.guarded(torch.tensor(i, dtype=torch.int32)) for i in index]
    out = [pages.guarded(torch.randn(2, 3, 5, len(i))) for i in index]
    messages = dk.GatherPack(guarded, backend="cpu")(x, out)
    for listed, message in zip(index, messages, strict=True):
        assert torch.equal(message, x.permute(0, 2, 3, 1)[..., listed])


def _wire(pages: Pages, channels: int, wire: torch.dtype) -> None:
    """Packed into guarded messages, and these read as segments where they lie."""
    x = pages.image(2, channels, 3, 5)
    index = [list(range(channels)), [channels - 1], list(range(0, channels, 2))]
    leading = (2, 3, 5)
    out = []
    for listed in index:
        size = dk.message_numel(wire, leading, len(listed))
        message = pages.guarded(torch.ones(size, dtype=wire))
        out.append(message if wire == torch.int8 else message.view(*leading, len(listed)))
    dk.GatherPack(index, "cpu", wire_dtype=wire)(x, out)
    narrow, scales, exact = [], [], []
    for message, listed in zip(out, index, strict=True):
        values, scale = dk.message_views(message, leading, len(listed))
        wide = values.float() if scale is None else values * scale[:, None, None]
        sent = x.permute(0, 2, 3, 1)[..., listed]
        assert float((wide - sent).abs().max()) < 0.05
        narrow.append(values.permute(0, 3, 1, 2))
        scales.append(scale)
        exact.append(wide.permute(0, 3, 1, 2))
    counts = [len(listed) for listed in index]
    weight = pages.guarded(torch.randn(5, sum(counts), 3, 3))
    spec = dk.ConvSpec((3, 3), padding=(1, 1))
    y = dk.PartialConv2d(weight, counts, spec, backend="cpu")(narrow, scale=scales)
    oracle.check(y, oracle.conv2d(torch.cat(exact, 1), weight, spec), "narrow segments")


def _fused(
    pages: Pages, outputs: int, wire: torch.dtype, dtype: torch.dtype, algorithm: str
) -> None:
    """Output and messages, each up to a forbidden page, written by one call."""
    x = pages.guarded(torch.randn(2, 6, 7, 5).to(dtype)).permute(0, 3, 1, 2)
    index = [list(range(outputs)), [outputs - 1], list(range(0, outputs, 2))]
    pack = dk.GatherPack(index, "cpu", wire_dtype=wire)
    messages = [
        pages.guarded(message.view(-1).fill_(1)).view(message.shape)
        for message in pack.empty_messages((2, 6, 7), dtype)
    ]
    spec = dk.ConvSpec((3, 3), padding=(1, 1), winograd=algorithm)
    kernel = dk.PartialConv2d(
        torch.randn(outputs, 5, 3, 3).to(dtype), (5,), spec, backend="cpu", pack=pack
    )
    out = pages.guarded(torch.randn(2, 6, 7, outputs).to(dtype)).permute(0, 3, 1, 2)
    kernel([x], out=out, messages=messages)
    for found, wanted in zip(messages, pack(out), strict=True):
        assert torch.equal(found, wanted)


def _mean(pages: Pages, channels: int, dtype: torch.dtype) -> None:
    x = pages.guarded(torch.randn(2, 3, 5, channels).to(dtype)).permute(0, 3, 1, 2)
    out = pages.guarded(torch.randn(2, 1, 1, channels).to(dtype)).permute(0, 3, 1, 2)
    dk.GlobalAvgPool2d("cpu")(x, out)
    wanted = x.double().mean((2, 3), keepdim=True)
    assert float((out.double() - wanted).abs().max()) < 2**-7


def _streaming(pages: Pages) -> None:
    """Large enough for writing past the caches, and for fetching what lies beyond the end."""
    x = pages.image(3, 96, 130, 129)
    index = [list(range(96)), list(range(1, 96, 2)), [0, 50, 95]]
    for wire in (torch.float32, torch.bfloat16):
        out = [pages.guarded(torch.ones(3, 130, 129, len(i), dtype=wire)) for i in index]
        dk.GatherPack(index, "cpu", wire_dtype=wire)(x, out)
        for listed, message in zip(index, out, strict=True):
            assert torch.equal(message, x.permute(0, 2, 3, 1)[..., listed].to(wire))


def sweep() -> int:
    calls = 0
    shapes = itertools.product(
        (1, 3, 8, 15, 16, 17, 31, 33, 47, 65), (2, 9), ((1, 1), (1, 2), (3, 1), (3, 2)), (1, 5, 9)
    )
    for outputs, inputs, (kernel, stride), w in shapes:
        if (outputs + inputs + kernel + w) % 3 == 0 and outputs not in (1, 17, 33):
            continue
        for at_end in (True, False):
            pages = Pages(at_end)
            _convolution(pages, outputs, inputs, kernel, stride, w)
            pages.close()
            calls += 3
    per_group = ((1, 1), (1, 2), (4, 4), (5, 7), (17, 20), (3, 70))
    grouped = itertools.product((1, 3, 15, 16, 17, 33), per_group, (1, 3, 5, 7), (1, 9, 31))
    for number, (groups, (inputs, outputs), kernel, w) in enumerate(grouped):
        if groups * outputs > 300:
            continue
        pages = Pages(at_end=number % 2 == 0)
        _grouped(pages, groups, inputs, outputs, kernel, w)
        pages.close()
        calls += 2
    for groups, inputs in ((512, 1), (128, 4)):
        for at_end in (True, False):
            pages = Pages(at_end)
            _grouped(pages, groups, inputs, inputs, 3, 9)
            pages.close()
            calls += 2
    for channels, at_end in itertools.product((1, 2, 7, 16, 33), (True, False)):
        pages = Pages(at_end)
        _packing(pages, channels)
        pages.close()
        calls += 1
    wires = (torch.float16, torch.bfloat16, torch.int8)
    for channels, wire, at_end in itertools.product((1, 7, 16, 33), wires, (True, False)):
        pages = Pages(at_end)
        _wire(pages, channels, wire)
        pages.close()
        calls += 2
    fused = itertools.product(
        (1, 17, 66),
        (torch.float32, *wires),
        (torch.float32, torch.bfloat16),
        ("off", "f4"),
        (True, False),
    )
    for outputs, wire, dtype, algorithm, at_end in fused:
        pages = Pages(at_end)
        _fused(pages, outputs, wire, dtype, algorithm)
        pages.close()
        calls += 2
    dtypes = (torch.float32, torch.bfloat16)
    for channels, dtype, at_end in itertools.product((1, 7, 16, 33, 70), dtypes, (True, False)):
        pages = Pages(at_end)
        _mean(pages, channels, dtype)
        pages.close()
        calls += 1
    for at_end in (True, False):
        pages = Pages(at_end)
        _streaming(pages)
        pages.close()
        calls += 2
    return calls


def ends_a_process(at_end: bool, write: bool) -> bool:
    """Whether one float too far, or before, is fatal to a child."""
    values = Pages(at_end).guarded(torch.zeros(_PAGE // 4))
    beyond = ctypes.c_float.from_address(values.data_ptr() + (_PAGE if at_end else -4))
    child = os.fork()
    if child == 0:
        if write:
            beyond.value = 1.0
        os._exit(int(beyond.value))
    return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV


def main() -> None:
    for at_end, write in itertools.product((True, False), (True, False)):
        if not ends_a_process(at_end, write):
            raise AssertionError(f"a touched guard page went unnoticed: {at_end=}, {write=}")
    print("guarded", sweep())


if __name__ == "__main__":
    main()
