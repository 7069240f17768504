"""Tensors in every memory layout that a caller may bring, and calls with poisoned outputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from disco_kernels import ConvSpec, Ownership
from disco_kernels.backends.cpu import extension_status
from disco_kernels.pattern import Selected
from tests.kernels.oracle import GEOMETRIES

BACKENDS = ("reference", "cpu")
needs_extension = pytest.mark.skipif(
    extension_status().error is not None, reason=f"no extension: {extension_status().error}"
)
# More than the machine has cores, too.
THREADS = (1, 2, 3)

# What a segment of `n` channels can be: w all channels of an NHWC tensor, c of an NCHW one,
# p a received payload [B, H, W, n] permuted in place, v a slice of channels and h a crop of a
# larger tensor, x one image expanded to a batch, i indexed channels in mixed order, d indexed with
# channels listed twice, e a tensor without channels, s nothing selected from a tensor.
SEGMENT_LAYOUTS = (
    *("w", "c", "p", "v", "h", "x", "i", "d", "e", "s"),
    *("wp", "wi", "ii", "we", "ep", "cp", "vh", "xd", "es"),
    *("wpp", "wse", "ipv", "wipp", "eess", "dcsx"),
)
RESIDUALS = ("none", "nhwc", "nchw", "slice")
OUTPUTS = ("fresh", "dense", "slice", "crop")


def i32(*values: int) -> Tensor:
    """A list of channels as operators take it."""
    return torch.tensor(values, dtype=torch.int32)


def fits(first: str, a: object, second: str, b: object) -> bool:
    """`covering.Allowed`: whether a window (axes gh, gw) fits into a map (axes h, w)."""
    if (first, second) not in (("gh", "h"), ("gw", "w")):
        return True
    assert isinstance(a, tuple) and isinstance(b, int)
    kernel, _, padding, dilation = a
    return bool(b + 2 * padding >= dilation * (kernel - 1) + 1)


def spec_of(gh: tuple[int, ...], gw: tuple[int, ...], activation: str) -> ConvSpec:
    kernel, stride, padding, dilation = zip(gh, gw, strict=True)
    return ConvSpec(kernel, stride, padding, dilation, activation)


assert all(len(geometry) == 4 for geometry in GEOMETRIES)


def image(kind: str, batch: int, channels: int, h: int, w: int) -> Tensor:
    """A random ``[batch, channels, h, w]`` tensor in one of the layouts w, c, p, v, h, x."""
    if kind == "c":
        return torch.randn(batch, channels, h, w)
    if kind == "x":
        return torch.randn(1, h, w, channels).permute(0, 3, 1, 2).expand(batch, -1, -1, -1)
    if kind == "v":
        return torch.randn(batch, h, w, channels + 5).permute(0, 3, 1, 2)[:, 3 : 3 + channels]
    if kind == "h":
        larger = torch.randn(batch, h + 2, w + 3, channels).permute(0, 3, 1, 2)
        return larger[:, :, 1 : 1 + h, 2 : 2 + w]
    return torch.randn(batch, h, w, channels).permute(0, 3, 1, 2)


def segments(
    layout: str, channels: int, batch: int, h: int, w: int, rng: random.Random
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Segments that together give ``channels`` channels (none if no kind in ``layout`` has any)."""
    takers = [kind for kind in layout if kind not in "es"]
    cuts = sorted(rng.randint(0, channels) for _ in takers[1:])
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, channels], strict=True)] if takers else []
    tensors: list[Tensor] = []
    index: list[Tensor | None] = []
    for kind in layout:
        count = 0 if kind in "es" else counts.pop()
        if kind in "dis":
            owned = count + rng.randint(1, 9)
            listed = rng.sample(range(owned), count)
            if kind == "d" and count > 1:
                listed[0] = listed[-1]
            tensors.append(image(rng.choice("wcv"), batch, owned, h, w))
            index.append(torch.tensor(listed, dtype=torch.int32))
        else:
            tensors.append(image(kind, batch, count, h, w))
            index.append(None)
    return tensors, index


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded to ``dtype`` with the strides that it has, and what lies between with it."""
    if dtype == x.dtype:
        return x
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(dtype)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def residual_of(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    if kind == "none":
        return None
    layout = {"nhwc": "w", "nchw": "c", "slice": "v"}[kind]
    return image(layout, shape[0], shape[1], shape[2], shape[3])


@dataclass(frozen=True)
class Output:
    """Where to write, inside a larger buffer of NaN."""

    target: Tensor | None
    buffer: Tensor | None

    def check_margins(self, what: object) -> None:
        """Nothing outside of the target was written."""
        if self.buffer is not None and self.target is not None:
            target = self.target.clone()
            self.target.fill_(float("nan"))
            assert bool(self.buffer.isnan().all()), f"{what}: wrote outside of the output"
            self.target.copy_(target)


def output_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Output:
    """An ``out`` argument full of NaN: None, or with strides of its own."""
    if kind == "fresh":
        return Output(None, None)
    b, c, h, w = shape
    extra = {"dense": (0, 0, 0), "slice": (7, 0, 0), "crop": (2, 2, 3)}[kind]
    size = (b + 2, h + extra[1], w + extra[2], c + extra[0])
    buffer = torch.full(size, float("nan"), dtype=dtype)
    target = buffer.permute(0, 3, 1, 2)[1 : 1 + b, extra[0] // 2 : extra[0] // 2 + c]
    target = target[:, :, extra[1] // 2 : extra[1] // 2 + h, extra[2] // 2 : extra[2] // 2 + w]
    return Output(target, buffer)


def seed(number: int) -> random.Random:
    """Seeds torch and returns as seeded a generator for the rest."""
    torch.default_generator.manual_seed(number)  # manual_seed asks every device, at 0.2 ms a call
    return random.Random(number)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(x: Tensor) -> Tensor:
    """As whole numbers, so that NaN and the sign of zero compare."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def fresh(kernel: Callable[..., Tensor], *arguments: object) -> Callable[[Tensor | None], Tensor]:
    """A call for `run` of a kernel that allocates its output."""
    return lambda out: kernel(*arguments)


