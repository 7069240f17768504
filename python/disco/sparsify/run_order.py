"""The static gather on one machine: channels in an order in which what a node reads are runs.

A layer that skips zeros reads the channels that have weights. Which they are, training decided;
where they lie, nobody did: within a node's share the outputs of a layer can be in any order, if
everything that is tied to them follows. Channels that the same nodes read are put side by side, so
that a GPU loads whole vectors of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from disco.capture import capture_once
from disco.errors import InputError
from disco.partition import Decisions, decide
from disco.partition.channel_order import orders_to_try
from disco.partition.one_machine import SkippingLayer, skipping_layers
from disco.partition.planner import dense_flops
from disco.partition.read_groups import ChannelsRead
from disco.program import Op
from disco.sparsify.assignment import ranks_of_places
from disco.sparsify.find_groups import tensors_of
from disco.sparsify.lost_score import ranks_of
from disco.sparsify.permute import Axis, Permutable, permutable_in, permute_
from disco.sparsify.permute.axes import Indices
from disco.sparsify.settings import check_group_size

_NOTHING = ChannelsRead()


@dataclass(frozen=True)
class OrderReport:
    """What a new order of channels did.

    Attributes:
        group_size: channels that are read at once.
        before, after: what all layers that skip zeros would read in such groups. Those of which
            next to nothing is left to skip then are dense in `disco.compile`.
        runs_before, runs_after: runs of neighbours among what they select.
        left_alone: by name of the channels why they stayed.
    """

    group_size: int
    before: ChannelsRead
    after: ChannelsRead
    runs_before: int
    runs_after: int
    left_alone: Mapping[str, str]

    def __str__(self) -> str:
        mean = [self.before.selected / max(1, n) for n in (self.runs_before, self.runs_after)]
        return (
            f"density {self.before.density:.3f}; read in groups of {self.group_size} "
            f"{self.before.effective_density:.3f} -> {self.after.effective_density:.3f}; "
            f"mean run {mean[0]:.1f} -> {mean[1]:.1f} channels"
        )


def order_channels_(
    model: nn.Module,
    nodes: int,
    example_inputs: Sequence[Any],
    *,
    group_size: int = 8,
    example_kwargs: Mapping[str, Any] | None = None,
) -> OrderReport:
    """Reorder channels within each node's share, in place, so that what is read are runs.

    For a model with DISCO structure that runs on one machine, before `disco.compile(...,
    read_groups=...)` or `disco_kernels.swap_`: on GPUs, where 16 bytes are loaded at once. The
    function of the model stays the same up to the rounding of sums in another order; shapes, names,
    and who owns what, too. Only what the captured program proves to be permutable moves. A pattern
    that was saved before names channels by their old places: read it from the weights again.

    Args:
        model: parameters and buffers are changed in place; on any device.
        nodes: number of nodes that the weights' zero pattern is for.
        example_inputs, example_kwargs: as for `disco.partition`.
        group_size: neighbours that are read at once, 1, 2, 4 or 8: 16 bytes are 8 numbers of 16
            bits, 4 of float32. Orders are chosen for the least work in such groups.

    Raises:
        InputError: values that are not allowed, a model that cannot be captured, that has no layer
            whose zeros are such a pattern, or that has parameters which it does not read in
            evaluation mode.
    """
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise InputError(f"nodes must be a whole number, 1 or more; given {nodes!r}")
    check_group_size(group_size)
    exported = capture_once(model, example_inputs, example_kwargs=example_kwargs)
    decisions = decide(*exported.folded(), nodes)
    layers = [
        _Layer(layer, _parameter(layer.op, decisions), _work(layer, decisions))
        for layer in skipping_layers(decisions)
    ]
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no layer whose zeros are a pattern of {nodes} nodes: give "
            "it one (disco.sparsify_), or the number of nodes that it was made for"
        )
    permutable = permutable_in(exported.source(), model)
    known = [layer for layer in layers if layer.parameter in permutable.first_name]
    owned = _ownerships(decisions, permutable)
    orders: dict[int, Indices] = {}
    left_alone: dict[str, str] = {}
    for axis in permutable.plain_axes([(layer.parameter, 1) for layer in known]):
        kinds = axis.reason or _kinds(axis, permutable, owned)
        if isinstance(kinds, str):
            left_alone[f"{axis.name} ({axis.size})"] = kinds
        else:
            orders[axis.number] = _best_order(axis, kinds, permutable, known, group_size)
    permute_(tensors_of(model), permutable, orders)
    moved = [_moved(layer, permutable, orders) for layer in layers]
    return OrderReport(
        group_size,
        sum((_read(layer.selected, layer, group_size) for layer in layers), _NOTHING),
        sum(
            (_read(now, layer, group_size) for now, layer in zip(moved, layers, strict=True)),
            _NOTHING,
        ),
        sum(_num_runs(layer.selected) for layer in layers),
        sum(map(_num_runs, moved)),
        left_alone,
    )


@dataclass(frozen=True)
class _Layer:
    """A layer that skips zeros, by the parameter that has them.

    Attributes:
        work: per receiver, of one channel that it reads.
    """

    layer: SkippingLayer
    parameter: str
    work: Sequence[float]

    @cached_property
    def selected(self) -> NDArray[np.bool_]:
        """``[receiver, channel]``: of other nodes, with weights."""
        found = np.zeros((self.layer.inputs.world_size, self.layer.inputs.num_channels), dtype=bool)
        for row, channels in zip(found, self.layer.selected, strict=True):
            row[[c for block in channels for c in block]] = True
        return found

    @cached_property
    def own(self) -> NDArray[np.bool_]:
        """``[receiver, channel]``: which it owns."""
        ranks = ranks_of(self.layer.inputs)
        return np.asarray(ranks == np.arange(self.layer.inputs.world_size)[:, None])


def _parameter(op: Op, decisions: Decisions) -> str:
    """The model's parameter that an op's weight was made of; empty for an op without one."""
    weight = next(op.weight_refs(), "")
    return decisions.context.origins.get(weight, weight)


def _work(layer: SkippingLayer, decisions: Decisions) -> list[float]:
    one = dense_flops(layer.op, decisions.context) / max(
        1, layer.outputs.num_channels * layer.inputs.num_channels
    )
    return [one * count for count in layer.outputs.counts]


def _ownerships(decisions: Decisions, permutable: Permutable) -> list[tuple[str, int, Indices]]:
    """Parameter, dimension and the ranks of its entries, wherever somebody owns them."""
    found = []
    for op, lowering in zip(decisions.program.ops, decisions.lowerings, strict=True):
        parameter = _parameter(op, decisions)
        if parameter in permutable.first_name:
            for dim, owned in enumerate((lowering.out_ownership, lowering.in_ownership)):
                if owned is not None:
                    found.append((parameter, dim, ranks_of(owned)))
    return found


def _kinds(
    axis: Axis, permutable: Permutable, owned: Iterable[tuple[str, int, Indices]]
) -> Indices | str:
    """Per place its kind: places of a kind lie on the same ranks everywhere. Or why that fails."""
    columns = [np.zeros(axis.size, dtype=np.int64)]
    for parameter, dim, ranks in owned:
        places = permutable.axes.places(permutable.axis_of(parameter, dim), axis.number)
        if (places < 0).all():
            continue
        found = ranks_of_places(places, ranks, axis.size)
        if found is None:
            return "each of its places lies on several ranks"
        columns.append(found)
    _, kinds = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    return np.asarray(kinds.reshape(-1))


def _best_order(
    axis: Axis,
    kinds: Indices,
    permutable: Permutable,
    layers: Sequence[_Layer],
    group_size: int,
) -> Indices:
    """Old place by new place: of the orders that are tried, the one with the least work, of equals
    that with the fewest runs."""
    readers = []
    for layer in layers:
        places = permutable.axes.places(permutable.axis_of(layer.parameter, 1), axis.number)
        if (places >= 0).any():
            readers.append((layer, places))
    masks = _masks(readers)

    def work(order: Indices) -> tuple[float, int]:
        total, runs = 0.0, 0
        for layer, _ in readers:
            selected = layer.selected[:, permutable.order(layer.parameter, 1, {axis.number: order})]
            read = _in_groups(selected, layer.own, group_size)
            total += float(read.sum(1) @ np.asarray(layer.work))
            runs += _num_runs(read | layer.own)
        return total, runs

    best = np.arange(axis.size)
    least = work(best)
    for kind in np.unique(kinds):
        positions = np.flatnonzero(kinds == kind)
        tried = orders_to_try(positions.tolist(), masks)
        # Backwards, too: what the next node reads then ends where that node's own channels begin.
        for entries in (*tried, *(order[::-1] for order in tried)):
            order = best.copy()
            order[positions] = entries
            found = work(order)
            if found < least:
                best, least = order, found
    return best


def _masks(readers: Sequence[tuple[_Layer, Indices]]) -> dict[int, int]:
    """Per place along an axis a bit for each distinct selection, the highest where a channel is
    most work."""
    works: dict[frozenset[int], float] = {}
    for layer, places in readers:
        for row, work in zip(layer.selected, layer.work, strict=True):
            entries = frozenset(places[row & (places >= 0)].tolist())
            works[entries] = works.get(entries, 0.0) + work
    masks: dict[int, int] = {}
    for bit, entries in enumerate(sorted(works, key=lambda e: (works[e], sorted(e)))):
        for entry in entries:
            masks[entry] = masks.get(entry, 0) | 1 << bit
    return masks


def _in_groups(
    selected: NDArray[np.bool_], own: NDArray[np.bool_], group_size: int
) -> NDArray[np.bool_]:
    """``[receiver, channel]``: of other nodes, read in whole groups."""
    ranks, channels = selected.shape
    padded = np.zeros((ranks, -(-channels // group_size) * group_size), dtype=bool)
    padded[:, :channels] = selected | own
    groups = padded.reshape(ranks, -1, group_size).any(2)
    return np.asarray(groups.repeat(group_size, axis=1)[:, :channels] & ~own)


def _num_runs(selected: NDArray[np.bool_]) -> int:
    begins = selected.copy()
    begins[:, 1:] &= ~selected[:, :-1]
    return int(begins.sum())


def _moved(
    layer: _Layer, permutable: Permutable, orders: Mapping[int, Indices]
) -> NDArray[np.bool_]:
    if layer.parameter not in permutable.first_name:
        return layer.selected
    return np.asarray(layer.selected[:, permutable.order(layer.parameter, 1, orders)])


def _read(selected: NDArray[np.bool_], layer: _Layer, group_size: int) -> ChannelsRead:
    read = _in_groups(selected, layer.own, group_size)
    return ChannelsRead(int(selected.sum()), int(read.sum()), int((~layer.own).sum()))
