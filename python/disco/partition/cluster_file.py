"""Clusters in YAML.

    nodes:
      - name: left
        speed_gflops: 12
        memory: 2 GiB
        link: {bandwidth_mbit_s: 100, latency_ms: 0.4}
      - name: right
        speed_gflops: 6.5
        memory: 512MB

or ``nodes: 3``. All but the name may be left out; see `disco.partition.cluster.Node`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from disco.errors import InputError
from disco.partition.cluster import Link, Node

_UNITS = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9},
    **{"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30},
}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_NODE_KEYS = ("name", "speed_gflops", "memory", "link")
_LINK_KEYS = ("bandwidth_mbit_s", "latency_ms")


def read_cluster(path: str | os.PathLike[str]) -> int | list[Node]:
    """The nodes in a file, or their number. InputError names the file and what is wrong in it."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the cluster file {os.fspath(path)} cannot be read ({error}): give a YAML file"
        ) from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the cluster file {os.fspath(path)} is not YAML: {reason}") from None
    try:
        nodes = _mapping("the file", content, ("nodes",)).get("nodes")
        if isinstance(nodes, int) and not isinstance(nodes, bool):
            return nodes
        if not isinstance(nodes, list):
            raise InputError(f"nodes must be a list of nodes or their number, given {nodes!r}")
        return [_node(i, item) for i, item in enumerate(nodes)]
    except InputError as error:
        raise InputError(f"the cluster file {os.fspath(path)}: {error}") from None


def parse_bytes(text: str | int) -> int:
    """An amount of memory: "512MB" and "1.5 GB" are decimal, "2 GiB" is binary, 4096 is bytes."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _AMOUNT.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match[2].upper() not in _UNITS:
        raise InputError(
            f'memory must be bytes, or like "512MB" or "2 GiB" (units B, KB, MB, GB, KiB, MiB, '
            f"GiB); given {text!r}"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _node(position: int, item: Any) -> Node:
    fields = _mapping(f"node {position}", item, _NODE_KEYS)
    if "name" not in fields:
        raise InputError(f"node {position} has no name: give it one")
    what = f"the link of node {fields['name']!r}"
    link = _mapping(what, {} if fields.get("link") is None else fields["link"], _LINK_KEYS)
    memory = fields.get("memory")
    return Node(
        name=fields["name"],
        speed_gflops=fields.get("speed_gflops"),
        memory_bytes=None if memory is None else parse_bytes(memory),
        link=Link(**link),
    )


def _mapping(what: str, item: Any, allowed: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise InputError(f"{what} must have {', '.join(allowed)}; given {item!r}")
    for key in item:
        if key not in allowed:
            raise InputError(f"{what} has {key!r}, which is not known: use {', '.join(allowed)}")
    return item
