"""Which cores a node's processes are pinned to."""

from __future__ import annotations

import os
from collections.abc import Sequence

from disco.errors import InputError


def parse_cores(text: str) -> list[list[int]]:
    """Cores of each node: `0,1` is one a node, `0-3,4-7` four a node.

    Raises:
        InputError: it is no such list.
    """
    nodes = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(
                f"cores are numbers or ranges, one a node, for example 0,1 or 0-3,4-7, not {text!r}"
            )
        nodes.append(list(range(int(first), int(last if dash else first) + 1)))
        if not nodes[-1]:
            raise InputError(
                f"the range of cores {part.strip()} is empty: give the lower one first"
            )
    return nodes


def choose_cores(nodes: int, cores: Sequence[Sequence[int]] | None) -> tuple[list[list[int]], str]:
    """Cores of each node, and a line that says so.

    Args:
        cores: as given; None for one a node where this process may use enough of them, and none
            (no pinning) otherwise.

    Raises:
        InputError: cores for another number of nodes, or ones that this process may not use.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if cores is None:
        if len(allowed) < nodes:
            return [[] for _ in range(nodes)], (
                f"{nodes} nodes share {len(allowed)} cores, not pinned: "
                "times contain waiting for each other"
            )
        chosen = [[core] for core in allowed[:nodes]]
    else:
        chosen = [list(node) for node in cores]
    if len(chosen) != nodes:
        raise InputError(
            f"cores for {len(chosen)} nodes, but there are {nodes}: give one part a node"
        )
    unknown = sorted({core for node in chosen for core in node} - set(allowed))
    if unknown or not all(chosen):
        raise InputError(
            f"core {unknown[0]} is not one that this process may use: {allowed}"
            if unknown
            else f"a node without cores: give each one or more of {allowed}"
        )
    shared = sorted({c for i, a in enumerate(chosen) for b in chosen[i + 1 :] for c in a if c in b})
    note = "; ".join(f"node {rank}: {_words(node)}" for rank, node in enumerate(chosen))
    return chosen, note + (
        f" (core {shared[0]} is shared: times contain waiting for each other)" if shared else ""
    )


def _words(cores: Sequence[int]) -> str:
    return f"core{'s' if len(cores) > 1 else ''} {','.join(map(str, cores))}"
