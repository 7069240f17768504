"""The program: a small, versioned, flat list of pure operations; shards are written in it.

A program is data. It names operations of an allow-list (`disco.program.ops`) and weights that are
kept beside it; it holds no code and no tensors. Every op produces one value, named like the op
(a tuple counts as one value and `operator.getitem` takes it apart).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from disco.errors import InputError
from disco.program.fused import check_attributes
from disco.program.ops import check_allowed

if TYPE_CHECKING:
    from disco.program.signature import Parameter

# The newest that is read and written. Version 2 has payloads in wire dtypes; programs without them
# are written as version 1, as they always were.
PROGRAM_VERSION = 2


_SINCE_2 = frozenset({"disco.payload_scale", "disco.widen"})


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of this name: an input of the program or the result of an earlier op."""

    name: str


@dataclass(frozen=True, slots=True)
class WeightRef:
    """The tensor of this name in the weights that are kept beside the program."""

    name: str


@dataclass(frozen=True, slots=True)
class Dtype:
    """A torch dtype by name, e.g. ``float32``."""

    name: str


# The usual leaves: known without asking whether they are containers.
_LEAVES = frozenset({Ref, WeightRef, Dtype, int, float, bool, str, type(None)})

# Attributes are immutable: lists of the source graph become tuples.
Arg: TypeAlias = "Ref | WeightRef | Dtype | int | float | bool | str | tuple[Arg, ...] | None"
# Outputs keep the nesting that the model's user sees.
Output: TypeAlias = (
    "Ref | WeightRef | int | float | bool | str"
    " | tuple[Output, ...] | list[Output] | dict[str, Output] | None"
)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: `kind` of the allow-list, applied to `args` and `kwargs`, called `name`."""

    kind: str
    name: str
    args: tuple[Arg, ...] = ()
    kwargs: Mapping[str, Arg] = field(default_factory=dict)

    def refs(self) -> Iterator[str]:
        """Names of the values that the op reads, in order, with repetitions."""
        for leaf in leaves((self.args, tuple(self.kwargs.values()))):
            if isinstance(leaf, Ref):
                yield leaf.name

    def weight_refs(self) -> Iterator[str]:
        """Names of the weights that the op reads, in order, with repetitions."""
        for leaf in leaves((self.args, tuple(self.kwargs.values()))):
            if isinstance(leaf, WeightRef):
                yield leaf.name

    def replace_leaves(self, change: Callable[[Any], Any]) -> Op:
        """The same op with every leaf of its arguments passed through `change`."""
        args = map_leaves(self.args, change)
        return Op(
            self.kind, self.name, args, {k: map_leaves(v, change) for k, v in self.kwargs.items()}
        )


@dataclass(frozen=True, slots=True)
class ValueInfo:
    """Shape and dtype of a value. A ``str`` in `shape` is an expression of symbols ("s0", "4*s0").

    `dtype` is a torch dtype name, or "int" for a number (a size), or "tuple".
    """

    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Program:
    """Ops in an order in which they can run, names of inputs, nesting of outputs.

    Attributes:
        signature: the arguments in which the inputs come; empty for the inputs by position.
        example_sizes: symbols of image sizes (not the batch's) and their values in the example.
        conditions: of symbols, e.g. ``"s1 >= 9"``: what the captured graph takes for granted.
    """

    inputs: tuple[str, ...]
    outputs: Output
    ops: tuple[Op, ...]
    values: Mapping[str, ValueInfo]
    version: int = 1
    signature: tuple[Parameter, ...] = ()
    example_sizes: Mapping[str, int] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()

    def validate(self) -> None:
        """Raise InputError unless all names are defined once, before use, by allowed ops.

        Attributes of the fused ops are checked too (an activation that is not known here).
        """
        defined: set[str] = set()
        for name in self.inputs:
            if name in defined:
                raise InputError(
                    f"program input {name!r} is listed twice; inputs need distinct names"
                )
            if name not in self.values:
                raise InputError(f"program input {name!r} has no shape and dtype in `values`")
            defined.add(name)
        if self.signature:
            given = [leaf.name for p in self.signature for leaf in leaves(p.value) if _is_ref(leaf)]
            if sorted(given) != sorted(self.inputs):
                raise InputError(
                    f"the signature names {given} and the program reads {list(self.inputs)}"
                )
        for op in self.ops:
            check_allowed(op.kind, op.name)
            check_attributes(op.kind, op.name, op.kwargs)
            if self.version < 2 and ("wire" in op.kwargs or op.kind in _SINCE_2):
                raise InputError(
                    f"op {op.name!r} ({op.kind}) has payloads in a wire dtype, which programs of "
                    f"version {self.version} do not: partition the model again"
                )
            for ref in op.refs():
                if ref not in defined:
                    raise InputError(
                        f"op {op.name!r} ({op.kind}) reads {ref!r} before it is defined"
                    )
            if op.name in defined:
                raise InputError(f"value {op.name!r} is defined twice; every op needs its own name")
            defined.add(op.name)
        for leaf in leaves(self.outputs):
            if isinstance(leaf, Ref) and leaf.name not in defined:
                raise InputError(f"program output {leaf.name!r} is not defined by any op or input")

    def to_json(self) -> str:
        """One line of JSON (`disco.program.json_format`); equal programs give equal text."""
        from disco.program.json_format import program_to_json

        return program_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Read and validate what `to_json` wrote. InputError for anything else."""
        from disco.program.json_format import program_from_json

        return program_from_json(text)

    def weight_names(self) -> tuple[str, ...]:
        """Names of all weights that the program reads, in order of first use."""
        names: dict[str, None] = {}
        for op in self.ops:
            names.update(dict.fromkeys(op.weight_refs()))
        names.update(
            (leaf.name, None) for leaf in leaves(self.outputs) if isinstance(leaf, WeightRef)
        )
        return tuple(names)

    def consumers(self) -> dict[str, list[Op]]:
        """For every value the ops that read it, in order (outputs of the program not included)."""
        table: dict[str, list[Op]] = {name: [] for name in self.inputs}
        for op in self.ops:
            table[op.name] = []
            for ref in dict.fromkeys(op.refs()):
                table[ref].append(op)
        return table

    def output_names(self) -> tuple[str, ...]:
        """Names of the values that the program returns, in order, without repetitions."""
        found = (leaf.name for leaf in leaves(self.outputs) if isinstance(leaf, Ref))
        return tuple(dict.fromkeys(found))

    def __str__(self) -> str:
        lines = [
            f"program(version {self.version}) inputs: {', '.join(map(self._typed, self.inputs))}"
        ]
        for op in self.ops:
            arguments = [format_arg(a) for a in op.args]
            arguments += [f"{k}={format_arg(v)}" for k, v in op.kwargs.items()]
            lines.append(f"  {self._typed(op.name)} = {op.kind}({', '.join(arguments)})")
        return "\n".join([*lines, f"  return {format_arg(self.outputs)}"])

    def _typed(self, name: str) -> str:
        info = self.values.get(name)
        return name if info is None else f"{name}: {info.dtype}{list(info.shape)}"


def _is_ref(leaf: Any) -> bool:
    return isinstance(leaf, Ref)


def leaves(tree: Any) -> Iterator[Any]:
    """The leaves of nested tuples, lists and dicts, in order."""
    found: list[Any] = []
    _collect(tree, found)
    return iter(found)


def _collect(tree: Any, found: list[Any]) -> None:
    # Not a generator in itself: one in another passes every leaf through all of them, and planning
    # reads the arguments of all ops many times.
    if type(tree) in _LEAVES:
        found.append(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _collect(item, found)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            _collect(item, found)
    else:
        found.append(tree)


def map_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nesting with every leaf passed through `change`."""
    if isinstance(tree, tuple):
        return tuple(map_leaves(item, change) for item in tree)
    if isinstance(tree, list):
        return [map_leaves(item, change) for item in tree]
    if isinstance(tree, Mapping):
        return {key: map_leaves(item, change) for key, item in tree.items()}
    return change(tree)


def format_arg(tree: Any) -> str:
    """Readable form of an argument: ``%value``, ``@weight``, plain numbers."""
    if isinstance(tree, Ref):
        return f"%{tree.name}"
    if isinstance(tree, WeightRef):
        return f"@{tree.name}"
    if isinstance(tree, Dtype):
        return tree.name
    if isinstance(tree, (tuple, list)):
        return "[" + ", ".join(format_arg(item) for item in tree) + "]"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{k}: {format_arg(v)}" for k, v in tree.items()) + "}"
    return repr(tree)
