"""Clusters: what they say of nodes, their file, and one line for whatever is wrong with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from disco import Cluster, InputError, Link, Node
from disco.partition.cluster_file import parse_bytes

FILE = """
nodes:
  - name: left
    speed_gflops: 12
    memory: 2 GiB
    link: {bandwidth_mbit_s: 100, latency_ms: 0.4}
  - name: right
    speed_gflops: 6.5
    memory: 512MB
"""


def test_a_number_is_so_many_equal_nodes() -> None:
    cluster = Cluster(3)
    assert [node.name for node in cluster.nodes] == ["node0", "node1", "node2"]
    assert cluster.speeds == (1.0, 1.0, 1.0) and not cluster.speeds_known
    assert all(n.memory_bytes is None and n.link == Link() for n in cluster.nodes)
    assert Cluster(nodes=3) == Cluster.of(3) == Cluster.of(cluster)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cluster.nodes = ()  # type: ignore[misc]


def test_the_fastest_nodes_in_their_order() -> None:
    cluster = Cluster([Node(name, speed) for name, speed in (("a", 1.0), ("b", 3.0), ("c", 3.0))])
    names = [[node.name for node in cluster.fastest(count).nodes] for count in (1, 2, 3)]
    assert names == [["b"], ["b", "c"], ["a", "b", "c"]]


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(FILE)
    left, right = Cluster.from_yaml(path).nodes
    assert left == Node("left", 12, 2 << 30, Link(100, 0.4))
    assert right == Node("right", 6.5, 512_000_000)
    path.write_text("nodes: 4")
    assert Cluster.from_yaml(path) == Cluster(4)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("512MB", 512_000_000),
        ("2 GiB", 2 << 30),
        ("1.5 gb", 1_500_000_000),
        ("3 kib", 3072),
    ],
)
def test_amounts_of_memory(text: str | int, number: int) -> None:
    assert parse_bytes(text) == number


NAN, INF = float("nan"), float("inf")
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no node": (lambda: Cluster([]), "cluster is empty"),
    "0 nodes": (lambda: Cluster(0), "whole number, 1 or more, .* given 0"),
    "no number": (lambda: Cluster("3"), "given '3'"),  # type: ignore[arg-type]
    "a truth": (lambda: Cluster(True), "given True"),
    "no memory": (lambda: Node("a", memory_bytes=0), "'a': memory_bytes must be more than 0"),
    "negative memory": (lambda: Node("a", memory_bytes=-5), "more than 0, given -5"),
    "memory in parts": (lambda: Node("a", memory_bytes=1.5), "whole number"),  # type: ignore[arg-type]
    "infinite memory": (lambda: Node("a", memory_bytes=INF), "given inf"),  # type: ignore[arg-type]
    "no speed": (lambda: Node("a", 0.0), "'a': speed_gflops must be more than 0, given 0.0"),
    "NaN": (lambda: Node("a", NAN), "given nan"),
    "infinite speed": (lambda: Node("a", INF), "given inf"),
    "a text for a speed": (lambda: Node("a", "fast"), "given 'fast'"),  # type: ignore[arg-type]
    "bandwidth": (lambda: Link(0.0), "bandwidth_mbit_s must be more than 0"),
    "latency": (lambda: Link(1.0, -1.0), "latency_ms must be 0 or more, given -1.0"),
    "no name": (lambda: Node(" "), "needs a name"),
    "two of one name": (lambda: Cluster([Node("a"), Node("a")]), "2 nodes are called 'a'"),
    "one speed": (lambda: Cluster([Node("a", 1.0), Node("b")]), "'b' has no speed_gflops and oth"),
    "no nodes": (lambda: Cluster([1, 2]), "nodes are disco.Node, given int"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("what", BAD)
def test_one_line_for_a_bad_cluster(what: str) -> None:
    make, message = BAD[what]
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "empty": ("", "the file must have nodes; given None"),
    "a list": ("- a", "must have nodes"),
    "no nodes": ("nodes: []", "cluster is empty"),
    "a word for nodes": ("nodes: many", "nodes must be a list of nodes or their number"),
    "unknown key": ("nodes: 2\nspeed: 1", "the file has 'speed', which is not known: use nodes"),
    "unknown key of a node": ("nodes: [{name: a, ram: 1}]", "node 0 has 'ram', .* use name, speed"),
    "unknown key of a link": (
        "nodes: [{name: a, link: {mbit: 1}}]",
        "link of node 'a' has 'mbit', .* use bandwidth_mbit_s, latency_ms",
    ),
    "no name": ("nodes: [{speed_gflops: 1}]", "node 0 has no name"),
    "no memory": ("nodes: [{name: a, memory: 0MB}]", "'a': memory_bytes must be more than 0"),
    "memory": ("nodes: [{name: a, memory: much}]", 'like "512MB"'),
    "unit": ("nodes: [{name: a, memory: 5 TB}]", "units B, KB, MB"),
    "NaN": ("nodes: [{name: a, speed_gflops: .nan}]", "given nan"),
    "twice": ("nodes: [{name: a}, {name: a}]", "2 nodes are called 'a'"),
    "no YAML": ("nodes: [", "is not YAML"),
    "code": ("nodes: !!python/object/apply:os.getcwd []", "is not YAML: could not determine"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_one_line_for_a_bad_file(what: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[what]
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        Cluster.from_yaml(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InputError, match="cluster file .* cannot be read"):
            Cluster.from_yaml(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match="cannot be read"):
        Cluster.from_yaml(tmp_path / "binary")
