"""What a rule is: a small function that says how one op runs on values that are sharded.

A rule gets the op and a `RuleContext` (where its inputs are) and returns a `Lowering` (where its
result is, what the ranks need of each other, and how to write each rank's op), or None if it has no
answer for this case. With no rule, or no answer, the op gathers its inputs and runs replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from disco.partition.placement import Placement, Replicated, Sharded, to_reshare
from disco.partition.rank_builder import RankBuilder
from disco.partition.shares import Shares, share_out
from disco.program import Arg, Op, Ref, ValueInfo, WeightRef, evaluate_dim
from disco.program.symbols import symbols_of
from disco_kernels.pattern import (
    Ownership,
    Selected,
    check_ownership,
    selected_by,
    used_columns,
)

# Called with the op, the rank, the piece (a value with some channels of the first argument), these
# channels, and the name to give to the op's result on them.
Replay = Callable[[Op, RankBuilder, Ref, tuple[int, ...], str], None]


@dataclass(frozen=True)
class Lowering:
    """A rule's answer for one op.

    Attributes:
        placement: where the result is.
        emit: writes one rank's op; called once per rank, after all exchanges are known.
        select: per input value the channels that the ranks need of each other, by the weights.
        reshare: per input value the channels that they need to have it as another value is.
        whole: input values that every rank needs whole.
        flops: 2 x multiply-accumulates per image of convolutions and linears, per rank.
        out_ownership, in_ownership, selected: of a convolution or linear, for the plan.
        reason: why the op runs replicated although an input is sharded; empty if it does not.
        replay: makes some channels of the result out of the same channels of the first argument,
            wherever they are; None if that cannot be. A tensor that an op makes larger is then
            exchanged before the op.
        form: how the value that it selects is exchanged: "inputs" or "partial sums".
    """

    placement: Placement
    emit: Callable[[Op, RankBuilder], None]
    select: Mapping[str, Selected] = field(default_factory=dict)
    reshare: Mapping[str, Selected] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    flops: tuple[int, ...] = ()
    out_ownership: Ownership | None = None
    in_ownership: Ownership | None = None
    selected: Selected = ()
    reason: str = ""
    replay: Replay | None = None
    form: str = "inputs"


@dataclass(frozen=True)
class RuleContext:
    """What rules may look at.

    Attributes:
        world_size: number of ranks.
        placements, values: of everything computed so far.
        weights: the program's weights.
        origins: folded weight -> the model's parameter, whose zeros are the pattern.
        out_ownership: layer -> ownership of its outputs, where somebody has fixed it.
        tolerance: a weight counts as zero up to this.
        dense_exchange: take no notice of zeros: every channel is needed everywhere.
        chosen: layer's value -> ownership of its outputs, where what follows asks for one, or other
            ranks do for an order.
        shares: how much each rank is to compute; equal shares if None.
        example_sizes: symbols of image sizes and their values in the example.
        wire_dtype: that payloads are to travel in where that is fewer bytes; None for their own.
        survivable: whether any ranks can answer over all outputs.
        known_columns: what `used_columns` has found so far, which may be shared by contexts of the
            same weights and tolerance.
    """

    world_size: int
    placements: Mapping[str, Placement]
    values: Mapping[str, ValueInfo]
    weights: Mapping[str, Tensor]
    origins: Mapping[str, str] = field(default_factory=dict)
    out_ownership: Mapping[str, Ownership] = field(default_factory=dict)
    tolerance: float = 0.0
    dense_exchange: bool = False
    chosen: Mapping[str, Ownership] = field(default_factory=dict)
    shares: Shares | None = None
    example_sizes: Mapping[str, int] = field(default_factory=dict)
    wire_dtype: str | None = None
    survivable: bool = False
    known_columns: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def share_out(self, value: str, num_channels: int) -> Ownership:
        """So many channels in contiguous runs, in the ranks' shares of the layer of this value."""
        return share_out(num_channels, self.weights_of_ranks(value))

    def weights_of_ranks(self, value: str) -> tuple[float, ...]:
        """The ranks' shares of the layer that computes this value, in proportion."""
        return (self.shares or Shares.equal(self.world_size)).of(value)

    def sharded(self, arg: Arg) -> Sharded | None:
        """The placement of a value if it is sharded; None for replicated ones, weights, numbers."""
        placement = self.placements[arg.name] if isinstance(arg, Ref) else None
        return placement if isinstance(placement, Sharded) else None

    def shape(self, arg: Arg) -> tuple[int | str, ...]:
        """Symbolic shape of a value or weight; () for numbers."""
        if isinstance(arg, Ref):
            return self.values[arg.name].shape
        return tuple(self.weights[arg.name].shape) if isinstance(arg, WeightRef) else ()

    def sizes(self, name: str, batch: int = 1) -> tuple[int, ...]:
        """Shape of a value for so many images of the example's size."""
        shape = self.values[name].shape
        sizes = {**dict.fromkeys(symbols_of(shape), batch), **self.example_sizes}
        return tuple(evaluate_dim(dim, sizes) for dim in shape)

    def layer_of(self, op: Op) -> str:
        """The model's layer behind an op: where its first weight lives; else the op's own name."""
        for name in op.weight_refs():
            return self.origins.get(name, name).rpartition(".")[0] or self.origins.get(name, name)
        return op.name

    def pattern_weight(self, weight: WeightRef) -> Tensor:
        """The unfolded parameter behind a weight: folding scales rows, so tolerances hold here."""
        return self.weights[self.origins.get(weight.name, weight.name)]

    def selected(self, weight: WeightRef, out: Ownership, inputs: Ownership) -> Selected:
        """The channels that `weight` needs across ranks."""
        check_ownership(self.pattern_weight(weight), out, inputs)
        return selected_by(self.used_columns(weight), out, inputs)

    def used_columns(self, weight: WeightRef) -> Tensor:
        """Which inputs each output reads by the zeros of `weight`: bool ``[O, I]``."""
        if weight.name not in self.known_columns:
            found = used_columns(self.pattern_weight(weight), self.tolerance)
            self.known_columns[weight.name] = found
        return self.known_columns[weight.name]


