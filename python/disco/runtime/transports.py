"""Which transport, and how the ranks of one machine open it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from disco.errors import InputError
from disco.executor import Transport
from disco.partition.shards import Shard
from disco.program import PROGRAM_VERSION
from disco.runtime.devices import CPU
from disco.runtime.gloo import GlooTransport
from disco.runtime.nccl import NcclGroups, NcclTransport
from disco.runtime.rendezvous import AddressBook, agree, file_store
from disco.runtime.staged import CudaCopies, StagedTransport
from disco.runtime.tcp import Identity, Meeting, TcpTransport, listen
from disco.runtime.token import read_token

TRANSPORTS = ("auto", "tcp", "torch", "mpi")
TOKEN_FILE = "token"

# Ranks do not finish loading at once. A launcher notices a dead one long before.
_MEETING_S = 150.0
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Carrier:
    """How payloads travel.

    Attributes:
        transport: "tcp", "torch" or "mpi".
        nccl: over NCCL, from GPU to GPU, where the transport is "torch".
        text: the same in words, with the reason where there was a choice.
    """

    transport: str
    nccl: bool
    text: str


def choose_carrier(name: str, devices: Sequence[torch.device]) -> Carrier:
    """How payloads of ranks that this process starts on this machine travel.

    Args:
        name: of the transport; "auto" is NCCL where each rank has a GPU of its own, else tcp.
        devices: by rank.

    Raises:
        InputError: as of `choose_transport`.
    """
    chosen = choose_transport(name)
    if all(device.type == "cpu" for device in devices):
        return Carrier(chosen, False, chosen)
    if name == "tcp":
        return staged_carrier("tcp")
    reason = why_no_nccl([str(device) for device in devices])
    if reason is None:
        return NCCL
    return staged_carrier(chosen, reason)


NCCL = Carrier("torch", True, "torch (NCCL)")


def staged_carrier(transport: str, reason: str | None = None) -> Carrier:
    """GPU tensors over a transport of CPU memory; the reason why not over NCCL."""
    named = "torch (gloo)" if transport == "torch" else transport
    because = "" if reason is None else f" ({reason})"
    return Carrier(transport, False, f"{named} through pinned host memory{because}")


def why_no_nccl(devices: Sequence[str]) -> str | None:
    """Why NCCL cannot carry payloads between these devices, named by rank; None if it can."""
    for rank, device in enumerate(devices):
        if device == "cpu":
            return f"rank {rank} computes on the CPU, and NCCL carries GPU memory"
        other = devices.index(device)
        if other != rank:
            return f"ranks {other} and {rank} share {device}, which NCCL refuses"
    return None if dist.is_nccl_available() else "this torch is built without NCCL"


def carry_from(transport: Transport, device: torch.device) -> Transport:
    """The transport, for messages in a device's memory."""
    return transport if device.type == "cpu" else StagedTransport(transport, CudaCopies(device))


def over_torch(
    rank: int,
    world_size: int,
    store: Store,
    *,
    address: str,
    timeout_s: float,
    device: torch.device,
    nccl: bool,
) -> Transport:
    """gloo, or NCCL with gloo beside it; not yet connected. Arguments as of `GlooTransport`."""
    gloo = GlooTransport(rank, world_size, store, address=address, timeout_s=timeout_s)
    if nccl:
        return NcclTransport(gloo, NcclGroups(rank, world_size, store, device, timeout_s))
    return carry_from(gloo, device)


def choose_transport(name: str) -> str:
    """The transport of ranks that this process starts on this machine.

    Raises:
        InputError: there is no such transport, or another launcher has to start the ranks for it.
    """
    if name not in TRANSPORTS:
        raise InputError(f"transport {name!r} was given; there are {', '.join(TRANSPORTS)}")
    if name == "mpi":
        raise InputError(
            "transport 'mpi' is for processes that mpiexec starts: mpiexec -n NODES disco run ..."
        )
    return "tcp" if name == "auto" else name


def identity_of(shard: Shard) -> Identity:
    """What the rank of a shard says of itself."""
    return Identity(shard.rank, shard.world_size, shard.plan_digest, str(PROGRAM_VERSION))


def open_local(
    name: str,
    shard: Shard,
    folder: str,
    host: str,
    *,
    timeout_s: float,
    silence_s: float,
    survives: bool = False,
    device: torch.device = CPU,
    nccl: bool = False,
) -> Transport:
    """Meet the other ranks of this machine, who use the same private `folder`.

    Args:
        name: "tcp" or "torch".
        folder: that only this user reads; for tcp it has the token.
        host: to listen on.
        timeout_s: over torch, for any operation.
        silence_s: over tcp, after which a silent peer is lost.
        survives: over tcp, whether a lost peer can be done without.
        device: where this rank's messages are.
        nccl: over torch, by NCCL.
    """
    rank, world_size = shard.rank, shard.world_size
    transport: Transport
    if name == "torch":
        store = file_store(os.path.join(folder, "rendezvous"), world_size)
        agree(store, rank, world_size, shard.plan_digest, _MEETING_S)
        transport = over_torch(
            rank,
            world_size,
            store,
            address=host,
            timeout_s=timeout_s,
            device=device,
            nccl=nccl,
        )
    else:
        listener = listen(host)
        book = AddressBook(folder)
        book.publish(rank, *listener.getsockname()[:2])
        token = read_token(os.path.join(folder, TOKEN_FILE))
        meeting = Meeting(identity_of(shard), token, listener, book, patient=survives)
        tcp = TcpTransport(
            rank,
            world_size,
            meeting,
            meeting_s=_MEETING_S,
            silence_s=silence_s,
            survives=survives,
        )
        transport = carry_from(tcp, device)
    transport.connect()
    return transport
