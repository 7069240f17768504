"""The launch of a convolution: its kernels' arguments, from tensors that were checked before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from disco_kernels.core import FEW_CHANNELS
from disco_kernels.cuda import choice
from disco_kernels.cuda.conv2d_sm90 import Conv2dSm90
from disco_kernels.cuda.dense_product import DenseProduct
from disco_kernels.registry import Outgoing, PreparedConv2d
from disco_kernels.spec import Conv2dDescriptor, ConvSpec
from disco_kernels.triton.arguments import VECTOR_BYTES, geometry, pixel_strides, strides, wide
from disco_kernels.triton.conv2d import conv2d_kernel
from disco_kernels.triton.few_channels import few_channels_kernel, pad_kernel
from disco_kernels.triton.launch_pack import TritonGatherPack
from disco_kernels.triton.tables import Lists, Tables, make_tables, num_channels, padded_columns
from disco_kernels.triton.tiles import Tile, choose_tile

_FEW_CHANNELS_PADDED = 4


class TritonConv2d(PreparedConv2d):
    """All virtual nodes of a convolution in one launch.

    Attributes:
        tile: instead of the choice, with which it is Triton's kernel.
        sm90, dense: other kernels that compute this layer, or None; `choice` says when.
    """

    def __init__(
        self, descriptor: Conv2dDescriptor, dtype: torch.dtype, pack: Sequence[Tensor]
    ) -> None:
        self.descriptor = descriptor
        self.dtype = dtype
        self.lists = Lists.of(descriptor)
        self.pack = [[int(c) for c in index.tolist()] for index in pack]
        self.separate_pack = TritonGatherPack(pack)
        self._groups: dict[int, int] = {}
        self._tables: dict[tuple[int, int, int, torch.device], Tables] = {}
        self._positions: dict[torch.device, Tensor] = {}
        self.tile: Tile | None = None
        self.sm90 = Conv2dSm90.make(self.lists, descriptor.spec, dtype)
        self.dense = DenseProduct.make(self.lists, descriptor.spec, dtype)
        self._last_kernel = ""

    @property
    def last_kernel(self) -> str:
        return self._last_kernel

    @cached_property
    def key(self) -> choice.Key:
        return choice.Key.of(self.lists, self.descriptor.spec)

    @cached_property
    def _measured(self) -> Mapping[int, str | None]:
        return choice.measured(self.key)

    def chosen(self, pixels: int, device: torch.device) -> str | None:
        """What the table names for so many output pixels; None for Triton's kernel."""
        if self.tile is not None or not choice.is_hopper(device):
            return None
        return choice.choose(self._measured, pixels)

    @cached_property
    def num_inputs(self) -> int:
        return max(map(num_channels, self.lists.inputs), default=0)

    @cached_property
    def num_weights(self) -> int:
        taps = math.prod(self.descriptor.spec.kernel_size)
        return taps * sum(
            num_channels(parts) * padded_columns(len(outputs))
            for parts, outputs in zip(self.lists.inputs, self.lists.outputs, strict=True)
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
        self._check(sources, packed_weight, out)
        batch, num_outputs, height, width = out.shape
        pixels = batch * height * width
        if pixels == 0 or num_outputs == 0:
            return
        other = self._other_kernel(
            sources, packed_weight, bias, residual, out, accumulate, scales, outgoing
        )
        if other is not None:
            self._last_kernel, run = other
            run()
            return
        self._last_kernel = "triton"
        spec = self.descriptor.spec
        fused = self._fused(outgoing)
        messages = tuple(outgoing.messages) if outgoing is not None and fused else ()
        tile = self.tile or self.choose(pixels, out.device)
        # What both kernels take, by name: the epilogue's tensors and numbers.
        shared: dict[str, Any] = {
            "weight": packed_weight,
            "bias": bias,
            "residual": residual,
            "residual_strides": None if residual is None else pixel_strides(residual),
            "out": out,
            "out_strides": pixel_strides(out),
            "messages": messages,
            "message_channels": tuple(len(self.pack[d]) for d in range(len(messages))),
            "positions": self._positions_for(num_outputs, out.device) if messages else None,
            "M": pixels,
            "OH": height,
            "OW": width,
            "num_out_channels": num_outputs,
            **_window(spec),
            "NUM_MESSAGES": len(messages),
            "OUT_GROUP": self._out_group(out, residual),
            "WIDE": wide(*sources, out, residual, *messages),
            "ACTIVATION": spec.activation,
            "ACCUMULATE": accumulate,
            "PRECISION": _precision(self.dtype),
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
        if self._has_few_channels(sources, scales):
            self._run_few_channels(sources, tile, shared)
        else:
            self._run_listed(sources, scales, tile, shared)
        if outgoing is not None and not fused:
            self.separate_pack.run(_as_images(out, outgoing.images), outgoing.messages)

    def _other_kernel(
        self,
        sources: Sequence[Tensor],
        packed_weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        accumulate: bool,
        scales: Sequence[Tensor | None] | None,
        outgoing: Outgoing | None,
    ) -> tuple[str, Callable[[], None]] | None:
        """What computes this call if Triton's kernel does not, and its name."""
        scaled = bool(scales) and any(scale is not None for scale in scales or ())
        if accumulate or scaled or outgoing is not None:
            return None
        name = self.chosen(out.numel() // out.shape[1], out.device)
        if name == choice.CUBLAS:
            weight = self._dense_weight(packed_weight)
            if self.dense is None or weight is None:
                return None
            run = self.dense.bind(sources, weight, bias, residual, out)
            return None if run is None else (name, run)
        if name is None or self.sm90 is None:
            return None
        tile = self.sm90.tiles().index(name)
        if not self.sm90.takes(sources, packed_weight, bias, (out, residual), tile):
            return None
        given = (sources, packed_weight, bias, residual, out, tile)
        return f"sm90 {name}", partial(self.sm90.run, *given)

    def _dense_weight(self, packed_weight: Tensor) -> Tensor | None:
        """That of the layer as one product, where it is packed."""
        if self.dense is None:
            return None
        return self.dense.of_packed(packed_weight, self.num_weights)

    def _run_listed(
        self,
        sources: Sequence[Tensor],
        scales: Sequence[Tensor | None] | None,
        tile: Tile,
        shared: dict[str, Any],
    ) -> None:
        lists, out = self.lists, shared["out"]
        group = self._group(sources, tile)
        tables = self._tables_for(group, tile, out.device)
        # A source without channels has no address, and nothing of it is read.
        xs = [sources[source] if sources[source].numel() else out for source in lists.sources]
        given = [scales[source] if scales else None for source in lists.sources]
        batch = out.shape[0]
        spec = self.descriptor.spec
        conv2d_kernel[(-(-shared["M"] // tile.m) * tables.num_tiles,)](
            xs=tuple(xs),
            x_strides=tuple(strides(x) for x in xs),
            scales=tuple(given),
            scale_strides=tuple(0 if scale is None else scale.stride(0) for scale in given),
            images_per_scale=tuple(
                1 if s is None else max(1, batch // max(1, s.shape[0])) for s in given
            ),
            tiles=tables.tiles,
            nodes=tables.nodes,
            channels=tables.channels,
            out_channels=tables.out_channels,
            record_base=tables.record_base,
            record_step=tables.record_step,
            tiles_per_node=tables.tiles_per_node,
            num_n_tiles=tables.num_tiles,
            H=sources[0].shape[2],
            W=sources[0].shape[3],
            PH=spec.padding[0],
            PW=spec.padding[1],
            NUM_PARTS=len(xs),
            RUNS=lists.runs,
            NODE_WORDS=tables.node_words,
            INSIDE=spec.kernel_size == (1, 1) and spec.padding == (0, 0),
            GROUP=group,
            OUT_RUNS=lists.out_runs,
            BLOCK_K=tile.k,
            BLOCK_G=tile.g,
            **shared,
        )

    def _has_few_channels(
        self, sources: Sequence[Tensor], scales: Sequence[Tensor | None] | None
    ) -> bool:
        """Whether the sum runs over taps and channels together: an image's first layer."""
        return (
            len(self.lists.inputs) == 1
            and len(self.lists.sources) == 1
            and self.descriptor.spec.kernel_size != (1, 1)
            and 0 < self.num_inputs <= FEW_CHANNELS
            and self.lists.out_runs
            and _is_run(self.lists.inputs[0][0].channels)
            and (not scales or scales[self.lists.sources[0]] is None)
        )

    def _run_few_channels(
        self, sources: Sequence[Tensor], tile: Tile, shared: dict[str, Any]
    ) -> None:
        (part,) = self.lists.inputs[0]
        (ph, pw), count = self.descriptor.spec.padding, len(part.channels)
        x, out = sources[self.lists.sources[0]], shared["out"]
        batch, _, height, width = x.shape
        channels = _FEW_CHANNELS_PADDED if count <= _FEW_CHANNELS_PADDED else FEW_CHANNELS
        padded = torch.empty(
            (batch, height + 2 * ph, width + 2 * pw, channels), dtype=x.dtype, device=x.device
        )
        num_pixels = padded.numel() // channels
        pad_kernel[(-(-num_pixels // 256),)](
            x=x,
            x_strides=strides(x),
            padded=padded,
            first_channel=part.channels[0],
            C=count,
            P=num_pixels,
            H=height,
            W=width,
            PH=ph,
            PW=pw,
            PADDED_H=padded.shape[1],
            PADDED_W=padded.shape[2],
            CHANNELS=channels,
            BLOCK_P=256,
            num_warps=4,
        )
        num_n_tiles = -(-shared["num_out_channels"] // tile.n)
        few_channels_kernel[(-(-shared["M"] // tile.m) * num_n_tiles,)](
            padded=padded,
            padded_strides=(padded.stride(0), padded.stride(1)),
            C=count,
            CHANNELS=channels,
            BLOCK_K=64 if out.element_size() == 2 else 32,
            **{**shared, "WIDE": shared["WIDE"] or wide(padded)},
        )

    def choose(self, pixels: int, device: torch.device) -> Tile:
        """The tile for so many output pixels."""
        columns = max(map(len, self.lists.outputs))
        nodes = sum(1 for outputs in self.lists.outputs if outputs)
        listed = self.lists.longest_list
        processors = -(-_multiprocessors(device) // max(1, nodes))
        taps = math.prod(self.descriptor.spec.kernel_size)
        return choose_tile(pixels, columns, self.num_inputs, listed, taps, self.dtype, processors)

    def _check(self, sources: Sequence[Tensor], packed_weight: Tensor, out: Tensor) -> None:
        beside = self._dense_weight(packed_weight)
        if packed_weight.numel() != self.num_weights and beside is None:
            raise ValueError(
                f"the packed weights hold {packed_weight.numel()} values, this layer has "
                f"{self.num_weights}: pack them again for this backend (prepack, or repack() of "
                "the module)"
            )
        for source, largest in self.lists.largest_channel.items():
            if largest >= sources[source].shape[1]:
                raise ValueError(
                    f"channel {largest} of segment {source} is listed, but only 0 to "
                    f"{sources[source].shape[1] - 1} exist"
                )
        listed = max((max(o) for o in self.lists.outputs if o), default=-1)
        if listed >= out.shape[1]:
            raise ValueError(
                f"output channel {listed} is listed, but only 0 to {out.shape[1] - 1} exist"
            )

    def _group(self, sources: Sequence[Tensor], tile: Tile) -> int:
        """Channels that are read at once: those of 16 bytes, if lists and memory allow it."""
        sizes = {sources[source].element_size() for source in self.lists.sources}
        vector = VECTOR_BYTES // min(sizes, default=1)
        aligned = all(
            x.stride(1) == 1
            and x.data_ptr() % VECTOR_BYTES == 0
            and all(stride % vector == 0 for stride in (x.stride(0), x.stride(2), x.stride(3)))
            for x in (sources[source] for source in self.lists.sources)
        )
        if not aligned or vector > min(tile.k, tile.g) or len(sizes) > 1:
            return 1
        if vector not in self._groups:
            self._groups[vector] = self.lists.group(vector)
        return self._groups[vector]

    def _out_group(self, out: Tensor, residual: Tensor | None) -> int:
        vector = VECTOR_BYTES // out.element_size()
        for x in (out, residual):
            if x is None:
                continue
            strides = (x.stride(0), x.stride(2), x.stride(3))
            if x.data_ptr() % VECTOR_BYTES or any(stride % vector for stride in strides):
                return 1
        return self.lists.out_group(vector)

    def _tables_for(self, group: int, tile: Tile, device: torch.device) -> Tables:
        key = (group, tile.n, tile.g, device)
        found = self._tables.get(key)
        if found is None:
            taps = math.prod(self.descriptor.spec.kernel_size)
            found = make_tables(self.lists, taps, group, tile.n, tile.g, device)
            self._tables[key] = found
        return found

    def _fused(self, outgoing: Outgoing | None) -> bool:
        """Whether the convolution can write the messages itself."""
        if outgoing is None or any(len(set(listed)) != len(listed) for listed in self.pack):
            return False
        return all(message.dtype != torch.int8 for message in outgoing.messages)

    def _positions_for(self, num_outputs: int, device: torch.device) -> Tensor:
        """Per message and output channel its place in the message, or -1."""
        found = self._positions.get(device)
        if found is None:
            found = torch.full((len(self.pack), num_outputs), -1, dtype=torch.int32, device="cpu")
            for row, listed in zip(found, self.pack, strict=True):
                row[listed] = torch.arange(len(listed), dtype=torch.int32, device="cpu")
            self._positions[device] = found = found.to(device)
        return found


def _window(spec: ConvSpec) -> dict[str, int]:
    found = geometry(spec)
    kept = {name: found[name] for name in ("KW", "SH", "SW", "DH", "DW")}
    return {"taps": found["KH"] * found["KW"], **kept}


def _is_run(channels: Sequence[int]) -> bool:
    return list(channels) == list(range(channels[0], channels[0] + len(channels)))


def _as_images(out: Tensor, images: int) -> Tensor:
    """The pixels of ``out`` as so many images of one row, for the scales of a message."""
    pixels = out.numel() // max(1, out.shape[1] * images)
    rows = out.permute(0, 2, 3, 1).reshape(images, 1, pixels, out.shape[1])
    return rows.permute(0, 3, 1, 2)


def _precision(dtype: torch.dtype) -> str:
    """Products of float32 are exact to its rounding, unless torch was told that less will do."""
    lower = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if lower else "ieee"


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
