"""A convolution or linear whose partial sums travel instead of its inputs.

    y_i = act( W_ii * x_i + sum over j != i of p_ij + bias_i + residual_i ),  p_ij = W_ij * x_j

Rank j computes p_ij of its own inputs, for the rows of W_ij that are not all zero, and rank i adds.
Fewer bytes than sending x_j where a layer has few outputs, small ones, or reads most of its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from disco.partition.placement import Sharded
from disco.partition.rank_builder import RankBuilder
from disco.partition.rules.matrix import matrix_flops
from disco.partition.rules.registry import Lowering, RuleContext
from disco.program import Arg, Op, Ref, ValueInfo, WeightRef
from disco_kernels.pattern import Ownership, Selected

# Stands for a rank's kernels in the program that is planned; no rank's program has it.
PARTIAL_SUMS = "disco.partial_sums"
_RANK_KINDS = {"disco.conv2d": "disco.partial_conv2d", "disco.linear": "disco.partial_linear"}


@dataclass(frozen=True)
class PartialSums:
    """A layer in this form: what every rank computes for the others, then what it adds up.

    Attributes:
        op: the layer.
        lowering: as it is if inputs travel.
        rows: ``rows[i][j]``: outputs of rank i that inputs of rank j reach, in rank i's order.
        columns: per rank the inputs that it multiplies for others, in its own order.
        placement: of the partial sums, numbered through by sender and then receiver.
        selected: ``selected[i][j]``: the partial sums that rank j sends rank i.
    """

    op: Op
    lowering: Lowering
    rows: Selected
    columns: tuple[tuple[int, ...], ...]
    placement: Sharded
    selected: Selected

    @property
    def name(self) -> str:
        """Of the partial sums as a value."""
        return f"{self.op.name}.sums"

    @property
    def num_sent(self) -> int:
        """Partial sums, over all pairs of ranks; each is as large as one output channel."""
        return self.placement.ownership.num_channels

    def value_info(self, context: RuleContext) -> ValueInfo:
        """Shape and dtype of the partial sums."""
        info, dim = context.values[self.op.name], self.placement.dim
        shape = (*info.shape[:dim], self.num_sent, *info.shape[dim + 1 :])
        return ValueInfo(shape, info.dtype)

    def sums_op(self) -> Op:
        """The op that stands for the partial sums in the program that is planned."""
        return Op(PARTIAL_SUMS, self.name, self.op.args[:2])

    def sums_lowering(self, context: RuleContext) -> Lowering:
        """Every rank's partial sums for the others, by one kernel."""
        return Lowering(
            self.placement, lambda _, rank: self._emit_sums(rank, context), form="partial sums"
        )

    def layer_lowering(self, context: RuleContext) -> Lowering:
        """The layer itself: its local block, with all that is added in the kernel's epilogue."""
        inputs, out = self.lowering.in_ownership, self.lowering.out_ownership
        assert inputs is not None and out is not None
        flops = tuple(
            matrix_flops(self.op, context, out.counts[rank], inputs.counts[rank])
            + matrix_flops(
                self.op,
                context,
                self.placement.ownership.counts[rank],
                len(self.columns[rank]),
            )
            for rank in range(context.world_size)
        )
        return replace(
            self.lowering,
            emit=lambda _, rank: self._emit_layer(rank, context),
            select={self.name: self.selected},
            flops=flops,
            selected=self.selected,
            form="partial sums",
        )

    def _emit_sums(self, rank: RankBuilder, context: RuleContext) -> None:
        me = rank.rank
        x, weight = self.op.args[:2]
        inputs = self.lowering.in_ownership
        assert inputs is not None and isinstance(weight, WeightRef)
        columns, owned = self.columns[me], inputs.channels[me]
        blocks = []
        for peer, row in enumerate(self.rows):
            block = rank.source(weight)[list(row[me])][:, list(columns)]
            # Of a column that only others read, this block's entries are as good as zero.
            taken = set(self.lowering.selected[peer][me])
            block[:, [c not in taken for c in columns]] = 0.0
            blocks.append(block)
        place = {channel: i for i, channel in enumerate(owned)}
        index = None
        if columns != owned:
            positions = torch.tensor([place[c] for c in columns], dtype=torch.int32)
            index = rank.store(f"{context.layer_of(self.op)}.sums.index", positions)
        kernel = rank.store(f"{context.layer_of(self.op)}.sums.weight", torch.cat(blocks))
        rank.add(self._kernel(self.name, x, kernel, None, None, len(owned), index, "none"))

    def _emit_layer(self, rank: RankBuilder, context: RuleContext) -> None:
        me = rank.rank
        x, weight, bias, residual = self.op.args
        inputs, out = self.lowering.in_ownership, self.lowering.out_ownership
        assert inputs is not None and out is not None and isinstance(weight, WeightRef)
        layer = context.layer_of(self.op)
        outputs = list(out.channels[me])
        kernel = rank.source(weight)[outputs][:, list(inputs.channels[me])]
        if isinstance(bias, WeightRef):
            bias = rank.store(f"{layer}.bias", rank.source(bias)[outputs])
        added = self._added(rank, layer, residual, out)
        packed = rank.store(f"{layer}.weight", kernel)
        activation = self.op.kwargs["activation"]
        held = inputs.counts[me]
        rank.add(self._kernel(self.op.name, x, packed, bias, added, held, None, activation))

    def _added(self, rank: RankBuilder, layer: str, residual: Arg, out: Ownership) -> Arg:
        """Residual and received partial sums as one value; None if there is nothing to add."""
        dim = self.placement.dim
        base = rank.part(residual, out, dim) if isinstance(residual, Ref) else None
        outputs = out.channels[rank.rank]
        place = {channel: i for i, channel in enumerate(outputs)}
        pieces: list[Arg] = []
        index: list[Arg] = []
        for peer, rows in enumerate(self.rows[rank.rank]):
            if not rows:
                continue
            pieces.append(rank.payload(Ref(self.name), peer))
            if rows == outputs:
                index.append(None)
            else:
                positions = torch.tensor([place[c] for c in rows], dtype=torch.int32)
                index.append(rank.store(f"{layer}.sums.rows.{peer}", positions))
        if not pieces:
            return base
        if base is None and len(pieces) == 1 and index == [None]:
            return pieces[0]
        name = f"{self.op.name}.added"
        attributes: dict[str, Arg] = {"index": tuple(index), "dim": dim, "channels": len(outputs)}
        rank.add(Op("disco.add_partial_sums", name, (base, tuple(pieces)), attributes))
        return Ref(name)

    def _kernel(
        self,
        name: str,
        x: Arg,
        weight: WeightRef,
        bias: Arg,
        residual: Arg,
        held: int,
        index: WeightRef | None,
        activation: Arg,
    ) -> Op:
        attributes = {key: value for key, value in self.op.kwargs.items() if key != "groups"}
        attributes |= {"activation": activation, "channels": (held,), "index": (index,)}
        return Op(_RANK_KINDS[self.op.kind], name, ((x,), weight, bias, residual), attributes)


