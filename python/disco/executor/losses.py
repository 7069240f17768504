"""Requests without some of the ranks: what they own counts as zero, on every rank that is left.

A payload of a lost rank is zeros, and so is what is computed of such a payload alone (a norm that
is applied to received channels). Norms and means over channels are those of the channels that are
there.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

from torch import Tensor

from disco.executor.steps import (
    REQUEST_SLOT,
    Preparation,
    Step,
    Values,
    bind,
    fetch,
    prepare_pure,
)
from disco.program import Op, Program, Ref, pure_function

# They read payloads of several ranks, or add them to something.
_JOINING = frozenset(
    {
        "aten.cat.default",
        "aten.stack.default",
        "disco.add_partial_sums",
        "disco.assemble",
        "disco.exchange",
        "disco.partial_conv2d",
        "disco.partial_linear",
    }
)
_COUNTED = frozenset({"disco.normalize", "disco.group_normalize", "disco.sum_of_parts"})


def senders_of_values(program: Program) -> dict[str, int]:
    """Per value that is computed of payloads of one rank, and of no other channels, that rank."""
    receive: dict[str, list[int]] = {}
    senders: dict[str, int] = {}
    for op in program.ops:
        source = op.args[0] if op.args else None
        if op.kind == "disco.exchange":
            receive[op.name] = _peers(op)
        elif not isinstance(source, Ref):
            continue
        elif source.name in receive:
            position = op.args[1]
            assert isinstance(position, int)
            senders[op.name] = receive[source.name][position]
        elif source.name in senders and op.kind not in _JOINING:
            senders[op.name] = senders[source.name]
    return senders


def _peers(op: Op) -> list[int]:
    """The sender of each payload of an exchange, by position."""
    listed: Any = op.kwargs["receive"]
    parts = listed if len(op.args) > 1 else (listed,)
    return [peer for part in parts for peer in sorted(peer for peer, _ in part)]


def zero_if_lost(step: Step, sender: int) -> Step:
    """The step, with a result of zeros where `sender` is lost."""
    run = step.run

    def zeroed(values: Values) -> Any:
        value = run(values)
        is_lost = sender in values[REQUEST_SLOT].lost and isinstance(value, Tensor)
        # In place, because kernels may be bound to this memory. Something expanded is zeros
        # already, being a view of them.
        if is_lost and 0 not in value.stride():
            value.zero_()
        return value

    return replace(step, run=zeroed)


def depends_on_counts(op: Op) -> bool:
    """Whether an op is told how many channels each of several ranks has."""
    counts = op.kwargs.get("counts", ())
    return op.kind in _COUNTED and isinstance(counts, tuple) and len(counts) > 1


def prepare_counted(op: Op, prepare: Preparation) -> Step:
    """An op that `depends_on_counts`: those of lost ranks are 0."""
    step, function = prepare_pure(op, prepare), pure_function(op.kind)
    args = tuple(bind(arg, op, prepare) for arg in op.args)
    kwargs = {key: bind(value, op, prepare) for key, value in op.kwargs.items()}
    run_whole, counts = step.run, kwargs["counts"]

    def run(values: Values) -> Any:
        lost = values[REQUEST_SLOT].lost
        if not lost:
            return run_whole(values)
        there = {**kwargs, "counts": _without(counts, lost)}
        return function(
            *[fetch(arg, values) for arg in args],
            **{key: fetch(value, values) for key, value in there.items()},
        )

    return replace(step, run=run)


def _without(counts: Sequence[Any], lost: Set[int]) -> tuple[Any, ...]:
    """`counts` by rank, with those of lost ranks 0."""
    return tuple(_nothing(count) if rank in lost else count for rank, count in enumerate(counts))


def _nothing(count: Any) -> Any:
    return tuple(0 for _ in count) if isinstance(count, tuple) else 0
