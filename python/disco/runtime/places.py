"""This process's place in a cluster that a list of peers, torchrun or MPI makes up."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from disco.errors import InputError
from disco.executor import Transport
from disco.partition.shards import Shard
from disco.runtime.devices import CPU, device_of_rank, identity_of_device, silence_of
from disco.runtime.mpi import MpiTransport, load_mpi, started_by_mpi
from disco.runtime.peers import Peers
from disco.runtime.rendezvous import StoreAddresses, agree, share
from disco.runtime.survival import check_in_cpu_memory, check_on_peer_loss
from disco.runtime.tcp import Meeting, TcpTransport, listen
from disco.runtime.tcp.handshake import check_agreement
from disco.runtime.tcp.tls import Tls
from disco.runtime.token import TOKEN_VARIABLE, read_token
from disco.runtime.transports import (
    NCCL,
    TRANSPORTS,
    Carrier,
    carry_from,
    identity_of,
    over_torch,
    staged_carrier,
    why_no_nccl,
)

MEETING_S = 150.0


@dataclass(frozen=True)
class Place:
    """This process's place in a cluster, and how it reaches the others.

    Attributes:
        rank, world_size: as of the plan.
        launcher: "peers", "torchrun" or "mpi".
        open: connects the transport, given this rank's shard.
        transport: its name.
        encrypted: the ranks use TLS.
        device: where this rank computes.
        carrier: how payloads travel; None for the transport as it is.
    """

    rank: int
    world_size: int
    launcher: str
    transport: str
    open: Callable[[Shard], Transport]
    encrypted: bool = False
    device: torch.device = CPU
    carrier: Carrier | None = None

    @property
    def transport_text(self) -> str:
        """The transport in words."""
        named = self.transport if self.carrier is None else self.carrier.text
        return f"{named} with TLS" if self.encrypted else named


@dataclass(frozen=True)
class Options:
    """How to meet and to wait.

    Attributes:
        transport: one of `TRANSPORTS`.
        token_file: with the shared secret; None for the variable ``DISCO_TOKEN``.
        meeting_s: how long to wait for all ranks, in seconds.
        deadline_s: for every message of a peer that is alive, in seconds.
        silence_s: over tcp: a peer that is waited for and silent for so long is lost; None for 2 s,
            and 30 s where this rank computes on a GPU. Its peers need as much, since kernels of a
            GPU are compiled at a shape's first request.
        tls: over tcp: folder with this rank's certificate and key (`disco keys`), which encrypts
            and authenticates all that ranks send each other; None for all ranks does without.
        on_peer_loss: "fail" ends it all; "degrade" (over tcp, with a survivable plan) lets the
            ranks that are left answer from the channels that they own, and lost ones come back.
        device: where this rank computes: "cpu"; "cuda", on which the ranks of a machine take its
            GPUs in turns; or one GPU, "cuda:N". Ranks need not all have the same.
    """

    transport: str = "auto"
    token_file: str | os.PathLike[str] | None = None
    meeting_s: float = MEETING_S
    deadline_s: float = 30.0
    silence_s: float | None = None
    tls: str | os.PathLike[str] | None = None
    on_peer_loss: str = "fail"
    device: str = "cpu"

    @property
    def degrades(self) -> bool:
        return self.on_peer_loss == "degrade"

    def __post_init__(self) -> None:
        check_on_peer_loss(self.on_peer_loss)
        check_in_cpu_memory(self.on_peer_loss, self.device)
        for name, seconds in (("meeting_s", self.meeting_s), ("deadline_s", self.deadline_s)):
            if not 0 < seconds < math.inf:
                raise InputError(f"{name} must be a number of seconds above 0, given {seconds:g}")
        if self.transport not in TRANSPORTS:
            raise InputError(
                f"transport {self.transport!r} was given; there are {', '.join(TRANSPORTS)}"
            )
        if self.tls is not None and self.transport not in ("auto", "tcp"):
            raise InputError(
                f"--tls was given with transport {self.transport!r}, which cannot encrypt: use tcp"
            )


def started_by_launcher() -> bool:
    """True in a process that mpiexec or torchrun started."""
    return started_by_mpi() or "TORCHELASTIC_RUN_ID" in os.environ


def place_among(peers: Peers, rank: int, options: Options) -> Place:
    """Rank `rank` of a static list, over tcp."""
    peers.check_rank(rank)
    if options.transport not in ("auto", "tcp"):
        raise InputError(
            f"transport {options.transport!r} was given with a list of peers, which is for tcp: "
            f"start the ranks with torchrun for torch, with mpiexec for mpi"
        )
    here = [r for r in range(peers.world_size) if peers(r)[0] == peers(rank)[0]]
    device = device_of_rank(options.device, here.index(rank))
    token = read_token(options.token_file)
    tls = _tls(options, rank)

    def connect(shard: Shard) -> Transport:
        _check_world_size(shard, peers.world_size, "the list of peers")
        meeting = Meeting(identity_of(shard), token, listen(*peers(rank)), peers, tls=tls)
        return _tcp(meeting, options, device)

    size, encrypted = peers.world_size, tls is not None
    return Place(rank, size, "peers", "tcp", connect, encrypted, device, _staged("tcp", device))


def place_from_launcher(options: Options) -> Place:
    """The place that mpiexec or torchrun has given this process."""
    return _place_in_mpi(options) if started_by_mpi() else _place_in_torchrun(options)


def _place_in_mpi(options: Options) -> Place:
    if options.transport not in ("auto", "mpi"):
        raise InputError(
            f"transport {options.transport!r} was given under mpiexec: use mpi or auto there"
        )
    if options.tls is not None:
        raise InputError("--tls was given under mpiexec, and MPI cannot encrypt: use --peers")
    mpi = load_mpi()
    world = mpi.COMM_WORLD
    local = world.Split_type(mpi.COMM_TYPE_SHARED)
    device = device_of_rank(options.device, local.Get_rank())
    local.Free()

    def connect(shard: Shard) -> Transport:
        transport = MpiTransport()
        mine = identity_of(shard)
        for theirs in transport.agree(mine):
            if theirs.rank != mine.rank:
                check_agreement(mine, theirs, "over MPI")
        _check_world_size(shard, transport.world_size, "mpiexec")
        return carry_from(transport, device)

    rank, size = world.Get_rank(), world.Get_size()
    return Place(rank, size, "mpi", "mpi", connect, False, device, _staged("mpi", device))


def _place_in_torchrun(options: Options) -> Place:
    name = options.transport
    if name == "auto":
        has_token = options.token_file is not None or TOKEN_VARIABLE in os.environ
        name = "tcp" if has_token or options.tls is not None else "torch"
    if name == "mpi":
        raise InputError("transport 'mpi' was given under torchrun: use mpiexec for it")
    device = device_of_rank(options.device, int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, world_size = next(iter(rendezvous("env://")))
    store = PrefixStore("disco", store)
    host = _address_towards(os.environ["MASTER_ADDR"])
    tls = _tls(options, rank)
    carrier = _staged(name, device)
    if name == "torch":
        mine = identity_of_device(device)
        devices = share(store, rank, world_size, "device", mine, options.meeting_s)
        reason = why_no_nccl(devices)
        if reason is None:
            carrier = NCCL
        elif carrier is not None:
            carrier = staged_carrier(name, reason)

    def connect(shard: Shard) -> Transport:
        _check_world_size(shard, world_size, "torchrun")
        if name == "torch":
            agree(store, rank, world_size, shard.plan_digest, options.meeting_s)
            transport = over_torch(
                rank,
                world_size,
                store,
                address=host,
                timeout_s=options.deadline_s,
                device=device,
                nccl=carrier is NCCL,
            )
            transport.connect()
            return transport
        listener = listen(host)
        addresses = StoreAddresses(store)
        addresses.publish(rank, *listener.getsockname()[:2])
        token = read_token(options.token_file)
        meeting = Meeting(identity_of(shard), token, listener, addresses, tls=tls)
        return _tcp(meeting, options, device)

    encrypted = tls is not None
    return Place(rank, world_size, "torchrun", name, connect, encrypted, device, carrier)


def _staged(transport: str, device: torch.device) -> Carrier | None:
    return None if device.type == "cpu" else staged_carrier(transport)


def _tls(options: Options, rank: int) -> Tls | None:
    return None if options.tls is None else Tls.load(options.tls, rank)


def _tcp(meeting: Meeting, options: Options, device: torch.device) -> Transport:
    identity = meeting.identity
    meeting.patient = options.degrades
    transport = TcpTransport(
        identity.rank,
        identity.world_size,
        meeting,
        meeting_s=options.meeting_s,
        silence_s=silence_of(options.silence_s, (device,)),
        survives=options.degrades,
    )
    transport.connect()
    return carry_from(transport, device)


def _check_world_size(shard: Shard, world_size: int, where: str) -> None:
    if shard.world_size != world_size:
        raise InputError(
            f"the plan is for {shard.world_size} ranks, and {where} has {world_size}: start as "
            f"many as the plan has, or partition the model again"
        )


def _address_towards(host: str) -> str:
    """This machine's address on the way to `host`: no packet is sent."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise InputError(f"there is no way to the master's address {host}: {error}") from None
