"""The lab's stand-in where there can be none: the same processes, without networks of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from disco.bench.lab.cores import choose_cores
from disco.bench.lab.network import check_nodes, environment
from disco.bench.lab.processes import NodeProcess, start
from disco.bench.lab.requirements import check_linux
from disco.errors import InputError


class Loopback:
    """N nodes that are only processes: addresses 127.0.0.1, 127.0.0.2, ... and no rate.

    Use as a context manager. Commands that were started are killed with their process groups when
    the block ends and when this process dies. What left its group, as a daemon does, is not.

    Args:
        nodes: how many.
        cores: as `Lab`'s.

    Raises:
        LabUnavailable: this is no Linux, or one before 5.3.
        InputError: a number that makes no sense.
    """

    def __init__(self, nodes: int, *, cores: Sequence[Sequence[int]] | None = None) -> None:
        check_linux()
        check_nodes(nodes)
        self.nodes = nodes
        self.cores, self.cores_note = choose_cores(nodes, cores)
        self.addresses = [f"127.0.0.{rank + 1}" for rank in range(nodes)]
        self._processes: list[NodeProcess] = []
        self._watch_fd = -1

    def __enter__(self) -> Loopback:
        self._watch_fd = os.pidfd_open(os.getpid())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill_group()
        os.close(self._watch_fd)

    def address(self, rank: int) -> str:
        """IPv4 address of a node."""
        return self.addresses[self._check(rank)]

    def environment(self, rank: int) -> dict[str, str]:
        """What a process on a node is told: variables that start with `DISCO_LAB_`."""
        return environment(self._check(rank), self.addresses, "lo")

    def popen(
        self,
        rank: int,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cores: Sequence[int] | None = None,
        **popen: Any,
    ) -> NodeProcess:
        """Start a command as a node: as `Lab.popen`, without the namespaces."""
        process = start(
            command,
            self._watch_fd,
            cores=self.cores[self._check(rank)] if cores is None else cores,
            env={**os.environ, **self.environment(rank), **(env or {})},
            **popen,
        )
        self._processes.append(process)
        return process

    def _check(self, rank: int) -> int:
        if not 0 <= rank < self.nodes:
            raise InputError(f"no node {rank}: there are 0 to {self.nodes - 1}")
        return rank
