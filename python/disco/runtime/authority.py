"""A private certificate authority, and certificates for ranks, in memory.

Imports the package `cryptography`, so import this module only where that is needed.
"""

from __future__ import annotations

import datetime
import ipaddress
import secrets
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from disco.errors import InputError
from disco.runtime.tcp.tls_socket import rank_uri


@dataclass(frozen=True)
class Certified:
    """A certificate and the key that belongs to it, in PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True)
class Authority:
    """One cluster's authority. Make it with `Authority.make`.

    Attributes:
        begin, end: from when to when it and its certificates are valid, in UTC.
    """

    begin: datetime.datetime
    end: datetime.datetime
    _certificate: x509.Certificate
    _key: ec.EllipticCurvePrivateKey

    @staticmethod
    def make(begin: datetime.datetime, end: datetime.datetime) -> Authority:
        """A new one."""
        key = _new_key()
        # A name of its own, since OpenSSL looks authorities up by name.
        name = _common_name(f"disco authority {secrets.token_hex(8)}")
        certificate = (
            _builder(name, name, key.public_key(), begin, end)
            # It issues for ranks, and for no other authority.
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return Authority(begin, end, certificate, key)

    @property
    def pem(self) -> Certified:
        """Its own certificate and key."""
        return _pem(self._certificate, self._key)

    def issue(self, rank: int, host: str) -> Certified:
        """A new key for a rank, with a certificate for both ends of a connection.

        Args:
            rank: which the certificate names as a URI.
            host: where the rank listens, a name or an address.

        Raises:
            InputError: the host cannot be in a certificate.
        """
        key = _new_key()
        names = [_host(host), x509.UniformResourceIdentifier(rank_uri(rank))]
        both_ends = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        name = _common_name(f"disco rank {rank}")
        certificate = (
            _builder(name, self._certificate.subject, key.public_key(), self.begin, self.end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(both_ends), critical=False)
            .add_extension(issuer, critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _pem(certificate, key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    begin: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        # Without a link-local address's interface, which is every machine's own matter.
        return x509.IPAddress(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode("ascii"))
    except ValueError as error:
        raise InputError(
            f"the host {host!r} of the list of peers cannot be in a certificate ({error}): give a "
            f"name or an address"
        ) from None


def _new_key() -> ec.EllipticCurvePrivateKey:
    # P-256: TLS libraries of all ages and rules have it.
    return ec.generate_private_key(ec.SECP256R1())


def _pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Certified:
    return Certified(
        certificate.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
