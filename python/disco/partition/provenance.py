"""Which layer's output channels the channels of a value are, through everything in between.

The order in which a rank holds the outputs of a layer is free, as long as all that is added to them
is held alike: residual connections tie layers together. Ops that need whole blocks in order (heads,
groups, pixel shuffles) fix it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from disco.partition.placement import Sharded
from disco.partition.rules import Lowering, RuleContext
from disco.partition.rules.partial_sums import PARTIAL_SUMS
from disco.partition.rules.parts import PART_OF_LAYER
from disco.partition.rules.reshape import expanded, taken_channels
from disco.program import Op, Program, Ref, WeightRef

# Per channel of a value: the layer (by its value) and which of its outputs; None where unknown.
Origin = tuple[tuple[str, int] | None, ...]

_MATRIX_OPS = ("disco.conv2d", "disco.linear")
# The result depends on which channels there are, not on their order.
_ORDER_FREE = ("disco.moments", "disco.group_moments", PARTIAL_SUMS, PART_OF_LAYER)


class Provenance:
    """Of one program whose ops have been lowered.

    Args:
        kept_order: layers whose outputs stay in the order that was given for them.
    """

    def __init__(
        self,
        program: Program,
        lowerings: Sequence[Lowering],
        context: RuleContext,
        kept_order: Collection[str] = (),
    ) -> None:
        self._context = context
        self._leader: dict[str, str] = {}
        self._fixed: set[str] = set()
        self._origins: dict[str, Origin] = {}
        self._members: list[str] = []
        self._order_free: set[str] = set()
        readers_of_weight: dict[str, list[Op]] = {}
        for op, lowering in zip(program.ops, lowerings, strict=True):
            origin = self._origin(op, lowering)
            if origin is not None:
                self._origins[op.name] = origin
            if op.kind in _MATRIX_OPS:
                readers_of_weight.setdefault(next(op.weight_refs()), []).append(op)
                if context.layer_of(op) in kept_order:
                    self._fix_all([op.name])
        for ops in readers_of_weight.values():
            self._tie_shared_weights(ops)

    def free_layers(self) -> dict[str, list[str]]:
        """Layers (by their values) that must be held in one order, and may be held in any."""
        groups: dict[str, list[str]] = {}
        for member in self._members:
            groups.setdefault(self._find(member), []).append(member)
        fixed = {self._find(member) for member in self._fixed}
        return {leader: group for leader, group in groups.items() if leader not in fixed}

    def of(self, value: str) -> Origin:
        """Of each channel of an exchanged value, the group (its leader) and channel; or None."""
        found = self._origins.get(value, ())
        return tuple(None if at is None else (self._find(at[0]), at[1]) for at in found)

    def _origin(self, op: Op, lowering: Lowering) -> Origin | None:
        placed = lowering.placement
        if not isinstance(placed, Sharded):
            self._fix_all(self._local_inputs(op, lowering), but=op.kind in _ORDER_FREE)
            return None
        count = placed.ownership.num_channels
        if op.kind in _MATRIX_OPS and op.kwargs.get("groups", 1) == 1 and lowering.out_ownership:
            return self._born(op, placed)
        inputs = self._local_inputs(op, lowering)
        if op.kind in _ORDER_FREE:
            self._order_free.add(op.name)
        if op.kind in _ORDER_FREE or not inputs:
            return (None,) * count
        return self._through(op, placed, inputs) or self._unknown(inputs, count)

    def _born(self, op: Op, placed: Sharded) -> Origin:
        """A layer's outputs; if it adds a residual that is held alike, they stay so."""
        born: Origin = tuple((op.name, channel) for channel in range(placed.ownership.num_channels))
        tied = op.args[3]
        if not isinstance(tied, Ref) or self._context.sharded(tied) != placed:
            self._members.append(op.name)
            return born
        origin = self._origins.get(tied.name, (None,) * len(born))
        if self._join(born, origin):
            self._members.append(op.name)
        elif self._context.layer_of(op) in self._context.out_ownership:
            self._fix_all([tied.name])
        return origin

    def _through(self, op: Op, placed: Sharded, inputs: Sequence[str]) -> Origin | None:
        """The origin of what is made of `inputs` channel by channel; None if that is not so."""
        context = self._context
        first = context.sharded(Ref(inputs[0]))
        assert first is not None
        if op.kind == "aten.cat.default" and isinstance(op.args[0], tuple):
            pieces = [
                self._piece(piece, placed.dim)
                for piece in op.args[0]
                if isinstance(piece, (Ref, WeightRef))
            ]
            joined = tuple(at for piece in pieces for at in piece)
            if len(joined) == placed.ownership.num_channels:
                return joined
        own = self._origins.get(inputs[0], ())
        taken = taken_channels(op, context)
        if taken is not None:
            return tuple(own[channel] for channel in taken)
        if _needs_blocks(op, context):
            return None
        if placed.ownership == first.ownership:
            return self._tied(inputs)
        factor = placed.ownership.num_channels // max(first.ownership.num_channels, 1)
        if len(inputs) == 1 and factor and placed.ownership == expanded(first.ownership, factor):
            return tuple(at for at in own for _ in range(factor))
        return None

    def _piece(self, piece: Ref | WeightRef, dim: int) -> Origin:
        """Of one piece of a concatenation along `dim`."""
        placed = self._context.sharded(piece)
        if isinstance(piece, Ref) and placed is not None and placed.dim == dim:
            return self._origins.get(piece.name, (None,) * placed.ownership.num_channels)
        return (None,) * int(self._context.shape(piece)[dim])

    def _tied(self, inputs: Sequence[str]) -> Origin | None:
        """Values that an op reads side by side have to be held alike."""
        found = [self._origins.get(name, ()) for name in inputs]
        for other in found[1:]:
            if other != found[0] and not self._join(found[0], other):
                return None
        return found[0]

    def _join(self, a: Origin, b: Origin) -> bool:
        layers = []
        for origin in (a, b):
            layer = next((at[0] for at in origin if at is not None), None)
            if layer is None or origin != tuple((layer, c) for c in range(len(origin))):
                return False
            layers.append(layer)
        self._leader[self._find(layers[0])] = self._find(layers[1])
        return True

    def _tie_shared_weights(self, ops: Sequence[Op]) -> None:
        """One weight for several ops is cut once only if all of them hold channels alike."""
        inputs = [next(op.refs()) for op in ops]
        for names in (inputs, [op.name for op in ops]):
            sharded = [n for n in dict.fromkeys(names) if self._context.sharded(Ref(n)) is not None]
            if len(sharded) > 1 and self._tied(sharded) is None:
                self._fix_all(sharded)

    def _local_inputs(self, op: Op, lowering: Lowering) -> list[str]:
        """Sharded values that a rank reads its own part of, as it lies there."""
        elsewhere = {*lowering.whole, *lowering.reshare, *lowering.select}
        names = dict.fromkeys(op.refs())
        sharded = [n for n in names if self._context.sharded(Ref(n)) is not None]
        return [n for n in sharded if n not in elsewhere and n not in self._order_free]

    def _unknown(self, inputs: Sequence[str], count: int) -> Origin:
        self._fix_all(inputs)
        return (None,) * count

    def _fix_all(self, values: Sequence[str], but: bool = False) -> None:
        for value in () if but else values:
            for at in self._origins.get(value, ()):
                if at is not None:
                    self._fix(at[0])

    def _fix(self, layer: str) -> None:
        self._fixed.add(layer)

    def _find(self, layer: str) -> str:
        while (up := self._leader.get(layer, layer)) != layer:
            layer = up
        return layer


def _needs_blocks(op: Op, context: RuleContext) -> bool:
    """Whether several channels of an op's input have to lie one after the other."""
    if op.kind != "disco.conv2d":
        return False
    return int(context.shape(op.args[1])[1]) != 1
