"""Which channels of a model's exchanged tensors can be left out, and which layers read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disco.capture import Captured, capture
from disco.errors import InputError
from disco.partition import Cluster, Decisions, Problem, shares_for
from disco.partition.exchanges import exchange_plan
from disco.partition.planner import MATRIX_OPS
from disco.program import WeightRef
from disco.sparsify.groups import Group, Reader, groups_of


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that has several names under each."""
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def find_groups(
    model: nn.Module,
    cluster: Cluster,
    density: float,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    ignore_zeros: bool = False,
) -> list[Group]:
    """The layers whose inputs can be exchanged in part, joined where they have to agree.

    Args:
        model: is not changed.
        cluster, density: what the layers' outputs are shared out for.
        example_inputs, example_kwargs: as for `disco.partition`.
        ignore_zeros: take weights for not zero whatever they are: training goes on, and a head that
            begins with zeros will not stay so.

    Raises:
        InputError: the model cannot be captured, or exchanges nothing that could be left out.
    """
    captured = capture(model, example_inputs, example_kwargs=example_kwargs)
    return groups_in(captured, model, cluster, density, ignore_zeros=ignore_zeros)


def groups_in(
    captured: Captured,
    model: nn.Module,
    cluster: Cluster,
    density: float,
    *,
    ignore_zeros: bool = False,
) -> list[Group]:
    """`find_groups` for a model that was captured before.

    Args:
        captured: what `model` was captured as.
        model, cluster, density, ignore_zeros: as for `find_groups`.

    Raises:
        InputError: it exchanges nothing that could be left out.
    """
    if ignore_zeros:
        captured = _without_zeros(captured)
    problem = Problem(*captured, out_ownership={})
    readers = _readers(problem.decide(shares_for(problem, cluster, density)), tensors_of(model))
    groups = groups_of(readers)
    if not groups:
        raise InputError(
            f"{type(model).__name__} has no layer whose inputs could be exchanged in part: "
            f"{len(readers)} layers read exchanged tensors, all of which travel whole"
        )
    return groups


def _without_zeros(captured: Captured) -> Captured:
    """With ones for the layers' weights: only their shapes and zeros matter to a plan."""
    weights = dict(captured.weights)
    for op in captured.program.ops:
        weight = op.args[1] if op.kind in MATRIX_OPS else None
        if isinstance(weight, WeightRef):
            raw = captured.raw_name(weight.name)
            old = weights[raw]
            weights[raw] = torch.ones((), dtype=old.dtype).expand(old.shape)
    return captured._replace(weights=weights)


def _readers(decisions: Decisions, tensors: Mapping[str, Tensor]) -> list[Reader]:
    """The layers that read parts of exchanged tensors, by their parameters.

    Weights that the model computes (standardised ones) have no zeros to make, so their layers need
    everything.
    """
    readers = []
    for op, lowering in zip(decisions.program.ops, decisions.lowerings, strict=True):
        for tensor in lowering.select:
            assert lowering.out_ownership is not None and lowering.in_ownership is not None
            weight = next(op.weight_refs())
            parameter = decisions.context.origins.get(weight, weight)
            exchange = decisions.exchange_of(tensor)
            readers.append(
                Reader(
                    tensor=exchange.value,
                    parameter=parameter,
                    out_ownership=lowering.out_ownership,
                    in_ownership=lowering.in_ownership,
                    gathered=bool(exchange.gathered_by) or parameter not in tensors,
                    bytes_per_channel=exchange_plan(exchange).bytes_per_channel,
                )
            )
    return readers
