"""The C++ kernels: float32 and bfloat16 in CPU memory. Source: csrc/cpu."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from disco_kernels.registry import (
    Backend,
    Outgoing,
    PreparedConv2d,
    PreparedGatherPack,
    register,
)
from disco_kernels.spec import (
    ACTIVATIONS,
    Channels,
    Conv2dDescriptor,
    ConvSpec,
    GroupedDescriptor,
    Part,
)
from disco_kernels.wire import WIRE_DTYPES

# The numbers of csrc/cpu/conv2d.h's Algorithm.
_ALGORITHMS = {"off": 0, "f2": 2, "f4": 4, "int8": 8}
# And its DataType's.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_NO_BYTES = (1.0, 0)  # scale and zero point
_NO_RESIDUAL = (0, 0, 0, 0)
_NO_MESSAGES: tuple[list[int], int, int] = ([], 0, 0)
_ALL_SEGMENTS = Part(0, None)
_AS_THE_WEIGHTS = (0, 0, 1)  # wire type, no scales, images to a row of them
# As WireType in csrc/cpu/message_kernels.h.
_WIRE_TYPES = {dtype: number for number, dtype in enumerate(WIRE_DTYPES)}


def _load() -> tuple[ModuleType | None, str | None]:
    # After torch: the extension then shares torch's OpenMP runtime instead of bringing a second.
    try:
        extension = importlib.import_module("disco_kernels._C")
        extension.isa()  # a forced instruction set that is not to be had shows here
    except ImportError as error:
        return None, f"the compiled extension is missing or does not load ({error})"
    except ValueError as error:
        return None, str(error)
    return extension, None


_C, _load_error = _load()


@dataclass(frozen=True)
class ExtensionStatus:
    """What became of loading the compiled extension; ``error`` says why where it is missing."""

    path: str | None
    isa: str | None
    available_isas: tuple[str, ...]
    error: str | None


def extension_status() -> ExtensionStatus:
    if _C is None:
        return ExtensionStatus(None, None, (), _load_error)
    return ExtensionStatus(_C.__file__, _C.isa(), tuple(_C.available_isas()), None)


def fma_peak_gflops(product: torch.dtype = torch.float32) -> float:
    """GFLOP/s of one thread that multiplies float32, bfloat16 or int8 in registers only.

    Where the instruction set in use has no instruction for the dtype, that of float32. A
    multiply-add counts as two operations, of integers too. RuntimeError without the extension.
    """
    if _C is None:
        raise RuntimeError(f"backend 'cpu': {_load_error}")
    numbers = {**_DTYPES, torch.int8: 2}
    return float(_C.fma_peak_gflops(product=numbers[product]))


def _channel_args(channels: Channels) -> tuple[int, int, int]:
    index = channels.index
    return (channels.first, channels.count, 0 if index is None else index.data_ptr())


def _wire_args(
    x: Tensor, scales: Sequence[Tensor | None] | None, place: int
) -> tuple[int, int, int]:
    scale = None if scales is None else scales[place]
    if scale is None:
        return (_WIRE_TYPES[x.dtype], 0, 1)
    together = x.shape[0] // max(scale.shape[0], 1)
    return (_WIRE_TYPES[x.dtype], scale.data_ptr(), max(together, 1))


class _CpuConv2d(PreparedConv2d):
    def __init__(
        self,
        extension: Any,
        descriptor: Conv2dDescriptor,
        dtype: torch.dtype,
        pack: Sequence[Tensor],
    ) -> None:
        spec, given = descriptor.spec, descriptor.spec.input_bytes
        self.extension = extension
        self.out_channels = descriptor.out_channels
        # A bfloat16 output would round what is added up so far; Winograd and 8-bit integers sum up
        # in another domain.
        self.in_parts = (
            dtype == torch.float32 and spec.algorithm == "off" and len(descriptor.nodes) == 1
        )
        self.conv2d = extension.Conv2d(
            (*spec.kernel_size, *spec.stride, *spec.padding, *spec.dilation),
            [
                (
                    [(s.source, _channel_args(s.channels)) for s in node.segments],
                    _channel_args(node.out_channels),
                )
                for node in descriptor.nodes
            ],
            ACTIVATIONS.index(spec.activation),
            _ALGORITHMS[spec.algorithm],
            _DTYPES[dtype],
            _list_args(pack),
            _NO_BYTES if given is None else (given.scale, given.zero_point),
        )

    def run(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        accumulate: bool,
        scales: Sequence[Tensor | None] | None = None,
        outgoing: Outgoing | None = None,
    ) -> None:
        bias = _in_float32(bias)
        call = self._call(sources, packed_weight, bias, residual, out, accumulate, scales, outgoing)
        self.conv2d.run(call)

    def bind(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        outgoing: Outgoing | None = None,
        scales: Sequence[Tensor | None] | None = None,
    ) -> Callable[[], None]:
        return self.bind_part(
            sources, packed_weight, bias, residual, out, _ALL_SEGMENTS, outgoing, scales
        )

    @property
    def sums_in_parts(self) -> bool:
        return self.in_parts

    def bind_part(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        part: Part,
        outgoing: Outgoing | None = None,
        scales: Sequence[Tensor | None] | None = None,
    ) -> Callable[[], None]:
        bias, later = _in_float32(bias), part.first > 0
        call = self._call(
            sources, packed_weight, bias, residual, out, later, scales, outgoing, part
        )
        run = self.extension.BoundConv2d(self.conv2d, call).run
        alive = (tuple(sources), packed_weight, bias, residual, out, outgoing, scales)

        def bound(alive: tuple[Any, ...] = alive) -> None:
            run(torch.get_num_threads())

        return bound

    def _call(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        accumulate: bool,
        scales: Sequence[Tensor | None] | None,
        outgoing: Outgoing | None,
        part: Part = _ALL_SEGMENTS,
    ) -> Any:
        views = []
        for s, x in enumerate(sources):
            wire = _AS_THE_WEIGHTS if x.dtype == packed_weight.dtype else _wire_args(x, scales, s)
            views.append((x.data_ptr(), x.shape[1], *x.stride(), *wire))
        first = sources[0].shape
        added = _NO_RESIDUAL
        if residual is not None:
            n, _, h, w = residual.stride()
            added = (residual.data_ptr(), n, h, w)
        n, _, h, w = out.stride()
        return self.extension.Conv2dCall(
            views,
            (first[0], first[2], first[3]),
            packed_weight.data_ptr(),
            packed_weight.nbytes,
            0 if bias is None else bias.data_ptr(),
            added,
            (out.data_ptr(), n, h, w),
            out.shape[1],
            accumulate,
            torch.get_num_threads(),
            *(_NO_MESSAGES if outgoing is None else _message_args(outgoing)),
            part.first,
            -1 if part.end is None else part.end,
        )


class _CpuDepthwise(_CpuConv2d):
    """Called like its base class; its core is that of narrow groups."""

    def __init__(self, extension: Any, descriptor: GroupedDescriptor, dtype: torch.dtype) -> None:
        spec = descriptor.spec
        self.extension = extension
        self.out_channels = descriptor.out_channels
        self.in_parts = False
        self.conv2d = extension.DepthwiseConv2d(
            (*spec.kernel_size, *spec.stride, *spec.padding, *spec.dilation),
            (descriptor.groups, descriptor.in_per_group, descriptor.out_per_group),
            ACTIVATIONS.index(spec.activation),
            _DTYPES[dtype],
        )

    def bind(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        outgoing: Outgoing | None = None,
        scales: Sequence[Tensor | None] | None = None,
    ) -> Callable[[], None]:
        bias = _in_float32(bias)
        call = self._call(sources, packed_weight, bias, residual, out, False, scales, outgoing)
        run = self.conv2d.run
        alive = (self, tuple(sources), packed_weight, bias, residual, out, outgoing, scales)

        def bound(alive: tuple[Any, ...] = alive) -> None:
            call.num_threads = torch.get_num_threads()
            run(call)

        return bound


def _list_args(lists: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(channels.data_ptr(), channels.numel()) for channels in lists]


def _message_args(outgoing: Outgoing) -> tuple[list[int], int, int]:
    messages = outgoing.messages
    if not messages:
        return _NO_MESSAGES
    return [m.data_ptr() for m in messages], _WIRE_TYPES[messages[0].dtype], outgoing.images


def _in_float32(bias: Tensor | None) -> Tensor | None:
    """The kernels add the bias to float32 sums, whatever the activations are."""
    return None if bias is None else bias.float()


class _CpuGatherPack(PreparedGatherPack):
    def __init__(self, extension: Any, index: Sequence[Tensor]) -> None:
        self.pack = extension.GatherPack(_list_args(index))

    def run(self, x: Tensor, messages: Sequence[Tensor]) -> None:
        if not messages:
            return
        if x.dtype not in _DTYPES:
            x = x.to(torch.float32, memory_format=torch.channels_last)
        self.pack.run(*self._args(x, messages), torch.get_num_threads())

    def bind(self, x: Tensor, messages: Sequence[Tensor]) -> Callable[[], None]:
        if not messages or x.dtype not in _DTYPES:
            return super().bind(x, messages)
        run, args = self.pack.run, self._args(x, messages)

        def bound(alive: tuple[Any, ...] = (x, messages)) -> None:
            run(*args, torch.get_num_threads())

        return bound

    def _args(self, x: Tensor, messages: Sequence[Tensor]) -> tuple[Any, ...]:
        batch, channels, height, width = x.shape
        n, _, h, w = x.stride()
        return (
            x.data_ptr(),
            channels,
            (batch, height, width),
            (n, h, w),
            _DTYPES[x.dtype],
            _WIRE_TYPES[messages[0].dtype],
            [message.data_ptr() for message in messages],
        )


class CpuBackend(Backend):
    name = "cpu"

    @property
    def layout(self) -> str:
        return f"{self.name} {self.extension.isa()}"

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if _C is None:
            return _load_error
        if device.type != "cpu":
            return f"tensors in CPU memory only, given {device}"
        if dtype not in _DTYPES:
            return f"float32 and bfloat16 only, given {dtype}"
        return None

    def int8_refusal(self) -> str | None:
        if self.extension.has_quads():
            return None
        return f"that takes AVX-512-VNNI, and the kernels run on {self.extension.isa()}"

    @property
    def extension(self) -> Any:
        if _C is None:
            raise RuntimeError(f"backend 'cpu': {_load_error}")
        return _C

    def packed_numel(
        self,
        out_channels: int,
        segment_channels: Sequence[int],
        taps: int,
        dtype: torch.dtype,
        algorithm: str = "off",
    ) -> int:
        num_bytes = self.extension.packed_bytes(
            out_channels, list(segment_channels), taps, _ALGORITHMS[algorithm], _DTYPES[dtype]
        )
        return int(num_bytes) // dtype.itemsize

    def prepack(
        self, weight: Tensor, segment_channels: Sequence[int], algorithm: str = "off"
    ) -> Tensor:
        dtype = weight.dtype
        source = weight.detach().resolve_neg().float().contiguous()
        taps = source.shape[2] * source.shape[3]
        packed = torch.empty(
            self.packed_numel(source.shape[0], segment_channels, taps, dtype, algorithm),
            dtype=dtype,
            device="cpu",  # whatever torch's default device is
        )
        self.extension.pack_weights(
            source.data_ptr(),
            source.shape[0],
            list(segment_channels),
            taps,
            _ALGORITHMS[algorithm],
            _DTYPES[dtype],
            packed.data_ptr(),
        )
        return packed

    def prepare(
        self,
        descriptor: Conv2dDescriptor,
        dtype: torch.dtype,
        pack: Sequence[Tensor] = (),
    ) -> PreparedConv2d:
        return _CpuConv2d(self.extension, descriptor, dtype, pack)

    def groups_as_nodes(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> bool:
        narrow = self.extension.narrow_groups(descriptor.out_per_group, _DTYPES[dtype])
        return not narrow or descriptor.spec.winograd != "off"

    def grouped_numel(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> int:
        if self.groups_as_nodes(descriptor, dtype):
            return super().grouped_numel(descriptor, dtype)
        conv2d = _CpuDepthwise(self.extension, descriptor, dtype).conv2d
        return int(conv2d.packed_bytes()) // dtype.itemsize

    def prepack_grouped(self, weight: Tensor, descriptor: GroupedDescriptor) -> Tensor:
        if self.groups_as_nodes(descriptor, weight.dtype):
            return super().prepack_grouped(weight, descriptor)
        source = weight.detach().resolve_neg().float().contiguous()
        numel = self.grouped_numel(descriptor, weight.dtype)
        packed = torch.empty(numel, dtype=weight.dtype, device="cpu")
        conv2d = _CpuDepthwise(self.extension, descriptor, weight.dtype).conv2d
        conv2d.pack(source.data_ptr(), packed.data_ptr())
        return packed

    def prepare_grouped(self, descriptor: GroupedDescriptor, dtype: torch.dtype) -> PreparedConv2d:
        if self.groups_as_nodes(descriptor, dtype):
            return super().prepare_grouped(descriptor, dtype)
        return _CpuDepthwise(self.extension, descriptor, dtype)

    def max_pool2d_(self, x: Tensor, window: ConvSpec, out: Tensor) -> None:
        source, target = x.stride(), out.stride()
        self.extension.max_pool2d(
            (*window.kernel_size, *window.stride, *window.padding, *window.dilation),
            _DTYPES[x.dtype],
            tuple(x.shape),
            (x.data_ptr(), source[0], source[2], source[3]),
            tuple(out.shape[2:]),
            (out.data_ptr(), target[0], target[2], target[3]),
            torch.get_num_threads(),
        )

    def global_avg_pool2d_(self, x: Tensor, out: Tensor) -> Callable[[], None]:
        n, _, h, w = x.stride()
        size = tuple(x.shape)
        source = (x.data_ptr(), n, h, w)
        pool, dtype, stride = self.extension.global_avg_pool2d, _DTYPES[x.dtype], out.stride(0)

        def run(target: int = out.data_ptr(), alive: tuple[Tensor, Tensor] = (x, out)) -> None:
            pool(dtype, size, source, target, stride, torch.get_num_threads())

        run()
        return run

    def prepare_gather_pack(self, index: Sequence[Tensor]) -> PreparedGatherPack:
        return _CpuGatherPack(self.extension, index)


register(CpuBackend())
