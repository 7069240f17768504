"""What every op demands of the axes of its operands, op by op through a program.

An op with no rule here, or of a form that its rule does not know, fixes all that it reads and
makes: what is not proven is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from disco.program import Op, Program, Ref, WeightRef, leaves
from disco.program.ir import Arg
from disco.sparsify.permute.axes import Axes

# Per dimension its axis.
Dims = list[int]
# Called with the inference and the op; the axes of its result, or None for no answer.
AxisRule = Callable[["Inference", Op], "Dims | None"]

RULES: dict[str, AxisRule] = {}


def axis_rule(*kinds: str) -> Callable[[AxisRule], AxisRule]:
    """Make a function the rule of these op kinds."""

    def register(function: AxisRule) -> AxisRule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


class Inference:
    """The axes of all values and weights of a program.

    Args:
        program: as it was exported, nothing folded.
        weights: its tensors by name.
        identity: per name the name that stands for the tensor, where one has several.
    """

    def __init__(
        self, program: Program, weights: Mapping[str, Tensor], identity: Mapping[str, str]
    ) -> None:
        self.axes = Axes()
        self.program = program
        self.dims_of_value: dict[str, Dims] = {}
        self.dims_of_weight: dict[str, Dims] = {}
        self._weights = weights
        self._identity = identity
        self._open = self.axes.plain(-1, "its size is open")
        for name in program.inputs:
            self.dims_of_value[name] = self.fresh(self.shape(Ref(name)), f"is of the input {name}")
        for op in program.ops:
            self._visit(op)
        for leaf in leaves(program.outputs):
            if isinstance(leaf, (Ref, WeightRef)):
                self.fix(self.dims(leaf), "is of an output of the model")

    def shape(self, arg: Arg) -> tuple[int | str, ...]:
        """Symbolic shape of a value or weight; () for numbers."""
        if isinstance(arg, Ref):
            return self.program.values[arg.name].shape
        return tuple(self._weights[arg.name].shape) if isinstance(arg, WeightRef) else ()

    def dims(self, arg: Arg) -> Dims:
        """The axes of a value's or weight's dimensions; none for numbers."""
        if isinstance(arg, Ref):
            return self.dims_of_value[arg.name]
        if not isinstance(arg, WeightRef):
            return []
        name = self._identity.get(arg.name, arg.name)
        if name not in self.dims_of_weight:
            self.dims_of_weight[name] = self.fresh(self.shape(arg))
            if name not in self._identity:
                self.fix(self.dims_of_weight[name], f"reaches the constant {name}")
        return self.dims_of_weight[name]

    def fresh(self, shape: Iterable[int | str], reason: str = "") -> Dims:
        """New axes of these sizes."""
        return [self.axes.plain(s, reason) if isinstance(s, int) else self._open for s in shape]

    def fix(self, dims: Iterable[int], reason: str) -> None:
        for axis in dims:
            self.axes.fix(axis, reason)

    def fixed_result(self, op: Op) -> Dims:
        """New axes for an op's result, fixed."""
        return self.fresh(self.shape(Ref(op.name)), reason_of(op))

    def unify(self, a: int, b: int, op: Op) -> None:
        self.axes.unify(a, b, reason_of(op))

    def broadcast(self, op: Op, operands: Iterable[Arg], shape: tuple[int | str, ...]) -> Dims:
        """The axes of operands that are broadcast to a shape, dimensions matched from behind."""
        made: list[int | None] = [None] * len(shape)
        for arg in operands:
            dims, sizes = self.dims(arg), self.shape(arg)
            for back in range(1, len(dims) + 1):
                if sizes[-back] == 1 and shape[-back] != 1:
                    continue
                found = made[-back]
                if found is None:
                    made[-back] = dims[-back]
                else:
                    self.unify(found, dims[-back], op)
        return [
            self.fresh((size,))[0] if axis is None else axis
            for axis, size in zip(made, shape, strict=True)
        ]

    def _visit(self, op: Op) -> None:
        rule = RULES.get(op.kind)
        found = rule(self, op) if rule is not None else None
        if found is None:
            for leaf in leaves((op.args, dict(op.kwargs))):
                self.fix(self.dims(leaf), reason_of(op))
            found = self.fixed_result(op)
        self.dims_of_value[op.name] = found


def reason_of(op: Op) -> str:
    """That an op asks for an order."""
    kind = op.kind.split(".")[1] if op.kind.startswith("aten.") else op.kind
    return f"reaches {kind}"
