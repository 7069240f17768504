"""TLS between ranks: version 1.3, both ends with a certificate of the cluster's own authority.

A certificate says for which rank it is, and that is what the rank that shows it has to be. The
one that dials checks in addition that it is for the address that was dialled. `disco keys` makes
them; here they are only read, with nothing but the standard library.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from disco.errors import InputError
from disco.runtime.tcp.tls_socket import TlsSocket, name_rank, rank_of, why_unverified

CA_FILE, CERTIFICATE_FILE, KEY_FILE = "ca.pem", "cert.pem", "key.pem"
_MAKE_NEW = "make new ones with `disco keys` and copy them to all nodes"
_WARN_DAYS = 30

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tls:
    """One rank's certificate and key, checked, and the authority whose certificates it takes.

    Attributes:
        rank: that the certificate is for.
        until: the end of its validity, as OpenSSL writes it.
    """

    rank: int
    until: str
    _dialling: ssl.SSLContext
    _accepting: ssl.SSLContext

    @staticmethod
    def load(directory: str | os.PathLike[str], rank: int) -> Tls:
        """Read a rank's three files, and check that they belong together and to `rank`.

        Raises:
            InputError: a file is missing, damaged or readable by others, the certificate is of
                another authority or rank, or not valid at this time.
        """
        folder = Path(directory)
        _check_files(folder, rank)
        dialling = _context(folder, ssl.PROTOCOL_TLS_CLIENT)
        accepting = _context(folder, ssl.PROTOCOL_TLS_SERVER)
        certificate = _own_certificate(folder, accepting)
        found = rank_of(certificate)
        if found != rank:
            raise InputError(
                f"{folder / CERTIFICATE_FILE} is the certificate of {name_rank(found)}, and this "
                f"is rank {rank}: give it the files that `disco keys` made for rank {rank}"
            )
        until = str(certificate["notAfter"])
        days = (ssl.cert_time_to_seconds(until) - time.time()) / 86400
        if days < _WARN_DAYS:
            _log.warning(
                "the certificate %s is valid until %s only: %s",
                *(folder / CERTIFICATE_FILE, until, _MAKE_NEW),
            )
        return Tls(rank, until, dialling, accepting)

    def dialled(self, sock: socket.socket, host: str, rank: int) -> TlsSocket:
        """The end that connects to `rank` at `host` (a name or an address)."""
        name = host.partition("%")[0]  # a link-local address's interface is this machine's matter
        wrap = partial(
            self._dialling.wrap_socket, server_hostname=name, do_handshake_on_connect=False
        )
        return TlsSocket(sock, wrap, dialled=rank)

    def accepted(self, sock: socket.socket) -> TlsSocket:
        """The end that listened."""
        wrap = partial(self._accepting.wrap_socket, server_side=True, do_handshake_on_connect=False)
        return TlsSocket(sock, wrap)


def _check_files(folder: Path, rank: int) -> None:
    for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE):
        try:
            mode = (folder / name).stat().st_mode
        except OSError as error:
            raise InputError(
                f"{folder / name} cannot be read ({error.strerror}): TLS needs a folder with "
                f"{CA_FILE}, {CERTIFICATE_FILE} and {KEY_FILE} of this rank, as `disco keys` makes "
                f"it (rank-{rank})"
            ) from None
        if name == KEY_FILE and mode & 0o077:
            key = folder / name
            raise InputError(
                f"others may read the key {key}: make it yours alone (chmod 600 {key})"
            )


def _context(folder: Path, protocol: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if protocol is ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # no session is ever resumed
    try:
        context.load_verify_locations(folder / CA_FILE)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"{folder / CA_FILE} cannot be read as certificates: {error}") from None
    paths = f"{folder / CERTIFICATE_FILE} and {folder / KEY_FILE}"
    try:
        # Without a function for it, OpenSSL asks the terminal for a password.
        context.load_cert_chain(
            folder / CERTIFICATE_FILE, folder / KEY_FILE, password=lambda: _no_password(folder)
        )
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InputError(f"{paths} do not belong together: {_MAKE_NEW}") from None
        raise InputError(f"{paths} cannot be read: {error.reason or error}") from None
    except OSError as error:
        raise InputError(f"{paths} cannot be read: {error.strerror}") from None
    return context


def _no_password(folder: Path) -> bytes:
    raise InputError(
        f"the key {folder / KEY_FILE} has a password, which nobody could type on a node: give one "
        f"without"
    )


def _own_certificate(folder: Path, accepting: ssl.SSLContext) -> Mapping[str, object]:
    """What every other rank will see: this rank's certificate, verified by the same rules.

    The standard library verifies certificates only in a handshake, so this is one with itself.
    """
    asking = _context(folder, ssl.PROTOCOL_TLS_CLIENT)
    asking.check_hostname = False
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(to_client, to_server)
    server = accepting.wrap_bio(to_server, to_client, server_side=True)
    try:
        for end in (client, server, client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLCertVerificationError as error:
        today = datetime.datetime.now().astimezone()
        raise InputError(
            f"the certificate {folder / CERTIFICATE_FILE} {why_unverified(error)}; this machine's "
            f"clock has {today:%Y-%m-%d %H:%M %Z}: set the clock if it is wrong, otherwise "
            f"{_MAKE_NEW}"
        ) from None
    except ssl.SSLError as error:
        raise InputError(
            f"the certificate {folder / CERTIFICATE_FILE} cannot be used: {error.reason or error}"
        ) from None
    certificate = client.getpeercert()
    assert certificate, "verified, so it is there"
    return certificate
