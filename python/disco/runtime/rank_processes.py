"""All ranks of a partitioned model as processes on this machine, used from one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from disco.errors import InputError
from disco.executor.timeline import Timeline
from disco.partition.shards import load_manifest
from disco.runtime.accounts import Account, RankReport, reports
from disco.runtime.children import ChildSpec, WorkerError
from disco.runtime.devices import devices_of_ranks, silence_of
from disco.runtime.launched import Launched
from disco.runtime.memory_check import check_all_fit
from disco.runtime.messages import Message, load_tensors, unflatten
from disco.runtime.rank_streams import ProcessRanks
from disco.runtime.streams import Item, check_in_flight, check_nccl_stream, run_in_order
from disco.runtime.survival import (
    check_in_cpu_memory,
    check_on_peer_loss,
    check_streams,
    check_survivable,
)
from disco.runtime.token import make_token
from disco.runtime.transports import LOOPBACK, TOKEN_FILE, choose_carrier, choose_transport

PathLike = str | os.PathLike[str]


class Hosts(Protocol):
    """Where ranks run, if not simply here: `disco.bench.lab` has some."""

    def address(self, rank: int) -> str:
        """Where a rank listens."""

    def popen(self, rank: int, command: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        """Start a process there; arguments as of `subprocess.Popen`."""


@dataclass(frozen=True)
class RunResult:
    """One pass over all ranks.

    Attributes:
        outputs: per rank what the model returned there; every rank has the whole output.
        bytes_sent, bytes_received: per rank the payload bytes that its transport handed over.
        lost: ranks whose channels are missing in the outputs, which are exact if there are none. Of
            them outputs are None and bytes 0, and there are no accounts then.
        retries: how often the pass was begun again because a rank was lost.
        latency_ms: of the slowest rank, from its inputs to its outputs. In a stream the request
            stood behind others meanwhile.
        ranks: per rank where its time went.
        timelines: per rank step by step, if that was asked for; on one clock.
        clock_error_ns: per rank, how far its times may be off the leader's.
        begin_ns, end_ns: of a request in a stream: when the first rank began and the last one had
            its outputs, on the timelines' clock.
    """

    outputs: tuple[Any, ...]
    bytes_sent: tuple[int, ...]
    bytes_received: tuple[int, ...]
    latency_ms: float
    lost: tuple[int, ...] = ()
    retries: int = 0
    ranks: tuple[RankReport, ...] = ()
    timelines: tuple[Timeline, ...] = ()
    clock_error_ns: tuple[int, ...] = ()
    begin_ns: int = 0
    end_ns: int = 0

    @property
    def answer(self) -> Any:
        """The outputs of the first rank of which there are some; all ranks have the same."""
        return next(outputs for outputs in self.outputs if outputs is not None)


class RankProcesses(Launched):
    """Start one process per rank of the plan in `directory`; use as a context manager.

    Each process loads its own shard and no other, and they exchange payloads over loopback. They
    end with the block, with an exception in it, and when this process dies.

    Args:
        directory: with manifest.json and the shards; or one such directory per rank.
        nodes: must be the plan's number of ranks if given.
        threads: per rank; None shares this process's cores out evenly.
        timeout_s: for every wait on a peer that is alive.
        transport: "tcp", "torch" (gloo, or NCCL where each rank has a GPU of its own), or "auto",
            which is NCCL there and tcp otherwise.
        silence_s: over tcp, a peer that is waited for and silent for so long is lost; None for 2 s,
            and 30 s on GPUs, whose kernels are compiled at a shape's first request.
        hosts: starts the ranks; None for simply here, over loopback.
        overlap, winograd: as for `disco.executor.Executor`.
        on_peer_loss: "fail" ends all ranks when one is lost; "degrade" (over tcp, with a survivable
            plan) begins the pass again with those that are left (`RunResult.lost`), and `restart`
            brings a lost one back.
        device: where ranks compute: "cpu"; "cuda", on which rank r takes GPU r modulo their number;
            or one GPU for all, "cuda:N". Inputs and outputs are in CPU memory all the same.

    Attributes:
        carrier: how payloads travel, and why so.
        lost: the ranks that passes do without now.

    Raises:
        InputError: `nodes` is not the plan's, a shard is damaged or of another plan, the ranks do
            not fit into memory together.
        WorkerError: (on entering or running) a rank failed or died.
    """

    def __init__(
        self,
        directory: PathLike | Sequence[PathLike],
        *,
        nodes: int | None = None,
        threads: int | None = None,
        timeout_s: float = 30.0,
        transport: str = "auto",
        silence_s: float | None = None,
        hosts: Hosts | None = None,
        overlap: bool = True,
        winograd: str = "off",
        on_peer_loss: str = "fail",
        device: str = "cpu",
    ) -> None:
        super().__init__(timeout_s)
        check_on_peer_loss(on_peer_loss)
        check_in_cpu_memory(on_peer_loss, device)
        self.on_peer_loss = on_peer_loss
        self.lost: set[int] = set()
        self._request = 0
        choose_transport(transport)  # refuses what cannot be, before anything is read
        self._hosts = hosts
        self._overlap = overlap
        self._winograd = winograd
        given = [directory] if isinstance(directory, (str, os.PathLike)) else list(directory)
        self.manifest = load_manifest(given[0])
        self.world_size = self.manifest.plan.world_size
        self.devices = devices_of_ranks(device, self.world_size)
        self.silence_s = silence_of(silence_s, self.devices)
        self.carrier = choose_carrier(transport, self.devices)
        self.transport = self.carrier.transport
        if on_peer_loss == "degrade":
            check_survivable(self.manifest.plan, self.transport)
        if nodes is not None and nodes != self.world_size:
            raise InputError(
                f"{nodes} nodes were asked for, and the plan in {os.fspath(given[0])} is for "
                f"{self.world_size}: give that number, or partition the model for {nodes}"
            )
        self._directories = given * self.world_size if len(given) == 1 else given
        if len(self._directories) != self.world_size:
            raise InputError(
                f"{len(given)} directories were given for a plan of {self.world_size} ranks: "
                "give one, or one per rank"
            )
        self.threads = threads or max(1, available_cores() // self.world_size)

    def run(self, *args: Any, **kwargs: Any) -> RunResult:
        """One pass over all ranks; every rank is given the same inputs, those of the model.

        Raises:
            InputError: the model does not take these inputs; others may follow.
            WorkerError: a rank failed, or (where losses are survived) no rank is left; the
                processes have to be started again.
        """
        retries = 0
        replies = self._replies(args, kwargs)
        while replies is None:
            retries += 1
            replies = self._replies(args, kwargs)
        refused = [str(r["refused"]) for r in replies.values() if "refused" in r]
        if refused:
            raise InputError(refused[0])
        there = [replies.get(rank) for rank in range(self.world_size)]
        return RunResult(
            outputs=tuple(
                r and unflatten(r["structure"], load_tensors(r["outputs"])) for r in there
            ),
            bytes_sent=tuple(r["bytes_sent"] if r else 0 for r in there),
            bytes_received=tuple(r["bytes_received"] if r else 0 for r in there),
            latency_ms=max(r["latency_ms"] for r in replies.values()),
            ranks=_accounts([replies[r] for r in sorted(replies)]) if not self.lost else (),
            lost=tuple(sorted(self.lost)),
            retries=retries,
        )

    def restart(self, rank: int) -> None:
        """Start a lost rank's process again; it takes part from the next pass on.

        Raises:
            InputError: the rank is not lost, or its shard cannot be used.
            WorkerError: it failed; so has everything.
        """
        if rank not in self.lost:
            raise InputError(f"rank {rank} was to be started again, and is not lost")
        assert self._children is not None
        rejoin = {"command": "rejoin", "ranks": [rank]}
        with self._failing():
            self._children.restart(rank, rejoin, members=self._left())
        self.lost.discard(rank)

    def _replies(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int, Message] | None:
        """By rank; None if one was lost, and the pass has to begin again."""
        if self.on_peer_loss == "fail":
            return dict(enumerate(self._ask(args, {"command": "run"}, 1, kwargs)))
        assert self._children is not None
        command = self._with_inputs(args, {"command": "run"}, kwargs)
        with self._failing():
            replies, gone = self._children.ask_those_left(
                self._numbered(command, 1), self._left(), timeout_s=2 * self.timeout_s
            )
            self.lost |= gone
            if not self._left():
                raise WorkerError("no rank is left")
        return None if gone else replies

    def _left(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank not in self.lost]

    def _numbered(self, command: Message, passes: int) -> Message:
        """For ranks that survive losses: the first request's number, and who is lost."""
        if self.on_peer_loss == "fail":
            return command
        first = self._request
        self._request += passes
        return {**command, "request": first, "lost": sorted(self.lost)}

    def run_stream(
        self, inputs: Iterable[Item], in_flight: int = 1, *, profile: bool = False
    ) -> Iterator[RunResult | InputError]:
        """Passes over all ranks for a stream of inputs, `in_flight` of them under way at a time.

        While one waits for payloads another computes. Outputs are those of `run`, bit for bit.

        Args:
            inputs: per pass a tensor, if that is all the model takes, or a
                `disco.runtime.streams.Call`. An InputError among them is handed through.
            in_flight: 1 to 16; each has memory of its own on every rank.
            profile: give results their `timelines`.

        Returns:
            one result for each of the inputs, in their order; where the model does not take an
            input, the InputError that says so stands in its place, and the rest go on. Closing the
            iterator ends the stream; nothing else can be asked of the ranks before.

        Raises:
            InputError: `in_flight` cannot be, or lost ranks are to be survived, which streams do
                not.
            WorkerError: a rank failed; the processes have to be started again.
        """
        check_streams(self.on_peer_loss)
        assert self._children is not None and self._folder is not None, "use it in a with block"
        check_in_flight(in_flight)
        check_nccl_stream(in_flight, self.carrier.nccl)
        self._check_usable()
        children = self._children
        ranks = ProcessRanks(
            children,
            self._folder.name,
            {"in_flight": in_flight, "spans": profile},
            self.timeout_s * (in_flight + 1),
            partial(_result, profile=profile),
            self._fail,
            lambda: self._children is children and self._failure is None,
        )
        self._stream = run_in_order(inputs, ranks, in_flight)
        return self._stream

    def _fail(self, why: str) -> None:
        self._failure = why

    def measure_stream(
        self, *inputs: Any, in_flight: int, warmup: int, repeats: int
    ) -> tuple[float, ...]:
        """Seconds that each rank took for `repeats` passes, `in_flight` of them at a time.

        Args:
            inputs: of every pass.
            in_flight: at least 1.
            warmup, repeats: untimed passes before, and timed ones.
        """
        check_nccl_stream(in_flight, self.carrier.nccl)
        command = {"in_flight": in_flight, "warmup": warmup, "repeats": repeats}
        replies = self._ask(inputs, {"command": "stream", **command}, warmup + repeats)
        return tuple(reply["seconds"] for reply in replies)

    def memory_growth(self) -> tuple[int, ...]:
        """Bytes of resident memory that each rank's process has gained since it had imported all
        that it runs: its shard, packed weights, activations and messages."""
        replies = self._ask((), {"command": "memory"}, 1)
        return tuple(1024 * (reply["now_kb"] - reply["imported_kb"]) for reply in replies)

    def profile(self, *inputs: Any, warmup: int = 3) -> list[Timeline]:
        """Per rank where the time of one pass went. All clocks are this machine's one."""
        replies = self._ask(inputs, {"command": "profile", "warmup": warmup}, warmup + 1)
        return [Timeline.from_plain(reply) for reply in replies]

    def specs(self, folder: str) -> list[ChildSpec]:
        """One worker a rank."""
        # On GPUs each rank looks for itself, at its own GPU's memory.
        if self._hosts is None and all(device.type == "cpu" for device in self.devices):
            check_all_fit(self.manifest)
        make_token(os.path.join(folder, TOKEN_FILE))
        return [self._spec(rank, folder) for rank in range(self.world_size)]

    def _spec(self, rank: int, folder: str) -> ChildSpec:
        args = {
            "--directory": str(Path(self._directories[rank]).absolute()),
            "--rank": str(rank),
            "--world-size": str(self.world_size),
            "--folder": folder,
            "--transport": self.transport,
            "--device": str(self.devices[rank]),
            "--host": LOOPBACK if self._hosts is None else self._hosts.address(rank),
            "--silence-s": str(self.silence_s),
            "--threads": str(self.threads),
            "--timeout-s": str(self.timeout_s),
            "--winograd": self._winograd,
        }
        flat = tuple(word for pair in args.items() for word in pair)
        flat = (*flat, "--overlap" if self._overlap else "--no-overlap")
        if self.on_peer_loss == "degrade":
            flat = (*flat, "--degrade")
        if self.carrier.nccl:
            flat = (*flat, "--nccl")
        spec = ChildSpec(f"rank {rank}", "disco.runtime.worker", flat, self.threads)
        return (
            spec if self._hosts is None else replace(spec, popen=partial(self._hosts.popen, rank))
        )


def _result(replies: Sequence[Message], profile: bool) -> RunResult:
    """Of one request of a stream. All clocks are this machine's one."""
    accounts = [Account.from_plain(reply["account"]) for reply in replies]
    found = reports(accounts)
    return RunResult(
        outputs=tuple(unflatten(r["structure"], load_tensors(r["outputs"])) for r in replies),
        bytes_sent=tuple(rank.bytes_sent for rank in found),
        bytes_received=tuple(rank.bytes_received for rank in found),
        latency_ms=max(rank.latency_ms for rank in found),
        ranks=found,
        timelines=tuple(account.timeline for account in accounts) if profile else (),
        clock_error_ns=(0,) * len(found),
        begin_ns=min(account.begin_ns for account in accounts),
        end_ns=max(account.end_ns for account in accounts),
    )


def _accounts(replies: Sequence[Message]) -> tuple[RankReport, ...]:
    return reports([Account.from_plain(reply["account"]) for reply in replies])


def available_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