Rule = Callable[[Op, RuleContext], Lowering | None]

_rules: dict[str, Rule] = {}


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of these op kinds. The last registration of a kind wins."""

    def register(function: Rule) -> Rule:
        _rules.update(dict.fromkeys(kinds, function))
        return function

    return register


def lower(op: Op, context: RuleContext) -> Lowering:
    """How `op` runs: by its rule, else with gathered inputs on every rank."""
    inputs = [name for name in dict.fromkeys(op.refs()) if context.sharded(Ref(name))]
    found = _rules.get(op.kind)
    if found is not None and (inputs or op.kind in _SPLITTING):
        lowering = found(op, context)
        if lowering is not None:
            return lowering
    reason = ""
    if inputs:
        reason = "no rule for this op" if found is None else "no rule for this case"
    return Lowering(Replicated(), _emit_whole, whole=tuple(inputs), reason=reason)


def same_op(placement: Placement) -> Lowering:
    """The same op on each rank's own part of every input."""
    return Lowering(placement, _emit_local)


def per_channel(placement: Placement) -> Lowering:
    """The same op on each rank's own part, and on any other channels of its first argument."""
    return Lowering(placement, _emit_local, replay=_replay_same)


def missing(
    operands: Iterable[tuple[Arg, Sharded | None]], context: RuleContext
) -> tuple[dict[str, Selected], tuple[str, ...]]:
    """What ranks need of others to have operands as an op wants them (None: whole): `reshare` and
    `whole` of its lowering, for `RankBuilder.part`."""
    reshare: dict[str, Selected] = {}
    whole: list[str] = []
    for arg, wanted in operands:
        placed = context.sharded(arg)
        if not isinstance(arg, Ref) or placed is None or placed == wanted:
            continue
        if wanted is None or wanted.dim != placed.dim:
            whole.append(arg.name)
        else:
            reshare[arg.name] = to_reshare(placed.ownership, wanted.ownership)
    return reshare, tuple(whole)


def _replay_same(
    op: Op, rank: RankBuilder, piece: Ref, channels: tuple[int, ...], name: str
) -> None:
    local = op.replace_leaves(rank.localise)
    rank.add(Op(op.kind, name, (piece, *local.args[1:]), local.kwargs))


def _emit_local(op: Op, rank: RankBuilder) -> None:
    rank.add(op.replace_leaves(rank.localise))


def _emit_whole(op: Op, rank: RankBuilder) -> None:
    rank.add(op.replace_leaves(rank.globalise))


# Ops that shard their result even if every input is replicated.
_SPLITTING = frozenset({"disco.conv2d", "disco.linear", "disco.part_of_layer"})
