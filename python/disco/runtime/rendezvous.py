"""Where the ranks of one machine find each other, and what they agree on before they talk."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import FileStore, Store
from torch.distributed import DistStoreError

from disco.errors import InputError, TransportError


def file_store(path: str, world_size: int) -> Store:
    """A store in a file that only this user can open: no port for a stranger to connect to."""
    return FileStore(path, world_size)


def agree(store: Store, rank: int, world_size: int, plan_digest: str, timeout_s: float) -> None:
    """Check that all ranks hold shards of one plan, before any activation is sent.

    Raises:
        InputError: a peer has a shard of another plan, or of another number of ranks.
        TransportError: a peer did not appear within `timeout_s` seconds.
    """
    mine = {"plan": plan_digest, "world_size": world_size}
    store.set(f"hello/{rank}", json.dumps(mine))
    for peer in range(world_size):
        if peer == rank:
            continue
        key = f"hello/{peer}"
        try:
            store.wait([key], timedelta(seconds=timeout_s))
        except (RuntimeError, DistStoreError) as error:
            raise TransportError(
                f"rank {peer} of {world_size} did not appear within {timeout_s:g} s"
            ) from error
        theirs = json.loads(store.get(key))
        if theirs != mine:
            raise InputError(
                f"rank {rank} has a shard of plan {plan_digest[:12]} for {world_size} ranks, "
                f"rank {peer} one of plan {theirs['plan'][:12]} for {theirs['world_size']}: "
                "give every rank its shard of one partition"
            )


def share(
    store: Store, rank: int, world_size: int, name: str, value: str, timeout_s: float
) -> list[str]:
    """What every rank says under this name, by rank.

    Raises:
        TransportError: a peer did not appear within `timeout_s` seconds.
    """
    store.set(f"{name}/{rank}", value)
    keys = [f"{name}/{peer}" for peer in range(world_size)]
    for peer, key in enumerate(keys):
        try:
            store.wait([key], timedelta(seconds=timeout_s))
        except (RuntimeError, DistStoreError) as error:
            raise TransportError(
                f"rank {peer} of {world_size} did not appear within {timeout_s:g} s"
            ) from error
    return [store.get(key).decode() for key in keys]


class AddressBook:
    """Where the ranks of one machine listen: a file a rank, in a folder that only this user reads.

    Args:
        folder: private to the ranks and their launcher.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)

    def publish(self, rank: int, host: str, port: int) -> None:
        """Say where `rank` listens."""
        part = self._folder / f"address-{rank}.part"
        part.write_text(json.dumps([host, port]), encoding="utf-8")
        part.replace(self._folder / f"address-{rank}")

    def __call__(self, rank: int) -> tuple[str, int] | None:
        """Where `rank` listens, None as long as it has not said so."""
        try:
            host, port = json.loads((self._folder / f"address-{rank}").read_text("utf-8"))
        except FileNotFoundError:
            return None
        return str(host), int(port)


class StoreAddresses:
    """Where ranks listen, in a store of torch's that all of them reach (torchrun has one)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def publish(self, rank: int, host: str, port: int) -> None:
        """Say where `rank` listens."""
        self._store.set(f"address/{rank}", json.dumps([host, port]))

    def __call__(self, rank: int) -> tuple[str, int] | None:
        """Where `rank` listens, None as long as it has not said so."""
        key = f"address/{rank}"
        if not self._store.check([key]):
            return None
        host, port = json.loads(self._store.get(key))
        return str(host), int(port)
