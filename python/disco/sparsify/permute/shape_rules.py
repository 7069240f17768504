"""Axes of views, permutations, slices, concatenations and of tensors made from nothing."""

from __future__ import annotations

from collections.abc import Sequence

from disco.partition.rules.reshape import view_groups
from disco.program import Op, Ref, WeightRef
from disco.program.ir import Arg
from disco.sparsify.permute.inference import Dims, Inference, axis_rule, reason_of

_LARGEST = 2**63 - 1


@axis_rule(
    "aten.view.default",
    "aten._unsafe_view.default",
    "aten.reshape.default",
    "aten.flatten.using_ints",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.unsqueeze.default",
    "aten.unflatten.int",
)
def view(inference: Inference, op: Op) -> Dims | None:
    """Dimensions are split and merged; those before and after hold the same entries in order."""
    before, after = inference.shape(op.args[0]), inference.shape(Ref(op.name))
    found = view_groups(before, after)
    if found is None:
        return None
    old, axes = inference.dims(op.args[0]), inference.axes
    new = inference.fresh(after)
    covered = 0
    for (start, stop), (new_start, new_stop) in found[2]:
        covered = stop
        own, made = old[start:stop], new[new_start:new_stop]
        sizes = [s for s in (*before[start:stop], *after[new_start:new_stop]) if s != 1]
        if any(isinstance(size, str) for size in sizes):
            # The batch, alone or with something that is merged into it.
            inference.fix((*own, *made), reason_of(op))
            continue
        inference.unify(axes.product(made), axes.product(own), op)
    return new if covered == len(before) else None


@axis_rule("aten.permute.default")
def permute(inference: Inference, op: Op) -> Dims | None:
    """Dimensions change places."""
    dims, given = inference.dims(op.args[0]), op.args[1]
    if not isinstance(given, tuple):
        return None
    order = [n % len(dims) for n in given if isinstance(n, int)]
    return [dims[n] for n in order] if len(order) == len(dims) else None


@axis_rule("aten.transpose.int", "aten.swapaxes.default")
def transpose(inference: Inference, op: Op) -> Dims | None:
    """Two dimensions change places."""
    dims = list(inference.dims(op.args[0]))
    a, b = op.args[1:3]
    if not isinstance(a, int) or not isinstance(b, int):
        return None
    dims[a], dims[b] = dims[b], dims[a]
    return dims


@axis_rule("aten.t.default")
def matrix_transpose(inference: Inference, op: Op) -> Dims | None:
    """Of two dimensions."""
    return list(reversed(inference.dims(op.args[0])))


@axis_rule("aten.expand.default", "aten.repeat.default")
def grow(inference: Inference, op: Op) -> Dims | None:
    """Dimensions of size 1 grow, and new ones come in front: their entries are all the same."""
    before, after = inference.shape(op.args[0]), inference.shape(Ref(op.name))
    dims, made = inference.dims(op.args[0]), inference.fresh(after)
    for back in range(1, len(dims) + 1):
        if before[-back] == after[-back]:
            made[-back] = dims[-back]
        elif before[-back] != 1:
            return None
    return made


@axis_rule("aten.select.int")
def select(inference: Inference, op: Op) -> Dims | None:
    """One entry of a dimension, which goes."""
    dims, dim = list(inference.dims(op.args[0])), op.args[1]
    if not isinstance(dim, int):
        return None
    inference.fix((dims.pop(dim),), reason_of(op))
    return dims


@axis_rule("aten.slice.Tensor")
def slice_of(inference: Inference, op: Op) -> Dims | None:
    """A run of a dimension: what is before, in and behind it are axes of their own."""
    dims = list(inference.dims(op.args[0]))
    given = (*op.args[1:], *(0, None, None, 1)[len(op.args) - 1 :])
    bounds = [b for b in given[1:4] if b is None or isinstance(b, int)]
    dim = given[0]
    if not isinstance(dim, int) or len(bounds) != 3 or op.kwargs:
        return None
    size = inference.shape(op.args[0])[dim]
    if isinstance(size, str):
        return dims if bounds[0] in (None, 0) and bounds[1] in (None, _LARGEST) else None
    kept = range(size)[slice(*bounds)]
    if kept.step != 1:
        return None
    axes = inference.axes
    parts = [axes.plain(kept.start), axes.plain(len(kept)), axes.plain(size - kept.stop)]
    inference.unify(dims[dim], axes.joined(parts), op)
    dims[dim] = parts[1]
    return dims