def run(
    call: Callable[[Tensor | None], Tensor],
    kind: str,
    shape: tuple[int, ...],
    what: object,
    backend: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``call(out)`` on 1, 2 and 3 threads: same bits, and nothing written beside ``out``.

    The reference runs on one thread only: torch's own convolutions promise no such thing.
    """
    results = []
    counts = THREADS if backend == "cpu" else THREADS[:1]
    for count in counts:
        output = output_of(kind, shape, dtype)
        with threads(count):
            y = call(output.target)
        assert output.target is None or y is output.target, f"{what}: out is not what came back"
        output.check_margins(what)
        results.append(y)
    for count, y in zip(counts[1:], results[1:], strict=True):
        assert torch.equal(bits(y), bits(results[0])), (
            f"{what}: {count} threads give other bits than one"
        )
    return results[0]


def ownership(kind: str, channels: int, nodes: int, rng: random.Random) -> Ownership:
    """contiguous, interleaved, shuffled, or uneven (shuffled, some ranks perhaps empty)."""
    if kind == "contiguous":
        return Ownership.contiguous(channels, nodes)
    if kind == "interleaved":
        return Ownership(tuple(tuple(range(rank, channels, nodes)) for rank in range(nodes)))
    mixed = rng.sample(range(channels), channels)
    if kind == "shuffled":
        counts = Ownership.contiguous(channels, nodes).counts
    else:
        cuts = sorted(rng.choice((0, channels, rng.randint(0, channels))) for _ in range(nodes - 1))
        counts = tuple(b - a for a, b in zip([0, *cuts], [*cuts, channels], strict=True))
    taken = iter(mixed)
    return Ownership(tuple(tuple(next(taken) for _ in range(count)) for count in counts))


OWNERSHIPS = ("contiguous", "interleaved", "shuffled", "uneven")


def selection(inputs: Ownership, density: float, rng: random.Random) -> Selected:
    """Random selected channels: floor(density * owned) of each sender for each receiver."""
    return tuple(
        tuple(
            () if i == j else tuple(sorted(rng.sample(owned, int(density * len(owned)))))
            for j, owned in enumerate(inputs.channels)
        )
        for i in range(inputs.world_size)
    )
