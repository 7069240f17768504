"""Where the ranks of a cluster listen, in YAML:

peers:
  - 192.168.1.10:7077   # rank 0
  - 192.168.1.11:7077   # rank 1
  - "[fd00::12]:7077"
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from disco.errors import InputError

_BRACKETED = re.compile(r"\[([0-9A-Fa-f:.%\w]+)\]:(\d+)")
_PLAIN = re.compile(r"([^\s:\[\]]+):(\d+)")


@dataclass(frozen=True)
class Peers:
    """The address of every rank, in order.

    Attributes:
        addresses: host (a name or an address) and port.
    """

    addresses: tuple[tuple[str, int], ...]

    @property
    def world_size(self) -> int:
        return len(self.addresses)

    def __call__(self, rank: int) -> tuple[str, int]:
        """Where `rank` listens."""
        return self.addresses[rank]

    def check_rank(self, rank: int) -> None:
        """Raise InputError unless `rank` is one of them."""
        if not 0 <= rank < self.world_size:
            raise InputError(
                f"rank {rank} was given, and the list has {self.world_size} peers: give 0 to "
                f"{self.world_size - 1}"
            )

    @staticmethod
    def from_yaml(path: str | os.PathLike[str]) -> Peers:
        """Read a list of peers. InputError names the file and what is wrong in it."""
        file = os.fspath(path)
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the peers' file {file} cannot be read ({error})") from None
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the peers' file {file} is not YAML: {reason}") from None
        listed = content.get("peers") if isinstance(content, dict) else None
        if not isinstance(listed, list) or not listed or set(content) != {"peers"}:
            raise InputError(
                f"the peers' file {file} needs one key, `peers`, with a list of HOST:PORT, one a "
                f"rank"
            )
        addresses = tuple(_address(item, f"peer {i} in {file}") for i, item in enumerate(listed))
        repeated = [a for a in addresses if addresses.count(a) > 1]
        if repeated:
            host, port = repeated[0]
            raise InputError(f"the peers' file {file} lists {host}:{port} twice")
        return Peers(addresses)


def _address(item: object, where: str) -> tuple[str, int]:
    found = isinstance(item, str) and (_BRACKETED.fullmatch(item) or _PLAIN.fullmatch(item))
    if not found or not 0 < int(found[2]) < 1 << 16:
        raise InputError(f"{where} must be HOST:PORT (an IPv6 address in brackets), given {item!r}")
    return found[1], int(found[2])