@axis_rule("aten.cat.default")
def cat(inference: Inference, op: Op) -> Dims | None:
    """Pieces behind each other; alike in all other dimensions."""
    pieces = op.args[0]
    along = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    if not isinstance(pieces, tuple) or not isinstance(along, int):
        return None
    every = [inference.dims(piece) for piece in pieces]
    made = list(every[0])
    if any(len(dims) != len(made) for dims in every):
        return None
    along %= len(made)
    for dim in range(len(made)):
        for dims in every[1:] if dim != along else ():
            inference.unify(made[dim], dims[dim], op)
    if isinstance(inference.shape(Ref(op.name))[along], str):
        return None
    made[along] = inference.axes.joined([dims[along] for dims in every])
    return made


@axis_rule("aten.stack.default")
def stack(inference: Inference, op: Op) -> Dims | None:
    """A new dimension of fixed order; alike in all others."""
    pieces, dim = op.args[0], op.args[1] if len(op.args) > 1 else 0
    if not isinstance(pieces, tuple) or not isinstance(dim, int):
        return None
    made = list(inference.dims(pieces[0]))
    for piece in pieces[1:]:
        for a, b in zip(made, inference.dims(piece), strict=True):
            inference.unify(a, b, op)
    place = dim % (len(made) + 1)
    return [*made[:place], *inference.fresh((len(pieces),), reason_of(op)), *made[place:]]


@axis_rule("aten.index.Tensor")
def index(inference: Inference, op: Op) -> Dims | None:
    """Entries of one dimension by their numbers."""
    dims, given = inference.dims(op.args[0]), op.args[1]
    if not isinstance(given, tuple):
        return None
    listed = [place for place, arg in enumerate(given) if arg is not None]
    if len(listed) != 1:
        return None
    place = listed[0]
    numbers = given[place]
    if not isinstance(numbers, (Ref, WeightRef)):
        return None
    taken = inference.shape(numbers)
    if len(inference.shape(Ref(op.name))) != len(dims) - 1 + len(taken):
        return None
    inference.fix((dims[place], *inference.dims(numbers)), reason_of(op))
    return [*dims[:place], *inference.fresh(taken, reason_of(op)), *dims[place + 1 :]]


@axis_rule("aten.roll.default", "aten.flip.default")
def moved_about(inference: Inference, op: Op) -> Dims | None:
    """Entries of some dimensions move."""
    position = 2 if op.kind == "aten.roll.default" else 1
    given = op.args[position] if len(op.args) > position else ()
    return _all_but(inference, op, given if isinstance(given, tuple) else (given,))


@axis_rule("aten.pad.default", "aten.constant_pad_nd.default")
def pad(inference: Inference, op: Op) -> Dims | None:
    """Given from the last dimension on, two numbers for each."""
    pads = op.args[1]
    if not isinstance(pads, tuple):
        return None
    sizes = [pads[i : i + 2] for i in range(0, len(pads), 2)]
    return _all_but(inference, op, [-1 - i for i, both in enumerate(sizes) if both != (0, 0)])


def _all_but(inference: Inference, op: Op, named: Sequence[Arg]) -> Dims | None:
    """As the input, but fixed in these dimensions."""
    dims, made = list(inference.dims(op.args[0])), inference.fixed_result(op)
    numbers = [n % len(dims) for n in named if isinstance(n, int)]
    if (not named and op.kind == "aten.roll.default") or len(numbers) != len(named):
        return None
    inference.fix([dims[n] for n in numbers], reason_of(op))
    return [made[d] if d in numbers else axis for d, axis in enumerate(dims)]


@axis_rule(
    "aten.new_zeros.default",
    "aten.new_ones.default",
    "aten.new_full.default",
    "aten.zeros.default",
    "aten.ones.default",
    "aten.full.default",
)
def constant(inference: Inference, op: Op) -> Dims | None:
    """The same number everywhere."""
    return inference.fresh(inference.shape(Ref(op.name)))


@axis_rule("aten.sym_size.int")
def size(inference: Inference, op: Op) -> Dims | None:
    """A number that no order changes."""
    return []
