"""The lab's wires: a switch, a cable to each node, a token bucket at both ends of each cable."""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from disco.bench.lab.processes import NETWORK_ONLY, start
from disco.bench.lab.rates import Shape
from disco.bench.lab.requirements import LabUnavailable, find_tool
from disco.errors import InputError

INTERFACE = "eth0"
_SWITCH = "switch"
_FAILED_LINE = re.compile(r"Command failed -:(\d+)")
# RFC 2544 sets this range aside for measuring networks: no host on the internet has it.
_RANGE = ipaddress.ip_network("198.18.0.0/15")
_PREFIX = 24
MAX_NODES = 2 ** (32 - _PREFIX) - 2


@dataclass(frozen=True)
class Tools:
    """Runs `ip` and `tc` in a network namespace.

    Attributes:
        watch_fd: pidfd of the lab.
    """

    watch_fd: int

    def batch(self, tool: str, holder: int, lines: Sequence[str]) -> None:
        """Run lines in one call.

        Raises:
            LabUnavailable: the kernel refuses one; its words are in the message.
        """
        command = [self._path(tool), "-batch", "-"]
        _, problem = self._call(holder, command, "\n".join(lines) + "\n")
        if problem:
            failed = _FAILED_LINE.search(problem)
            line = lines[int(failed[1]) - 1] if failed else lines[0]
            raise LabUnavailable(f"no network lab here: {explain(tool, line, problem)}")

    def ask(self, tool: str, holder: int, *words: str) -> str:
        """Standard output of one call."""
        output, problem = self._call(holder, [self._path(tool), *words], "")
        if problem:
            raise LabUnavailable(f"no network lab here: {explain(tool, ' '.join(words), problem)}")
        return output

    def _call(self, holder: int, command: list[str], text: str) -> tuple[str, str]:
        process = start(
            command,
            self.watch_fd,
            holder=holder,
            kinds=NETWORK_ONLY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        output, errors = process.communicate(text)
        if process.returncode == 0:
            return output, ""
        return output, errors.strip() or f"exit code {process.returncode}"

    @staticmethod
    def _path(tool: str) -> str:
        path = find_tool(tool)
        assert path is not None, "checked by check_requirements"
        return path


def explain(tool: str, line: str, problem: str) -> str:
    """The kernel's refusal with what to do about it, where that is known."""
    words = problem.lower()
    if tool == "tc" and ("qdisc kind is unknown" in words or "not supported" in words):
        kind, purpose = ("netem", "delay") if " netem " in line else ("tbf", "rate")
        return (
            f"the kernel has no {kind} queueing discipline, which a {purpose} needs ({problem}): "
            f"try `modprobe sch_{kind}`, take a kernel that has it, or leave the {purpose} out"
        )
    if tool == "ip" and ("unknown device type" in words or "not supported" in words):
        kind = "bridge" if " bridge " in line else "veth"
        return (
            f"the kernel has no interfaces of type {kind}, which the lab needs ({problem}): try "
            f"`modprobe {kind}`, or take a kernel that has it"
        )
    return f"{tool} failed: {problem}"


def choose_addresses(nodes: int) -> list[str]:
    """Addresses out of a range that is no neighbour of any of this machine's networks.

    The lab is in namespaces of its own, so a clash would break nothing, but a program that picks
    an interface by its address, and a person who reads a log, would be misled.
    """
    path = find_tool("ip")
    assert path is not None
    routes = json.loads(
        subprocess.run([path, "-json", "route"], check=True, capture_output=True).stdout or "[]"
    )
    taken = [
        ipaddress.ip_network(route["dst"], strict=False)
        for route in routes
        if route["dst"] != "default"
    ]
    for network in _RANGE.subnets(new_prefix=_PREFIX):
        if not any(network.overlaps(other) for other in taken):
            return [str(network[rank + 1]) for rank in range(nodes)]
    raise LabUnavailable(f"no network lab here: this machine has routes into all of {_RANGE}")


def connect(tools: Tools, switch: int, nodes: Sequence[int], addresses: Sequence[str]) -> None:
    """Make the switch and a cable to each node.

    IPv6 stays off the cables, because it sends messages of its own.
    """
    quiet = " addrgenmode none" if Path("/proc/sys/net/ipv6").exists() else ""
    lines = [
        f"link add name {_SWITCH} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        f"link set dev {_SWITCH}{quiet} up",
    ]
    for rank, holder in enumerate(nodes):
        lines += [
            f"link add name {port(rank)} type veth peer name {INTERFACE} netns {holder}",
            f"link set dev {port(rank)}{quiet} master {_SWITCH} up",
        ]
    tools.batch("ip", switch, lines)
    for holder, address in zip(nodes, addresses, strict=True):
        tools.batch(
            "ip",
            holder,
            [
                "link set dev lo up",
                *([f"link set dev {INTERFACE}{quiet}"] if quiet else []),
                f"address add {address}/{_PREFIX} dev {INTERFACE}",
                f"link set dev {INTERFACE} up",
            ],
        )


def shape(
    tools: Tools,
    switch: int,
    nodes: Sequence[int],
    new: Sequence[Shape],
    old: Sequence[Shape | None],
) -> None:
    """Give both ends of each node's cable a shape."""
    changed = [rank for rank in range(len(nodes)) if new[rank] != old[rank]]
    ends = [(nodes[rank], [(INTERFACE, rank)]) for rank in changed]
    ends.append((switch, [(port(rank), rank) for rank in changed]))
    for holder, devices in ends:
        offloads = [new[rank].link_line(device) for device, rank in devices]
        qdiscs = [
            line for device, rank in devices for line in new[rank].tc_lines(device, old[rank])
        ]
        if offloads:
            tools.batch("ip", holder, offloads)
        if qdiscs:
            tools.batch("tc", holder, qdiscs)


def set_cable(tools: Tools, switch: int, rank: int, *, up: bool) -> None:
    """Plug or unplug a node's cable at the switch."""
    tools.batch("ip", switch, [f"link set dev {port(rank)} {'up' if up else 'down'}"])


def port(rank: int) -> str:
    """The switch's end of a node's cable."""
    return f"port{rank}"


def check_nodes(nodes: int) -> None:
    """Raises InputError if a lab cannot have so many."""
    if not 1 <= nodes <= MAX_NODES:
        raise InputError(f"a lab has 1 to {MAX_NODES} nodes, not {nodes}")


def environment(rank: int, addresses: Sequence[str], interface: str) -> dict[str, str]:
    """What a process on a node is told."""
    return {
        "DISCO_LAB_RANK": str(rank),
        "DISCO_LAB_NODES": str(len(addresses)),
        "DISCO_LAB_ADDRESSES": ",".join(addresses),
        "DISCO_LAB_INTERFACE": interface,
    }
