"""Nodes on one machine: namespaces, cables with a rate, and processes in them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from disco.bench.lab import network
from disco.bench.lab.calibration import Calibration
from disco.bench.lab.cores import choose_cores
from disco.bench.lab.network import INTERFACE, Tools
from disco.bench.lab.ping_pong import SIZES, calibrate
from disco.bench.lab.processes import NODE, Holder, NodeProcess, start
from disco.bench.lab.rates import Shape, parse_rate, shape_for
from disco.bench.lab.requirements import check_linux, check_requirements
from disco.errors import InputError

Rates = str | Sequence[str]


class Lab:
    """N nodes on one machine, each with an address, a cable of a stated rate, and cores of its own.

    Use as a context manager. When the block ends, and when this process dies in any way, SIGKILL
    included, all processes on the nodes are killed and the kernel removes the rest: nothing has a
    name in the system, so nothing can be left over.

    Args:
        nodes: how many.
        rate: of each cable, both ways, as tc writes it (`100mbit`, `1gbit`) or `none`; one for all
            nodes or one a node. Frames count with their Ethernet headers.
        delay_ms: added to the way from one node to another; needs a kernel with netem.
        cores: cores of each node (`[[0], [1]]`); None for one core a node where there are enough,
            and no pinning otherwise.
        burst_bytes: of the token buckets; None for a size that suits the rate. For trying out what
            a large one hides.

    Raises:
        LabUnavailable: this machine or user cannot have one; the message says what is missing.
        InputError: a number that makes no sense.
    """

    def __init__(
        self,
        nodes: int,
        rate: Rates = "none",
        *,
        delay_ms: float = 0.0,
        cores: Sequence[Sequence[int]] | None = None,
        burst_bytes: int | None = None,
    ) -> None:
        check_linux()
        network.check_nodes(nodes)
        self.nodes = nodes
        self.cores, self.cores_note = choose_cores(nodes, cores)
        # A frame passes two ends, that of its sender's cable and that of its receiver's.
        self._delay_ms, self._burst_bytes = delay_ms / 2, burst_bytes
        self._wanted = self._shapes(rate)
        self._current: list[Shape | None] = [None] * nodes
        self._stack = ExitStack()
        self._holders: list[Holder] = []
        self._owner = 0
        self.addresses: list[str] = []

    def __enter__(self) -> Lab:
        check_requirements()
        self._owner = os.getpid()
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A fork of this process leaves the block, too, but the lab is not its own.
        if os.getpid() == self._owner:
            self._close()

    def _close(self) -> None:
        self._holders = []
        self._current = [None] * self.nodes
        self._stack.close()

    def _open(self) -> None:
        watch_fd = os.pidfd_open(self._owner)
        self._stack.callback(os.close, watch_fd)
        self._tools = Tools(watch_fd)
        self._switch = self._hold(node=False)
        self._holders = [self._hold(node=True) for _ in range(self.nodes)]
        self.addresses = network.choose_addresses(self.nodes)
        network.connect(self._tools, self._switch.pid, self._pids, self.addresses)
        self._apply(self._wanted)

    def _hold(self, *, node: bool) -> Holder:
        holder = Holder(self._tools.watch_fd, node=node)
        self._stack.callback(holder.close)
        return holder

    @property
    def _pids(self) -> list[int]:
        return [holder.pid for holder in self._holders]

    @property
    def shapes(self) -> list[Shape]:
        """What each node's cable lets through now."""
        return list(self._wanted)

    def address(self, rank: int) -> str:
        """IPv4 address of a node."""
        return self.addresses[self._check(rank)]

    def environment(self, rank: int) -> dict[str, str]:
        """What a process on a node is told: variables that start with `DISCO_LAB_`."""
        return network.environment(self._check(rank), self.addresses, INTERFACE)

    def popen(
        self,
        rank: int,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cores: Sequence[int] | None = None,
        **popen: Any,
    ) -> NodeProcess:
        """Start a command on a node.

        Args:
            command: program and arguments; no shell.
            env: variables beside this process's and those of `environment`.
            cores: to pin to instead of the node's own.
            popen: further arguments of `subprocess.Popen`: `stdin`, `stdout`, `stderr`, `text`,
                `cwd`.

        Raises:
            InputError: no such node or program.
            TransportError: the node has ended, because its holder was killed.
        """
        self._check(rank)
        return start(
            command,
            self._tools.watch_fd,
            holder=self._holders[rank].pid,
            kinds=NODE,
            cores=self.cores[rank] if cores is None else cores,
            env={**os.environ, **self.environment(rank), **(env or {})},
            **popen,
        )

    def run(
        self,
        rank: int,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cores: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node to its end; its outputs are kept as text.

        Raises:
            InputError: no such node or program.
            subprocess.TimeoutExpired: it took longer than `timeout_s`, and was killed.
        """
        pipe = subprocess.PIPE
        process = self.popen(
            rank,
            command,
            env=env,
            cores=cores,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        with process:
            try:
                output, errors = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def shape(self, rate: Rates) -> None:
        """Change the rates of a running lab.

        Changed to or from `none`, a cable loses what waits in its queue, and TCP sends it again.
        """
        self._check(0)
        self._apply(self._shapes(rate))

    def calibrate(
        self,
        *,
        sizes: Sequence[int] = SIZES,
        pairs: Iterable[tuple[int, int]] | None = None,
    ) -> Calibration:
        """Measure latency and bandwidth of each directed pair, by TCP messages after a pause.

        Takes some 6 s a pair at 100 Mbit/s. Leave the nodes alone meanwhile.

        Args:
            sizes: of messages, bytes; one of them 64 KB or more. Those that would take longer than
                a second are left out, and named in the result.
            pairs: (source, target) ranks; None for all.

        Raises:
            InputError: no such sizes or pairs.
            TransportError: a node cannot be reached, or the times fit no line.
        """
        return calibrate(self, sizes=sizes, pairs=pairs)

    def cut(self, rank: int) -> None:
        """Unplug a node's cable at the switch: nothing arrives any more, and nobody is told."""
        self._check(rank)
        network.set_cable(self._tools, self._switch.pid, rank, up=False)

    def mend(self, rank: int) -> None:
        """Plug a node's cable in again."""
        self._check(rank)
        network.set_cable(self._tools, self._switch.pid, rank, up=True)

    def _apply(self, shapes: list[Shape]) -> None:
        network.shape(self._tools, self._switch.pid, self._pids, shapes, self._current)
        self._current = list(shapes)
        self._wanted = shapes

    def _shapes(self, rate: Rates) -> list[Shape]:
        rates = [rate] * self.nodes if isinstance(rate, str) else list(rate)
        if len(rates) != self.nodes:
            raise InputError(
                f"{len(rates)} rates for {self.nodes} nodes: give one for all or one a node"
            )
        return [
            shape_for(
                parse_rate(text),
                peers=self.nodes - 1,
                burst_bytes=self._burst_bytes,
                delay_ms=self._delay_ms,
            )
            for text in rates
        ]

    def _check(self, rank: int) -> int:
        if not self._holders:
            raise InputError("the lab is not open: use it as a context manager")
        if not 0 <= rank < self.nodes:
            raise InputError(f"no node {rank}: this lab has 0 to {self.nodes - 1}")
        return rank
