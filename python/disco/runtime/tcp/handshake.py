"""Who may talk: both ends prove that they know the token, then compare what they are.

    dialler  ->  magic, version, nonce
    listener ->  magic, version, nonce
    dialler  ->  verdict, HMAC-SHA256(token, "dial" + both nonces + identity), identity
    listener ->  verdict, HMAC-SHA256(token, "accept" + both nonces + identity), identity

The token is never sent, and a proof is worth nothing in another connection. A listener proves
nothing to a dialler that has not. All sizes are bounded before anything is trusted. After the
handshake frames are not authenticated one by one: that, and secrecy, is what TLS is for.

Both ends are generators that yield `bytes` to send or an `int`, how many bytes they want next:
whoever drives them decides how to wait.

All of it goes through TLS where that is used (`tls`). A rank that uses it and one that does not
find out from the first bytes, and tell each other.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import struct
from collections.abc import Container, Generator
from dataclasses import asdict, dataclass, fields

from disco.errors import InputError

# What `disco doctor` has for a version of programs: it runs none.
DOCTOR = "doctor"
MAGIC = b"disco\x00tp"
PROTOCOL = 1
_NONCE_BYTES = 32
# magic, version, what else the sender wants to say, nonce
_HELLO = struct.Struct(f"<{len(MAGIC)}sHH{_NONCE_BYTES}s")
_NO_REMARK, _I_USE_TLS = 0, 1
_PROOF = struct.Struct("<HH32s")
_MOST_IDENTITY_BYTES = 4096

_OK, _WRONG_TOKEN, _TAKEN = 0, 1, 2

# What a rank that uses TLS answers to a hello without: it goes no further.
TLS_ONLY = _HELLO.pack(MAGIC, PROTOCOL, _I_USE_TLS, bytes(_NONCE_BYTES))
# A record of TLS's handshake; two more bytes, the length of the rest, follow a minor version.
_TLS_BEGINS = b"\x16\x03"
_TLS_RECORD = struct.Struct(">BHH")

Handshake = Generator["bytes | int", "bytes", "Identity"]


class StrangerError(Exception):
    """The other end is not one of ours: another protocol, no proof, garbage."""


class TakenError(InputError):
    """The rank that this process says it is is connected already."""


@dataclass(frozen=True)
class Identity:
    """What a rank says of itself, once it is trusted. All but `rank` and `lost` must agree.

    Attributes:
        rank, world_size: its place in the plan.
        plan: digest of its plan.
        program: version of the programs that its release runs.
        lost: ranks that it goes on without.
    """

    rank: int
    world_size: int
    plan: str
    program: str
    lost: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Identity:
        """Raises StrangerError for anything else than an identity."""
        try:
            content = json.loads(data)
            given = {field.name: content[field.name] for field in fields(Identity)}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StrangerError(f"an identity that cannot be read ({error!r})") from None
        kinds = {"rank": int, "world_size": int, "plan": str, "program": str, "lost": list}
        if any(type(given[name]) is not kind for name, kind in kinds.items()):
            raise StrangerError("an identity with values of other kinds")
        given["lost"] = tuple(given["lost"])
        if any(type(rank) is not int for rank in given["lost"]):
            raise StrangerError("an identity with values of other kinds")
        return Identity(**given)


def check_agreement(mine: Identity, theirs: Identity, where: str) -> None:
    """Raise InputError, which says what differs, unless both are ranks of one plan."""
    if not 0 <= theirs.rank < mine.world_size or theirs.rank == mine.rank:
        raise InputError(
            f"{where} says that it is rank {theirs.rank}, as seen from rank {mine.rank} of "
            f"{mine.world_size}: give every process a rank of its own"
        )
    if theirs.program != mine.program:
        raise InputError(
            f"rank {theirs.rank} ({where}) runs programs of version {theirs.program}, rank "
            f"{mine.rank} of version {mine.program}: install one release on all nodes"
        )
    if (theirs.plan, theirs.world_size) != (mine.plan, mine.world_size):
        raise InputError(
            f"rank {mine.rank} has a shard of plan {mine.plan[:12]} for {mine.world_size} ranks, "
            f"rank {theirs.rank} ({where}) one of plan {theirs.plan[:12]} for "
            f"{theirs.world_size}: give every rank its shard of one partition"
        )


def dial(token: bytes, mine: Identity) -> Handshake:
    """The end that connected.

    Raises:
        InputError: the listener has another token, another protocol, or this rank already.
        StrangerError: it is no listener of ours.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    yield _hello(nonce)
    other = _read_hello((yield _HELLO.size))
    identity = mine.to_bytes()
    yield _proof(_OK, _mac(token, b"dial", nonce, other, identity), identity)
    theirs = yield from _read_proof(token, b"accept", nonce, other)
    return theirs


