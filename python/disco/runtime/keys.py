"""Certificates and keys for all ranks of a cluster, on disk: `disco keys`.

    DIR/ca-key.pem                        stays where it was made
    DIR/rank-<r>/{ca,cert,key}.pem        goes to the node of rank r

Making them needs the package `cryptography`; using them does not.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from disco.errors import InputError
from disco.runtime.peers import Peers
from disco.runtime.tcp.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE

if TYPE_CHECKING:
    from disco.runtime.authority import Authority

DAYS = 365
CA_KEY_FILE = "ca-key.pem"
_MOST_DAYS = 3650
_RANK_FOLDER = re.compile(r"rank-\d+")
_RANK_FILES = {CA_FILE, CERTIFICATE_FILE, KEY_FILE}
# A node's clock may be behind, and what is made now should be valid there now.
_BACKDATED = datetime.timedelta(days=1)


def make_keys(
    directory: str | os.PathLike[str], peers: Peers, *, days: int = DAYS, overwrite: bool = False
) -> datetime.datetime:
    """Make an authority and one certificate a rank, all new, in files that only this user reads.

    Args:
        directory: a new one, or an empty one.
        peers: whose addresses go into the certificates.
        days: that they are valid from now on.
        overwrite: replace what an earlier call made there. Ranks with old keys and ranks with new
            ones refuse each other.

    Returns:
        until when the certificates are valid, in UTC.

    Raises:
        InputError: the package `cryptography` is missing, the directory cannot or should not be
            written, an address cannot be in a certificate.
    """
    target = Path(directory)
    if not 0 < days <= _MOST_DAYS:
        raise InputError(f"{days} days were given; a certificate is valid for 1 to {_MOST_DAYS}")
    _check_target(target, overwrite)
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    authority = _new_authority(now - _BACKDATED, now + datetime.timedelta(days=days))
    try:
        # mkdtemp makes it for this user only.
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            _write_all(partial, authority, peers)
            _put_in_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # gone if all went well
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from None
    return authority.end


def _new_authority(begin: datetime.datetime, end: datetime.datetime) -> Authority:
    try:
        from disco.runtime.authority import Authority
    except ImportError as error:
        raise InputError(
            f"making keys needs the package `cryptography`, which cannot be imported ({error}): "
            f"pip install 'disco-kernels[tls]' here; the other nodes do not need it"
        ) from None
    return Authority.make(begin, end)


def _write_all(folder: Path, authority: Authority, peers: Peers) -> None:
    _write(folder / CA_KEY_FILE, authority.pem.key)
    for rank, (host, _) in enumerate(peers.addresses):
        own = folder / f"rank-{rank}"
        own.mkdir(mode=0o700)
        issued = authority.issue(rank, host)
        _write(own / CA_FILE, authority.pem.certificate)
        _write(own / CERTIFICATE_FILE, issued.certificate)
        _write(own / KEY_FILE, issued.key)


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise InputError(f"there is no directory {target.parent} to make {target.name!r} in")
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise InputError(f"{target} is no directory: give the name of a new one")
    there = sorted(target.iterdir())
    if there and not overwrite:
        raise InputError(
            f"{target} exists and is not empty: choose a new directory, or give --overwrite, after "
            f"which every node needs its new files"
        )
    for path in there:
        if not _is_ours(path):
            raise InputError(
                f"{target} is not overwritten, because `disco keys` does not make what "
                f"{path.name!r} is: choose a new directory"
            )


def _is_ours(path: Path) -> bool:
    if path.name == CA_KEY_FILE:
        return path.is_file()
    if not _RANK_FOLDER.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    return {file.name for file in path.iterdir()} <= _RANK_FILES


def _put_in_place(partial: Path, target: Path) -> None:
    """By renaming, so that keys of two authorities are never side by side."""
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