def as_partial_sums(op: Op, lowering: Lowering, context: RuleContext) -> PartialSums | None:
    """The layer in this form; None for ops that read nothing of other ranks by their weights."""
    inputs, out = lowering.in_ownership, lowering.out_ownership
    if op.kind not in _RANK_KINDS or not lowering.select or inputs is None or out is None:
        return None
    weight, placed = op.args[1], lowering.placement
    assert isinstance(weight, WeightRef) and isinstance(placed, Sharded)
    used = context.used_columns(weight)
    ranks = range(context.world_size)
    rows = tuple(
        tuple(_reached(used, out.channels[i], lowering.selected[i][j]) for j in ranks)
        for i in ranks
    )
    read = [{c for i in ranks for c in lowering.selected[i][j]} for j in ranks]
    columns = tuple(tuple(c for c in inputs.channels[j] if c in read[j]) for j in ranks)
    owned, selected = _numbered(rows)
    placement = Sharded(owned, placed.dim)
    return PartialSums(op, lowering, rows, columns, placement, selected)


def _reached(used: Tensor, outputs: tuple[int, ...], inputs: tuple[int, ...]) -> tuple[int, ...]:
    """The outputs that any of the inputs reaches."""
    if not outputs or not inputs:
        return ()
    reached = used[list(outputs)][:, list(inputs)].any(dim=1).tolist()
    return tuple(channel for channel, hit in zip(outputs, reached, strict=True) if hit)


def _numbered(rows: Selected) -> tuple[Ownership, Selected]:
    """Partial sums numbered through: per sender those that it has, per pair those that it sends."""
    ranks = range(len(rows))
    count = 0
    table: list[list[tuple[int, ...]]] = [[() for _ in ranks] for _ in ranks]
    for sender in ranks:
        for receiver in ranks:
            size = len(rows[receiver][sender])
            table[receiver][sender] = tuple(range(count, count + size))
            count += size
    owned = tuple(tuple(n for row in table for n in row[sender]) for sender in ranks)
    return Ownership(owned), tuple(tuple(row) for row in table)
