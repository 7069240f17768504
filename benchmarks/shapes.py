"""Layer shapes that the benchmarks time: the distinct convolutions of ResNet-50 at 224 x 224, and
the linears of DeiT-small."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConvShape:
    """One convolution; sizes in channels and pixels, padding is ``kernel // 2``.

    Layers are the same if their sizes are: what is added and applied last is that of the first.
    """

    out_channels: int
    in_channels: int
    kernel: int
    stride: int
    size: int
    parts: int = 1  # of the outputs, of which every node has a share: queries, keys and values
    residual: bool = field(default=False, compare=False)
    activation: str = field(default="relu", compare=False)

    def __str__(self) -> str:
        return (
            f"{self.out_channels}x{self.in_channels}-k{self.kernel}s{self.stride}"
            f"-{self.size}x{self.size}"
        )

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1


def resnet50_shapes() -> list[ConvShape]:
    """The distinct convolutions after the stem, in the order of the network (stride in the 3x3)."""
    shapes: list[ConvShape] = []
    in_channels, size = 64, 56
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        out = size // stride
        for shape in (
            ConvShape(width, in_channels, 1, 1, size),
            ConvShape(width, width, 3, stride, size),
            ConvShape(4 * width, width, 1, 1, out, residual=True),
            ConvShape(4 * width, in_channels, 1, stride, size, activation="none"),
            ConvShape(width, 4 * width, 1, 1, out),
            ConvShape(width, width, 3, 1, out),
        ):
            if shape not in shapes:
                shapes.append(shape)
        in_channels, size = 4 * width, out
    return shapes


def deit_small_shapes() -> list[ConvShape]:
    """DeiT-small's linears as convolutions of 1 x 1 over 14 x 14 of its 197 tokens."""
    return [
        ConvShape(1152, 384, 1, 1, 14, parts=3, activation="none"),
        ConvShape(384, 384, 1, 1, 14, residual=True, activation="none"),
        ConvShape(1536, 384, 1, 1, 14, activation="gelu"),
        ConvShape(384, 1536, 1, 1, 14, residual=True, activation="none"),
    ]
