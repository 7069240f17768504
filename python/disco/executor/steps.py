"""One op made ready to run: its kernel prepared, its weights packed, its operands known by slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from disco.errors import InputError
from disco.program import Dtype, Op, Ref, ValueInfo, WeightRef, leaves, pure_function
from disco.program.interpret import dtype_of
from disco_kernels import InputBytes
from disco_kernels.prepacking import PackedKernel, Packing

if TYPE_CHECKING:
    from disco.executor.two_passes import LocalPart

# The values of one request, by slot. Slot 0 holds the Request itself.
Values = list[Any]
Run = Callable[[Values], Any]
REQUEST_SLOT = 0


@dataclass
class Step:
    """`run` computes the value of slot `out`; then the slots in `free` are not needed any more.

    Attributes:
        awaits: slots of the payloads that it reads, which have to have arrived.
        writes_out: True for kernels that write to the request's ``out`` of their slot; their op's
            last argument is the residual.
        local: of a layer over payloads, what does not have to wait for them.
        kind: what its time counts as.
        exchange: of an exchange, its number.
        progress: True for ops that take long enough to move messages along after them.
    """

    name: str
    run: Run
    out: int
    awaits: tuple[int, ...] = ()
    progress: bool = False
    free: tuple[int, ...] = ()
    writes_out: bool = False
    local: LocalPart | None = None
    kind: str = "compute"
    exchange: int | None = None


@dataclass
class Preparation:
    """What preparing an op needs.

    Attributes:
        weights: beside the program.
        backend: requested for the kernels, or None for the automatic choice.
        values: shape and dtype of the program's values.
        winograd: for 3 x 3 convolutions, as in `disco_kernels.ConvSpec`, where it fits.
        input_bytes: what is multiplied in 8-bit integers, by the name of the op.
        packing: packs the weights of all kernels, once all of them are known.
        kernels: of convolutions and linears, by the value that they compute.
        slots: value -> slot.
        payloads: slots of what is received.
        sizes: the values that sizes of tensors and arithmetic on them have given so far.
        copies: of the weights that are kept as they are.
        device: where the program computes, or None for the CPU.
    """

    weights: Mapping[str, Tensor]
    backend: str | None
    values: Mapping[str, ValueInfo] = field(default_factory=dict)
    winograd: str = "off"
    input_bytes: Mapping[str, InputBytes] = field(default_factory=dict)
    packing: Packing = field(default_factory=Packing)
    kernels: dict[str, PackedKernel] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    payloads: set[int] = field(default_factory=set)
    sizes: set[str] = field(default_factory=set)
    copies: dict[str, Tensor] = field(default_factory=dict)
    device: torch.device | None = None

    def sized(self, args: Any) -> bool:
        """Whether all values among the arguments are sizes, so that shapes decide them."""
        return all(leaf.name in self.sizes for leaf in leaves(args) if isinstance(leaf, Ref))

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

    def kept_weight(self, arg: Any, op: Op) -> Tensor:
        """A weight that stays as it is: a copy, made once. A tensor read from a shard is a view of
        the whole file, which would stay in memory with it."""
        weight = self.weight(arg, op)
        assert isinstance(arg, WeightRef)
        if arg.name not in self.copies:
            self.copies[arg.name] = weight.detach().clone()
        return self.copies[arg.name]

    def optional_kept_weight(self, arg: Any, op: Op) -> Tensor | None:
        """The same for an argument that may be None."""
        return None if arg is None else self.kept_weight(arg, op)

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


# Ops of one tensor whose result is a view of it wherever that can be.
_VIEWS = frozenset(
    {
        "aten._unsafe_view.default",
        "aten.flatten.using_ints",
        "aten.permute.default",
        "aten.reshape.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.transpose.int",
        "aten.unsqueeze.default",
        "aten.view.default",
    }
)


# Ops that make a tensor of numbers, on the device that they are told: a program names none.
_MAKERS = frozenset(
    {
        "aten.arange.default",
        "aten.arange.start",
        "aten.arange.start_step",
        "aten.eye.default",
        "aten.eye.m",
        "aten.full.default",
        "aten.linspace.default",
        "aten.ones.default",
        "aten.scalar_tensor.default",
        "aten.zeros.default",
    }
)


def prepare_pure(op: Op, prepare: Preparation) -> Step:
    """Any op with a pure function: constants are bound now, values looked up by slot."""
    function = pure_function(op.kind)
    out = prepare.slot(op.name)
    args = tuple(bind(arg, op, prepare) for arg in op.args)
    kwargs = {key: bind(value, op, prepare) for key, value in op.kwargs.items()}
    if op.kind in _MAKERS and prepare.device is not None:
        kwargs["device"] = prepare.device
    simple = all(not _is_fetch(a) for a in (*args[1:], *kwargs.values()))
    if op.kind == "aten.sym_size.int" or (
        op.kind.startswith("operator.") and prepare.sized(op.args)
    ):
        prepare.sizes.add(op.name)
    if op.kind in _VIEWS and isinstance(op.args[0], Ref) and prepare.sized(op.args[1:]):
        assert isinstance(args[0], _Slot)
        return Step(op.name, _view(function, args, kwargs, args[0].number, out), out)
    if args and isinstance(args[0], _Slot) and simple:
        # The common case, one value and constants: relu(x), max_pool2d(x, 3, 2, 1).
        x, rest = args[0].number, args[1:]
        return Step(op.name, lambda values: function(values[x], *rest, **kwargs), out)
    return Step(
        op.name,
        lambda values: function(
            *[fetch(arg, values) for arg in args],
            **{key: fetch(value, values) for key, value in kwargs.items()},
        ),
        out,
    )


def _view(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    source: int,
    out: int,
) -> Run:
    """A view of memory that stays is made once for requests of the same shapes."""

    def run(values: Values) -> Any:
        kept = values[REQUEST_SLOT].activations
        known = kept.views.get(out)
        if known is not None:
            return known
        found = function(
            *[fetch(arg, values) for arg in args],
            **{key: fetch(value, values) for key, value in kwargs.items()},
        )
        held = kept.fixed(source)
        # A reshape may have had to copy.
        if held is not None and _storage(found) == _storage(held):
            kept.views[out] = found
        return found

    return run


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@dataclass(frozen=True, slots=True)
class _Slot:
    number: int


@dataclass(frozen=True, slots=True)
class _Nested:
    """A tuple with values somewhere inside."""

    items: tuple[Any, ...]


def bind(arg: Any, op: Op, prepare: Preparation) -> Any:
    """An argument with weights and dtypes in their places, for `fetch`."""
    if isinstance(arg, Ref):
        return _Slot(prepare.slot(arg.name))
    if isinstance(arg, WeightRef):
        return prepare.kept_weight(arg, op)
    if isinstance(arg, Dtype):
        return dtype_of(arg)
    if isinstance(arg, tuple):
        items = tuple(bind(item, op, prepare) for item in arg)
        return _Nested(items) if any(isinstance(leaf, Ref) for leaf in leaves(arg)) else items
    return arg


def _is_fetch(bound: Any) -> bool:
    return isinstance(bound, (_Slot, _Nested))


def fetch(bound: Any, values: Values) -> Any:
    """What a bound argument is in a request."""
    if isinstance(bound, _Slot):
        return values[bound.number]
    if isinstance(bound, _Nested):
        return tuple(fetch(item, values) for item in bound.items)
    return bound
