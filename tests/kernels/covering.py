"""Covering arrays: few cases that hold every pair of values of every two axes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
# Whether two values of two axes may meet; given the axes' names.
Allowed = Callable[[str, Any, str, Any], bool]
_Pair = tuple[str, int, str, int]


def _everything(first: str, a: Any, second: str, b: Any) -> bool:
    return True


def possible_pairs(axes: Mapping[str, Sequence[Any]], allowed: Allowed = _everything) -> set[_Pair]:
    """Every allowed pair as (axis, position, axis, position), axes in their given order."""
    return {
        (first, i, second, j)
        for first, second in itertools.combinations(axes, 2)
        for i, a in enumerate(axes[first])
        for j, b in enumerate(axes[second])
        if allowed(first, a, second, b)
    }


def pairwise(
    axes: Mapping[str, Sequence[Any]], allowed: Allowed = _everything, seed: int = 0
) -> list[Case]:
    """Cases in which every allowed pair of values occurs, found greedily (as AETG does).

    Every value of an axis must be allowed with at least one value of each other axis, and what is
    forbidden must leave a way out once two axes are fixed.

    Returns:
        One dict a case, axis name to value. The same for the same arguments.
    """
    rng = random.Random(seed)
    missing = possible_pairs(axes, allowed)
    order = sorted(missing, key=repr)
    rng.shuffle(order)
    cases: list[Case] = []
    for pair in order:
        if pair not in missing:
            continue
        first, i, second, j = pair
        chosen = {first: i, second: j}
        rest = [name for name in axes if name not in chosen]
        rng.shuffle(rest)
        for name in rest:
            chosen[name] = _best(axes, chosen, name, missing, allowed, rng)
        missing -= _pairs_of(axes, chosen)
        cases.append({name: axes[name][chosen[name]] for name in axes})
    return cases


def covered_pairs(axes: Mapping[str, Sequence[Any]], cases: Sequence[Case]) -> set[_Pair]:
    """The pairs that occur in ``cases``: what a test counts."""
    found: set[_Pair] = set()
    for case in cases:
        found |= _pairs_of(axes, {name: list(axes[name]).index(case[name]) for name in axes})
    return found


def _best(
    axes: Mapping[str, Sequence[Any]],
    chosen: Mapping[str, int],
    name: str,
    missing: set[_Pair],
    allowed: Allowed,
    rng: random.Random,
) -> int:
    """The value of ``name`` that covers most of what is missing beside what is chosen."""
    order = {axis: place for place, axis in enumerate(axes)}
    best: list[int] = []
    most = -1
    for k in range(len(axes[name])):
        gain = 0
        for other, i in chosen.items():
            before = order[other] < order[name]
            left, right = ((other, i), (name, k)) if before else ((name, k), (other, i))
            if not allowed(left[0], axes[left[0]][left[1]], right[0], axes[right[0]][right[1]]):
                break
            gain += (*left, *right) in missing
        else:
            if gain > most:
                best, most = [], gain
            if gain == most:
                best.append(k)
    if not best:
        raise ValueError(f"no value of {name!r} is allowed with {dict(chosen)}")
    return rng.choice(best)


def _pairs_of(axes: Mapping[str, Sequence[Any]], chosen: Mapping[str, int]) -> set[_Pair]:
    return {(a, chosen[a], b, chosen[b]) for a, b in itertools.combinations(axes, 2)}
