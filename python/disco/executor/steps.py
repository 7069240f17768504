"""One op made ready to run: its kernel prepared, its weights packed, its operands known by slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from disco.errors import InputError
from disco.program import Dtype, Op, Ref, ValueInfo, WeightRef, leaves, pure_function
from disco.program.interpret import dtype_of
from disco_kernels.memory import Pool

# The values of one request, by slot. Slot 0 holds the Request itself.
Values = list[Any]
Run = Callable[[Values], Any]
REQUEST_SLOT = 0


@dataclass
class Step:
    """`run` computes the value of slot `out`; then the slots in `free` are not needed any more.

    Attributes:
        awaits: set for a received payload: the slot of its exchange and the payload's position.
        writes_out: True for kernels that write to the request's ``out`` of their slot; their op's
            last argument is the residual.
        progress: True for ops that take long enough to move messages along after them.
    """

    name: str
    run: Run
    out: int
    awaits: tuple[int, int] | None = None
    progress: bool = False
    free: tuple[int, ...] = ()
    backend: str = ""
    writes_out: bool = False


@dataclass
class Preparation:
    """What preparing an op needs.

    Attributes:
        weights: beside the program.
        backend: requested for the kernels, or None for the automatic choice.
        values: shape and dtype of the program's values.
        winograd: for 3 x 3 convolutions, as in `disco_kernels.ConvSpec`, where it fits.
        pool: holds the packed weights.
        slots: value -> slot.
    """

    weights: Mapping[str, Tensor]
    backend: str | None
    values: Mapping[str, ValueInfo] = field(default_factory=dict)
    winograd: str = "off"
    pool: Pool = field(default_factory=Pool)
    slots: dict[str, int] = field(default_factory=dict)

    def slot(self, name: str) -> int:
        """The slot of a value."""
        return self.slots.setdefault(name, len(self.slots) + 1)

    def slot_of(self, arg: Any, op: Op) -> int:
        """The slot of an argument that has to be a value."""
        if not isinstance(arg, Ref):
            raise InputError(f"op {op.name!r} ({op.kind}) expects a value, given {arg!r}")
        return self.slot(arg.name)

    def optional_slot(self, arg: Any, op: Op) -> int | None:
        """The slot of an argument that may be None."""
        return None if arg is None else self.slot_of(arg, op)

    def weight(self, arg: Any, op: Op) -> Tensor:
        """The tensor of an argument that has to be a weight."""
        if not isinstance(arg, WeightRef):
            raise InputError(f"op {op.name!r} ({op.kind}) expects a weight, given {arg!r}")
        if arg.name not in self.weights:
            raise InputError(f"op {op.name!r} reads weight {arg.name!r}, which is not there")
        return self.weights[arg.name]

    def image_size(self, arg: Any) -> tuple[int, int] | None:
        """Height and width of a map ``[B, C, H, W]``, or None where they are not fixed."""
        info = self.values.get(arg.name) if isinstance(arg, Ref) else None
        if info is None or len(info.shape) != 4:
            return None
        height, width = info.shape[2:]
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def optional_weight(self, arg: Any, op: Op) -> Tensor | None:
        """The tensor of an argument that may be None."""
        return None if arg is None else self.weight(arg, op)


def prepare_pure(op: Op, prepare: Preparation) -> Step:
    """Any op with a pure function: constants are bound now, values looked up by slot."""
    function = pure_function(op.kind)
    out = prepare.slot(op.name)
    args = tuple(_bind(arg, op, prepare) for arg in op.args)
    kwargs = {key: _bind(value, op, prepare) for key, value in op.kwargs.items()}
    simple = all(not _is_fetch(a) for a in (*args[1:], *kwargs.values()))
    if args and isinstance(args[0], _Slot) and simple:
        # The common case, one value and constants: relu(x), max_pool2d(x, 3, 2, 1).
        x, rest = args[0].number, args[1:]
        return Step(op.name, lambda values: function(values[x], *rest, **kwargs), out)
    return Step(
        op.name,
        lambda values: function(
            *[_fetch(arg, values) for arg in args],
            **{key: _fetch(value, values) for key, value in kwargs.items()},
        ),
        out,
    )


@dataclass(frozen=True, slots=True)
class _Slot:
    number: int


@dataclass(frozen=True, slots=True)
class _Nested:
    """A tuple with values somewhere inside."""

    items: tuple[Any, ...]


def _bind(arg: Any, op: Op, prepare: Preparation) -> Any:
    if isinstance(arg, Ref):
        return _Slot(prepare.slot(arg.name))
    if isinstance(arg, WeightRef):
        return prepare.weight(arg, op)
    if isinstance(arg, Dtype):
        return dtype_of(arg)
    if isinstance(arg, tuple):
        items = tuple(_bind(item, op, prepare) for item in arg)
        return _Nested(items) if any(isinstance(leaf, Ref) for leaf in leaves(arg)) else items
    return arg


def _is_fetch(bound: Any) -> bool:
    return isinstance(bound, (_Slot, _Nested))


def _fetch(bound: Any, values: Values) -> Any:
    if isinstance(bound, _Slot):
        return values[bound.number]
    if isinstance(bound, _Nested):
        return tuple(_fetch(item, values) for item in bound.items)
    return bound
