"""Chains of views that put a dimension into another and take it out again, written without that.

`torch.nn.MultiheadAttention` sees queries as ``[tokens, batch * heads, size]``, then as ``[batch,
heads, tokens, size]``, and cuts queries, keys and values out of a stack of three. Who looks at one
view after the other finds the heads in the batch; taken together the views are a split and a
permutation, and the cut is a slice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from disco.program import Arg, Op, Program, Ref, ValueInfo

_VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")

# A product: a number and symbols.
Size = tuple[int, tuple[str, ...]]
_PRODUCT = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)")


@dataclass(frozen=True)
class _Atom:
    """A factor of a dimension of the chain's source, numbered from the outermost."""

    dim: int
    place: int


@dataclass(frozen=True)
class _Layout:
    """What a view's dimensions are made of.

    Attributes:
        source: the value at the beginning of the chain.
        factors: per dimension of the source the sizes of its atoms.
        dims: per dimension of the view its atoms.
        mixed: whether a dimension of open size was put together with another on the way.
    """

    source: str
    factors: tuple[tuple[Size, ...], ...]
    dims: tuple[tuple[_Atom, ...], ...]
    mixed: bool = False

    def size(self, atom: _Atom) -> Size:
        return self.factors[atom.dim][atom.place]

    @property
    def atoms(self) -> list[_Atom]:
        """In the order of the source."""
        return [
            _Atom(dim, place)
            for dim, sizes in enumerate(self.factors)
            for place in range(len(sizes))
        ]

    def viewed(self, shape: Sequence[Size]) -> _Layout | None:
        """As another shape, atoms split where it splits them."""
        layout = self
        left = [atom for dim in layout.dims for atom in dim]
        dims: list[tuple[_Atom, ...]] = []
        for wanted in shape:
            taken: list[_Atom] = []
            missing: Size | None = wanted
            while missing != (1, ()):
                if not left or missing is None:
                    return None
                rest = _quotient(missing, layout.size(left[0]))
                if rest is None:
                    inner = _quotient(layout.size(left[0]), missing)
                    if inner is None:
                        return None
                    layout, left, dims, taken = _split(layout, left, dims, taken, missing, inner)
                    rest = (1, ())
                taken.append(left.pop(0))
                missing = rest
            dims.append(tuple(taken))
        if any(layout.size(atom) != (1, ()) for atom in left):
            return None
        mixed = any(len(dim) > 1 and any(layout.size(a)[1] for a in dim) for dim in dims)
        return replace(layout, dims=tuple(dims), mixed=layout.mixed or mixed)


def spell_out_views(program: Program) -> Program:
    """Replace ends of such chains; what is in between is left to `remove_dead`."""
    values = dict(program.values)
    layouts: dict[str, _Layout] = {}
    ops: list[Op] = []
    for op in program.ops:
        layout = _layout_of(op, layouts, values)
        if layout is not None:
            layouts[op.name] = layout
        found = _as_slice(op, layouts, values) or _as_permutation(op, layout, values)
        ops += found or [op]
    return replace(program, ops=tuple(ops), values=values)


def _layout_of(op: Op, layouts: dict[str, _Layout], values: dict[str, ValueInfo]) -> _Layout | None:
    """Of a view's result; None for other ops and for sizes that are no products."""
    x = op.args[0] if op.args else None
    if not isinstance(x, Ref) or x.name not in values or op.kwargs:
        return None
    before = layouts.get(x.name) or _whole(x.name, values)
    if before is None:
        return None
    dims, num_dims = before.dims, len(before.dims)
    if op.kind in _VIEWS:
        shape = _sizes(values[op.name].shape)
        return None if shape is None else before.viewed(shape)
    numbers = [n for n in op.args[1:] if isinstance(n, int)]
    if op.kind == "aten.transpose.int" and len(numbers) == 2:
        order = list(range(num_dims))
        a, b = (n % num_dims for n in numbers)
        order[a], order[b] = order[b], order[a]
        return replace(before, dims=tuple(dims[i] for i in order))
    if op.kind == "aten.permute.default" and isinstance(op.args[1], tuple):
        listed = [n % num_dims for n in op.args[1] if isinstance(n, int)]
        return replace(before, dims=tuple(dims[i] for i in listed))
    if op.kind == "aten.unsqueeze.default" and len(numbers) == 1:
        place = numbers[0] % (num_dims + 1)
        return replace(before, dims=(*dims[:place], (), *dims[place:]))
    if op.kind == "aten.squeeze.dim" and len(numbers) == 1 and not dims[numbers[0] % num_dims]:
        place = numbers[0] % num_dims
        return replace(before, dims=(*dims[:place], *dims[place + 1 :]))
    return None


