"""Which transport, and how the ranks of one machine open it."""

from __future__ import annotations

import os

from disco.errors import InputError
from disco.executor import Transport
from disco.partition.shards import Shard
from disco.program import PROGRAM_VERSION
from disco.runtime.gloo import GlooTransport
from disco.runtime.rendezvous import AddressBook, agree, file_store
from disco.runtime.tcp import Identity, Meeting, TcpTransport, listen
from disco.runtime.token import read_token

TRANSPORTS = ("auto", "tcp", "torch", "mpi")
TOKEN_FILE = "token"

# Ranks do not finish loading at once. A launcher notices a dead one long before.
_MEETING_S = 150.0
LOOPBACK = "127.0.0.1"


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
) -> Transport:
    """Meet the other ranks of this machine, who use the same private `folder`.

    Args:
        name: "tcp" or "torch".
        folder: that only this user reads; for tcp it has the token.
        host: to listen on.
        timeout_s: over torch, for any operation.
        silence_s: over tcp, after which a silent peer is lost.
        survives: over tcp, whether a lost peer can be done without.
    """
    rank, world_size = shard.rank, shard.world_size
    transport: Transport
    if name == "torch":
        store = file_store(os.path.join(folder, "rendezvous"), world_size)
        agree(store, rank, world_size, shard.plan_digest, _MEETING_S)
        transport = GlooTransport(rank, world_size, store, address=host, timeout_s=timeout_s)
    else:
        listener = listen(host)
        book = AddressBook(folder)
        book.publish(rank, *listener.getsockname()[:2])
        token = read_token(os.path.join(folder, TOKEN_FILE))
        meeting = Meeting(identity_of(shard), token, listener, book, patient=survives)
        transport = TcpTransport(
            rank,
            world_size,
            meeting,
            meeting_s=_MEETING_S,
            silence_s=silence_s,
            survives=survives,
        )
    transport.connect()
    return transport
