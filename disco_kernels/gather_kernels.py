"""The prepared kernels of all nodes in one call: each reads listed channels of one input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from disco_kernels import registry
from disco_kernels.core import (
    as_sources,
    channel_run,
    check_in_place,
    tokens_as_image,
)
from disco_kernels.pattern import LayerPattern, Ownership, Selected, check_ownership
from disco_kernels.prepacking import Packing
from disco_kernels.prepared_kernel import (
    NodeWeights,
    PreparedKernel,
    check_bias,
    check_weight,
    linear_weight,
)
from disco_kernels.quantisation import InputBytes
from disco_kernels.spec import Channels, Conv2dDescriptor, ConvSpec, Node, Pair, Segment


class _GatherKernel(PreparedKernel):
    def __init__(
        self,
        weight: Tensor,
        out_ownership: Ownership,
        in_ownership: Ownership,
        selected: Selected,
        spec: ConvSpec,
        *,
        bias: Tensor | None = None,
        image_size: Pair | None = None,
        backend: str | None = None,
        packing: Packing | None = None,
    ) -> None:
        check_weight(weight, in_ownership.num_channels, spec)
        check_bias(bias, weight)
        check_ownership(weight, out_ownership, in_ownership)
        pattern = LayerPattern(out_ownership, in_ownership, selected)
        nodes, rows_and_columns = [], []
        for rank, outputs in enumerate(out_ownership.channels):
            parts = _segments_of(pattern.input_channels(rank), weight.dtype, spec)
            segments = tuple(Segment(0, channel_run(part)) for part in parts)
            inputs = [channel for part in parts for channel in part]
            for rows in _output_runs(outputs):
                nodes.append(Node(segments, channel_run(rows)))
                rows_and_columns.append((list(rows), inputs))
        self.in_channels = in_ownership.num_channels

        def node_weights() -> Iterator[Tensor]:
            for rows, columns in rows_and_columns:
                yield weight.detach()[rows][:, columns]

        def dense_weight() -> Iterator[Tensor]:
            dense = torch.zeros_like(weight)
            for (rows, columns), block in zip(rows_and_columns, node_weights(), strict=True):
                dense[_positions(rows)[:, None], _positions(columns)] = block
            yield dense

        def both() -> Iterator[Tensor]:
            yield from node_weights()
            yield from dense_weight()

        descriptor = Conv2dDescriptor(spec, tuple(nodes))
        chosen = registry.get(registry.resolve(backend, weight.device, weight.dtype))
        whole = Node((Segment(0, Channels(weight.shape[1])),), Channels(weight.shape[0]))
        limit = None if packing is None else packing.limit  # which has no room for weights twice
        weights: NodeWeights = node_weights
        beside: Node | None = None
        if chosen.dense_is_faster(descriptor, weight.dtype):
            descriptor, weights = Conv2dDescriptor(spec, (whole,)), dense_weight
        elif limit is None and chosen.dense_beside(descriptor, weight.dtype, weight.device):
            beside, weights = whole, both
        super().__init__(
            descriptor, weights, weight, bias, backend, image_size, packing, beside=beside
        )

    def _input(self, image: Tensor) -> Tensor:
        # The nodes read listed channels: an input with more of them would go unnoticed.
        if image.shape[1] != self.in_channels:
            raise ValueError(f"x must have {self.in_channels} channels, given {image.shape[1]}")
        return image


class GatherConv2d(_GatherKernel):
    """All virtual nodes of a layer on one device, in one call.

    Every node computes its own output channels from its own and its selected input channels.
    Equal to the dense convolution when everything outside the pattern is zero.

    Args:
        weight: ``[O, I, kh, kw]``, dense; what lies outside the pattern is not read.
        out_ownership, in_ownership: who owns which of the O outputs and I inputs.
        selected: ``selected[i][j]``, see `disco_kernels.find_selected`.
        spec, bias, image_size, backend, packing: as for `PartialConv2d`.
    """

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """``[B, I, H, W]`` -> ``[B, O, OH, OW]`` in channels-last memory."""
        return self._run([self._input(*as_sources([x], x.dtype))], residual, out)

    def bind(self, x: Tensor, residual: Tensor | None, out: Tensor) -> Callable[[], None]:
        """As `PartialConv2d.bind`."""
        sources = as_sources([self._input(x)], self.packed_weight.dtype)
        check_in_place("segment 0", x, sources[0])
        return self._bind(sources, residual, out)


class GatherLinear(_GatherKernel):
    """`GatherConv2d` over tokens: weight ``[O, I]``, ``x`` ``[..., I]`` -> ``[..., O]``."""

    def __init__(
        self,
        weight: Tensor,
        out_ownership: Ownership,
        in_ownership: Ownership,
        selected: Selected,
        *,
        bias: Tensor | None = None,
        activation: str = "none",
        input_bytes: InputBytes | None = None,
        backend: str | None = None,
        packing: Packing | None = None,
    ) -> None:
        super().__init__(
            linear_weight(weight),
            out_ownership,
            in_ownership,
            selected,
            ConvSpec(activation=activation, input_bytes=input_bytes),
            bias=bias,
            backend=backend,
            packing=packing,
        )

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        image = self._input(tokens_as_image(x, "x"))
        return self._run_tokens([image], residual, out, x.shape[:-1])

    def bind(self, x: Tensor, residual: Tensor | None, out: Tensor) -> Callable[[], None]:
        """As `PartialConv2d.bind`; ``out`` is contiguous."""
        self._input(tokens_as_image(x, "x"))
        return self._bind_tokens([x], residual, out)


# Heads of attention are shared out as runs of queries, keys and values. Writing into a run costs
# nothing; outputs here and there are copied one by one.
_SHORTEST_OUTPUT_RUN = 16


def _output_runs(outputs: Sequence[int]) -> list[list[int]]:
    """A node's outputs as runs, each computed like a node of its own; or all, if some are short."""
    runs = _runs(outputs)
    return runs if min(map(len, runs), default=0) >= _SHORTEST_OUTPUT_RUN else [list(outputs)]


# A shorter run of channels is copied together with the single ones (16 bytes of bfloat16).
_SHORTEST_RUN = 8


def _segments_of(channels: Sequence[int], dtype: torch.dtype, spec: ConvSpec) -> list[list[int]]:
    """How a node reads a list of channels.

    Float32 kernels read any list in place, and bytes are made of any list. In bfloat16 two
    neighbours make one operand: long runs are read in place, the other channels are packed together
    before the sums begin.
    """
    if dtype != torch.bfloat16 or spec.input_bytes is not None:
        return [list(channels)]
    in_place = [run[: len(run) // 2 * 2] for run in _runs(channels) if len(run) >= _SHORTEST_RUN]
    taken = {channel for run in in_place for channel in run}
    others = [channel for channel in channels if channel not in taken]
    return [*in_place, others] if others or not in_place else in_place


def _runs(channels: Sequence[int]) -> list[list[int]]:
    """The same channels, neighbours that follow each other together."""
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == runs[-1][-1] + 1:
            runs[-1].append(channel)
        else:
            runs.append([channel])
    return runs


def _positions(channels: Sequence[int]) -> Tensor:
    return torch.tensor(channels, dtype=torch.int64, device="cpu")
