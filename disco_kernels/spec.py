"""Plain descriptions of what a kernel has to do; the backends turn them into work."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from disco_kernels.quantisation import InputBytes

# Their places are the numbers of enum Activation in csrc/cpu/conv_microkernel.h.
ACTIVATIONS = (
    "none",
    "relu",
    "relu6",
    "silu",
    "gelu",
    "gelu_tanh",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
)
# Direct convolution, Winograd F(2x2, 3x3), F(4x4, 3x3), or what suits the shape (see winograd.py).
WINOGRAD = ("off", "f2", "f4", "auto")

Pair = tuple[int, int]


def pair(value: int | Sequence[int], name: str) -> Pair:
    """``3`` or ``(3, 3)`` as a pair."""
    try:
        given = (value, value) if isinstance(value, int) else tuple(value)
        height, width = (operator.index(v) for v in given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be one whole number or two (height, width), given {value!r}"
        ) from error
    return (height, width)


@dataclass(frozen=True)
class ConvSpec:
    """Geometry and activation of a convolution; every pair is (height, width), in pixels.

    A linear layer is a 1 x 1 convolution over a row of tokens.

    ``activation`` is one of `ACTIVATIONS`. They are torch's: ``relu``, ``relu6``, ``silu``,
    ``gelu`` (by erf), ``gelu_tanh`` (``approximate="tanh"``), ``hardswish``, ``hardsigmoid``,
    ``sigmoid``. NaN stays NaN. Accuracy of the C++ kernels: docs/architecture.md.

    With ``input_bytes`` 8-bit integers are multiplied (`disco_kernels.quantisation`), and
    ``winograd`` "auto" is "off".
    """

    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    activation: str = "none"
    winograd: str = "off"
    input_bytes: InputBytes | None = None

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, given {getattr(self, name)}")
        if min(self.padding) < 0:
            raise ValueError(f"padding must not be negative, given {self.padding}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, given {self.activation!r}"
            )
        if self.winograd not in WINOGRAD:
            raise ValueError(
                f"winograd must be one of {', '.join(WINOGRAD)}, given {self.winograd!r}"
            )
        if self.winograd in ("f2", "f4") and not self.winograd_fits:
            raise ValueError(
                f"winograd {self.winograd!r} is for kernels of 3 x 3 with stride and dilation 1, "
                f"given kernel {self.kernel_size}, stride {self.stride}, dilation {self.dilation}"
            )

        if self.winograd in ("f2", "f4") and self.input_bytes is not None:
            raise ValueError(f"8-bit integers have no Winograd, given winograd {self.winograd!r}")

    @property
    def algorithm(self) -> str:
        """``winograd`` or, with ``input_bytes``, "int8"."""
        return self.winograd if self.input_bytes is None else "int8"

    @property
    def winograd_fits(self) -> bool:
        """Whether Winograd can compute this geometry."""
        return (self.kernel_size, self.stride, self.dilation) == ((3, 3), (1, 1), (1, 1))

    def output_size(self, height: int, width: int) -> Pair:
        """Height and width of the output. Raises ValueError if the window does not fit."""
        # Written out: this runs at every call of every layer.
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        room_h = height + 2 * ph - dh * (kh - 1) - 1
        room_w = width + 2 * pw - dw * (kw - 1) - 1
        if room_h < 0 or room_w < 0:
            raise ValueError(
                f"an input of {height} x {width} is smaller than the kernel's window "
                f"(kernel {self.kernel_size}, dilation {self.dilation}, padding {self.padding})"
            )
        return (room_h // sh + 1, room_w // sw + 1)


@dataclass(frozen=True)
class Channels:
    """A list of channels: ``first, first + 1, ...`` or, with ``index``, whatever it lists.

    ``index`` is a contiguous int32 tensor of ``count`` elements in CPU memory.
    """

    count: int
    first: int = 0
    index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.count < 0 or self.first < 0:
            raise ValueError(
                f"a number of channels must not be negative, given {self.count} from {self.first}"
            )

    def to_list(self) -> list[int]:
        if self.index is not None:
            return [int(c) for c in self.index.tolist()]
        return list(range(self.first, self.first + self.count))


@dataclass(frozen=True)
class Segment:
    """Channels of one source tensor of the call."""

    source: int
    channels: Channels


@dataclass(frozen=True)
class Node:
    """One virtual node: what it reads (concatenated) and which output channels it writes."""

    segments: tuple[Segment, ...]
    out_channels: Channels

    @property
    def segment_channels(self) -> tuple[int, ...]:
        return tuple(segment.channels.count for segment in self.segments)

    @property
    def num_in_channels(self) -> int:
        return sum(self.segment_channels)


@dataclass(frozen=True)
class Conv2dDescriptor:
    """The one thing that drives the kernel core: geometry, and one Node for each virtual node."""

    spec: ConvSpec
    nodes: tuple[Node, ...]

    @cached_property
    def out_channels(self) -> int:
        return sum(node.out_channels.count for node in self.nodes)

    @cached_property
    def channels_needed(self) -> tuple[int, ...]:
        """Per source, how many channels it must have at least; listed channels do not count, the
        backends check them while they read."""
        needed: dict[int, int] = {}
        for node in self.nodes:
            for segment in node.segments:
                run = segment.channels
                last = run.first + run.count if run.index is None else 0
                needed[segment.source] = max(needed.get(segment.source, 0), last)
        return tuple(needed.get(source, 0) for source in range(max(needed, default=-1) + 1))


@dataclass(frozen=True)
class Part:
    """Segments ``first``, ``first + 1``, ... of a sum, up to but without ``end``; None is the last.

    Parts in their order give the bits of one call over all segments: each but the first begins with
    what ``out`` holds. The first one adds the bias; residual and activation are the last one's.
    """

    first: int
    end: int | None


@dataclass(frozen=True)
class GroupedDescriptor:
    """A grouped convolution: group g reads the g-th run of input channels and writes the g-th run
    of output channels. Depthwise is the case of one channel in a run."""

    spec: ConvSpec
    groups: int
    in_per_group: int
    out_per_group: int

    def __post_init__(self) -> None:
        if min(self.groups, self.in_per_group, self.out_per_group) < 1:
            raise ValueError(
                f"a grouped convolution needs at least one group, with one input and one output "
                f"channel; given {self.groups} groups of {self.in_per_group} inputs and "
                f"{self.out_per_group} outputs"
            )

    @property
    def out_channels(self) -> int:
        return self.groups * self.out_per_group

    @property
    def channels_needed(self) -> tuple[int]:
        """As `Conv2dDescriptor.channels_needed`; there is one source."""
        return (self.groups * self.in_per_group,)

    def as_nodes(self) -> Conv2dDescriptor:
        """The same with a virtual node for each group."""
        inputs, outputs = self.in_per_group, self.out_per_group
        nodes = tuple(
            Node((Segment(0, Channels(inputs, g * inputs)),), Channels(outputs, g * outputs))
            for g in range(self.groups)
        )
        return Conv2dDescriptor(self.spec, nodes)


def grouped_descriptor(
    spec: ConvSpec, groups: int, in_channels: int, out_channels: int
) -> GroupedDescriptor:
    """Raises ValueError unless ``groups`` divides the channels."""
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(
            f"groups must divide the {in_channels} input and {out_channels} output channels, "
            f"given {groups}"
        )
    return GroupedDescriptor(spec, groups, in_channels // groups, out_channels // groups)