def accept(token: bytes, mine: Identity, taken: Container[int]) -> Handshake:
    """The end that listened; `taken` are the ranks that are connected already.

    Raises:
        InputError: the dialler has another protocol, or is a rank that is connected already.
        StrangerError: it does not know the token, or is no dialler of ours.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    hello = yield _HELLO.size
    if hello.startswith(_TLS_BEGINS):
        yield from _refuse_tls(hello)
    other = _read_hello(hello)
    yield _hello(nonce)
    try:
        theirs = yield from _read_proof(token, b"dial", other, nonce)
    except StrangerError:
        yield _proof(_WRONG_TOKEN, bytes(32), b"")
        raise
    identity = mine.to_bytes()
    verdict = _TAKEN if theirs.rank in taken else _OK
    yield _proof(verdict, _mac(token, b"accept", other, nonce, identity), identity)
    if verdict == _TAKEN:
        raise StrangerError(f"a second process that says it is rank {theirs.rank}")
    return theirs


def _refuse_tls(begin: bytes) -> Generator[bytes | int, bytes, None]:
    """Let a dialler that uses TLS know that this end does not."""
    # Closing a socket with unread bytes would take the answer back.
    rest = _TLS_RECORD.size + _TLS_RECORD.unpack_from(begin)[2] - len(begin)
    if rest > 0:
        yield rest
    yield _hello(bytes(_NONCE_BYTES))
    raise StrangerError("it uses TLS, and this rank does not: start all ranks with --tls, or none")


def _hello(nonce: bytes) -> bytes:
    return _HELLO.pack(MAGIC, PROTOCOL, _NO_REMARK, nonce)


def _read_hello(data: bytes) -> bytes:
    magic, version, remark, nonce = _HELLO.unpack(data)
    if magic != MAGIC:
        raise StrangerError("it does not speak this protocol")
    if version != PROTOCOL:
        raise InputError(
            f"the other end speaks version {version} of the protocol, this one version "
            f"{PROTOCOL}: install one release on all nodes"
        )
    if remark == _I_USE_TLS:
        raise InputError("it uses TLS, and this rank does not: start all ranks with --tls, or none")
    return bytes(nonce)


def _mac(token: bytes, role: bytes, dialler: bytes, listener: bytes, identity: bytes) -> bytes:
    return hmac.digest(token, role + dialler + listener + identity, hashlib.sha256)


def _proof(verdict: int, mac: bytes, identity: bytes) -> bytes:
    return _PROOF.pack(verdict, len(identity), mac) + identity


def _read_proof(
    token: bytes, role: bytes, dialler: bytes, listener: bytes
) -> Generator[bytes | int, bytes, Identity]:
    verdict, num_bytes, mac = _PROOF.unpack((yield _PROOF.size))
    if verdict == _WRONG_TOKEN:
        raise InputError("it has another token than this rank: give all ranks the same token")
    if num_bytes > _MOST_IDENTITY_BYTES or verdict not in (_OK, _TAKEN):
        raise StrangerError("a proof that cannot be")
    identity = (yield num_bytes) if num_bytes else b""
    if not hmac.compare_digest(mac, _mac(token, role, dialler, listener, identity)):
        raise StrangerError("it does not know the token")
    theirs = Identity.from_bytes(identity)
    if verdict == _TAKEN:
        raise TakenError(
            "another process is there already with this process's rank: give every process a rank "
            "of its own"
        )
    return theirs