def _as_slice(op: Op, layouts: dict[str, _Layout], values: dict[str, ValueInfo]) -> list[Op] | None:
    """A selection from the outer part of one dimension, all else as in the source."""
    x = op.args[0] if op.args else None
    if op.kind != "aten.select.int" or not isinstance(x, Ref) or x.name not in layouts:
        return None
    layout, dim, index = layouts[x.name], *op.args[1:3]
    if not isinstance(dim, int) or not isinstance(index, int):
        return None
    dim %= len(layout.dims)
    if len(layout.dims[dim]) != 1:
        return None
    ((atom,), kept) = layout.dims[dim], (*layout.dims[:dim], *layout.dims[dim + 1 :])
    count, inner = layout.factors[atom.dim][0], layout.factors[atom.dim][1:]
    as_before = tuple(
        tuple(_Atom(d, p) for p in range(len(sizes)) if _Atom(d, p) != atom)
        for d, sizes in enumerate(layout.factors)
    )
    if atom.place or count[1] or any(size[1] for size in inner) or kept != as_before:
        return None
    rest = 1
    for size in inner:
        rest *= size[0]
    begin = index % count[0] * rest
    source = Ref(layout.source)
    return [Op("aten.slice.Tensor", op.name, (source, atom.dim, begin, begin + rest, 1))]


def _as_permutation(
    op: Op, layout: _Layout | None, values: dict[str, ValueInfo]
) -> list[Op] | None:
    """A split of the source's dimensions and a permutation, where each is whole in the end."""
    if op.kind not in _VIEWS or layout is None or not layout.mixed:
        return None
    if any(len(dim) != 1 for dim in layout.dims):
        return None
    source, dtype = layout.source, values[layout.source].dtype
    shape: list[int | str] = []
    args: list[Arg] = []
    made: list[Op] = []
    for atom in layout.atoms:
        number, symbols = layout.size(atom)
        if not symbols:
            shape.append(number)
            args.append(number)
            continue
        if len(layout.factors[atom.dim]) > 1 or number != 1 or len(symbols) > 1:
            return None
        name = f"{op.name}.size{atom.dim}"
        made.append(Op("aten.sym_size.int", name, (Ref(source), atom.dim)))
        values[name] = ValueInfo((), "int64")
        shape.append(symbols[0])
        args.append(Ref(name))
    split = f"{op.name}.split"
    values[split] = ValueInfo(tuple(shape), dtype)
    made.append(Op("aten.view.default", split, (Ref(source), tuple(args))))
    order = tuple(layout.atoms.index(atom) for (atom,) in layout.dims)
    return [*made, Op("aten.permute.default", op.name, (Ref(split), order))]


def _whole(name: str, values: dict[str, ValueInfo]) -> _Layout | None:
    """A value as the beginning of a chain."""
    sizes = _sizes(values[name].shape)
    if sizes is None:
        return None
    dims = tuple((_Atom(dim, 0),) for dim in range(len(sizes)))
    return _Layout(name, tuple((size,) for size in sizes), dims)


def _split(
    layout: _Layout,
    left: list[_Atom],
    dims: list[tuple[_Atom, ...]],
    taken: list[_Atom],
    outer: Size,
    inner: Size,
) -> tuple[_Layout, list[_Atom], list[tuple[_Atom, ...]], list[_Atom]]:
    """The first atom of ``left`` as two; atoms behind it in its dimension are numbered anew."""
    first = left[0]
    sizes = layout.factors[first.dim]
    changed = (*sizes[: first.place], outer, inner, *sizes[first.place + 1 :])
    factors = (*layout.factors[: first.dim], changed, *layout.factors[first.dim + 1 :])

    def renumbered(atom: _Atom) -> _Atom:
        later = atom.dim == first.dim and atom.place > first.place
        return replace(atom, place=atom.place + 1) if later else atom

    behind = [renumbered(atom) for atom in left[1:]]
    left = [first, replace(first, place=first.place + 1), *behind]
    dims = [tuple(map(renumbered, dim)) for dim in dims]
    return replace(layout, factors=factors), left, dims, [renumbered(atom) for atom in taken]


def _sizes(shape: Sequence[int | str]) -> list[Size] | None:
    found: list[Size] = []
    for size in shape:
        if isinstance(size, int):
            found.append((size, ()))
            continue
        match = _PRODUCT.fullmatch(size)
        if match is None:
            return None
        found.append((int(match[1] or 1), (match[2],)))
    return found


def _quotient(size: Size, by: Size) -> Size | None:
    """``size / by`` if that is a product."""
    if by[0] == 0 or size[0] % by[0]:
        return None
    symbols = list(size[1])
    for symbol in by[1]:
        if symbol not in symbols:
            return None
        symbols.remove(symbol)
    return (size[0] // by[0], tuple(symbols))
