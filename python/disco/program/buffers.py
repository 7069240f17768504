"""Which values may share memory: buffers of what kernels compute, by a scan over a program.

A value's buffer is used again as soon as nothing reads it any more, most recently used first, so
that it is still in the cache. A convolution writes onto the residual that it adds where that is
read for the last time. The executor allocates by it, and the planner budgets by it.
"""

from __future__ import annotations

from collections.abc import Mapping

from disco.program.ir import Op, Program, Ref, leaves

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


def overwritten_residual(op: Op) -> str | None:
    """The value that a kernel adds to its result and may write its result onto, if any.

    Max pooling and widening add none. A layer over payloads leaves its own part of the sums in its
    output while the payloads travel, and needs the residual after that.
    """
    last = op.args[-1] if op.args else None
    adds = op.kind.startswith("disco.") and op.kind != "disco.widen"
    if not adds or not isinstance(last, Ref):
        return None
    segments = op.args[0]
    waits = isinstance(segments, tuple) and len(segments) > 1
    return None if waits else last.name


def plan_buffers(program: Program, kept: Mapping[str, str | None]) -> dict[str, int]:
    """Value -> number of the buffer that it is written to, by a scan over the program.

    Args:
        program: to be run op by op.
        kept: the values that kernels write where they are told to -> the residual that they add.
    """
    roots: dict[str, tuple[str, ...]] = {}
    last_read: dict[str, int] = {}
    for position, op in enumerate(program.ops):
        behind = _behind(op, roots)
        for root in behind:
            last_read[root] = position
        if op.name in kept:
            roots[op.name] = (op.name,)
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
            behind = roots.get(residual, ()) if residual is not None else ()
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


def _behind(op: Op, roots: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The kernel results whose memory the op may read, each once.

    In order of reading: buffers are given back in it, so a set would make plans that differ.
    """
    return tuple(dict.fromkeys(root for name in op.refs() for root in roots.get(name, ())))


def _read_otherwise(op: Op, root: str, roots: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether the op reads `root` also as something else than its last argument, the residual."""
    others = [leaf for leaf in leaves(op.args[:-1]) if isinstance(leaf, Ref)]
    return any(root in roots.get(other.name, ()) for other in others)
