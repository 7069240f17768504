"""Memory of the values that kernels compute: planned once, kept from one request to the next.

A value's buffer is used again as soon as nothing reads it any more, most recently used first, so
that it is still in the cache. A convolution writes onto the residual that it adds where that is
read for the last time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from disco.program import Op, Program, Ref, leaves
from disco_kernels.memory import large_pages

# Pure functions whose result never shares memory with an argument; any other may return a view.
_FRESH = frozenset(
    {
        "aten.adaptive_avg_pool2d.default",
        "aten.add.Tensor",
        "aten.avg_pool2d.default",
        "aten.cat.default",
        "aten.gelu.default",
        "aten.hardsigmoid.default",
        "aten.hardswish.default",
        "aten.layer_norm.default",
        "aten.matmul.default",
        "aten.max_pool2d.default",
        "aten.mean.dim",
        "aten.mul.Tensor",
        "aten.relu.default",
        "aten.sigmoid.default",
        "aten.silu.default",
        "aten.softmax.int",
        "aten.sym_size.int",
    }
)
_LINE_BYTES = 64


# A value's shape, strides and dtype. The strides are those that its kernel chose, without gaps: a
# map is channels-last, tokens `[B, H, W, C]` are contiguous, and the shape does not tell which.
Placed = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
# What a request of the same input shapes computed before, by slot.
Layout = Mapping[int, Placed]


def plan_buffers(program: Program, kept: Mapping[str, str | None]) -> dict[str, int]:
    """Value -> number of the buffer that it is written to, by a scan over the program.

    Args:
        program: to be run op by op.
        kept: the values that kernels write where they are told to -> the residual that they add.
    """
    roots: dict[str, frozenset[str]] = {}
    last_read: dict[str, int] = {}
    for position, op in enumerate(program.ops):
        behind = _behind(op, roots)
        for root in behind:
            last_read[root] = position
        if op.name in kept:
            roots[op.name] = frozenset({op.name})
        elif op.kind not in _FRESH:
            roots[op.name] = behind
    for name in program.output_names():
        for root in roots.get(name, ()):
            last_read[root] = len(program.ops)  # leaves the program: the caller's from then on

    buffer_of: dict[str, int] = {}
    free: list[int] = []
    count = 0
    for position, op in enumerate(program.ops):
        # A value that nothing reads is not kept; it would never be given back.
        if op.name in kept and position < last_read.get(op.name, -1) < len(program.ops):
            residual = kept[op.name]
            behind = roots.get(residual, frozenset()) if residual is not None else frozenset()
            reused = [r for r in behind if r == residual and last_read[r] == position]
            if reused and reused[0] in buffer_of and not _read_otherwise(op, reused[0], roots):
                buffer_of[op.name] = buffer_of[reused[0]]
            elif free:
                buffer_of[op.name] = free.pop()
            else:
                buffer_of[op.name] = count
                count += 1
        for root in _behind(op, roots):
            taken = buffer_of.get(root)
            handed_on = taken is not None and buffer_of.get(op.name) == taken
            if last_read[root] == position and taken is not None and not handed_on:
                free.append(taken)
    return buffer_of


def _behind(op: Op, roots: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """The kernel results whose memory the op may read."""
    found: set[str] = set()
    for name in op.refs():
        found |= roots.get(name, frozenset())
    return frozenset(found)


def _read_otherwise(op: Op, root: str, roots: Mapping[str, frozenset[str]]) -> bool:
    """Whether the op reads `root` also as something else than its last argument, the residual."""
    others = [leaf for leaf in leaves(op.args[:-1]) if isinstance(leaf, Ref)]
    return any(root in roots.get(other.name, ()) for other in others)


class Activations:
    """The buffers of one request, for one set of input shapes.

    The first request of a set of shapes computes into fresh tensors and leaves their shapes here;
    from the second on they are written to the same memory every time.

    Attributes:
        layout: as given, None for a first request.
        out: by slot, where a kernel writes; what is not there it allocates.
        views: by slot, views of what is in `out`: the same in every request.
        bound: by slot, kernels whose operands are all in these, ready to be repeated.
    """

    def __init__(self, layout: Layout | None, buffer_of: Mapping[int, int]) -> None:
        self.layout = layout
        self.out: dict[int, Tensor] = {}
        self.views: dict[int, Tensor] = {}
        self.bound: dict[int, Callable[[], None]] = {}
        if layout is None:
            return
        sizes: dict[int, int] = {}
        for slot, number in buffer_of.items():
            sizes[number] = max(sizes.get(number, 0), _num_bytes(layout[slot]))
        begin: dict[int, int] = {}
        total = 0
        for number, num_bytes in sorted(sizes.items()):
            begin[number] = total
            total += -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
        if total == 0:
            return
        device = layout[next(iter(buffer_of))][3]  # one program, one device
        on_cpu = device.type == "cpu"
        memory = large_pages(total) if on_cpu else _device_memory(total, device)
        for slot, number in buffer_of.items():
            shape, strides, dtype, _ = layout[slot]
            piece = memory[begin[number] : begin[number] + _num_bytes(layout[slot])]
            self.out[slot] = piece.view(dtype).as_strided(shape, strides)

    def holds(self, slots: Sequence[int], *, tokens: bool) -> bool:
        """Whether the values of all these slots are at the same place in every request, and a
        kernel reads them without a copy: as maps, or as contiguous tokens."""
        in_place = Tensor.is_contiguous if tokens else _is_map
        fixed = (self.fixed(slot) for slot in slots)
        return all(value is not None and in_place(value) for value in fixed)

    def fixed(self, slot: int) -> Tensor | None:
        """A value that is at the same place in every request."""
        found = self.out.get(slot)
        return self.views.get(slot) if found is None else found


def _device_memory(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _num_bytes(placed: Placed) -> int:
    shape, _, dtype, _ = placed
    return shape.numel() * dtype.itemsize


def _is_map(x: Tensor) -> bool:
    return x.dim() == 4 and (x.stride(1) == 1 or x.shape[1] <= 1)
