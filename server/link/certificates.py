"""The authority of a server, and the certificate by which boards know that they speak to it."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

from lightcl.errors import RequestError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

AUTHORITY_DAYS = 3650
"""Boards keep the authority's certificate, so it lasts longer than they do."""
SERVER_DAYS = 730
CLOCK_DAYS = 1
"""Certificates are valid from this long before they are made: the clock of a board may be behind."""
HOST_NAME = re.compile(r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)(\.[A-Za-z0-9_-]{1,63})*\.?")


def check_address(address: str) -> str:
    """A host name or an IP address, as given. Raises RequestError."""
    with suppress(ValueError):
        return str(ipaddress.ip_address(address.strip("[]")))
    if not HOST_NAME.fullmatch(address) or re.fullmatch(r"[\d.]+", address):
        raise RequestError(
            f"--address is {address!r}, expected a host name or an IP address without a port, e.g. 192.168.0.10"
        )
    return address


def own_addresses() -> list[str]:
    """This machine's addresses, the one that it reaches other machines by first, then its names."""
    found: list[str] = []
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing: it only chooses the interface
            found.append(str(probe.getsockname()[0]))
    name = socket.gethostname()
    with suppress(OSError):
        found += sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    usable = [address for address in found if not ipaddress.ip_address(address.partition("%")[0]).is_loopback]
    names = [text for text in (name, f"{name}.local" if "." not in name else "") if HOST_NAME.fullmatch(text)]
    return list(dict.fromkeys([*usable, *names])) or ["127.0.0.1"]


def new_authority() -> tuple[str, str]:
    """The certificate and the private key of a new authority (PEM)."""
    from cryptography import x509

    key = _new_private_key()
    name = _name(f"LightCL fleet authority {x509.random_serial_number():x}"[:48])
    builder = _builder(name, name, key, AUTHORITY_DAYS)
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True).add_extension(identifier, critical=False)
    return _signed(builder, key), _private_text(key)


def new_certificate(authority: str, authority_key: str, addresses: Sequence[str]) -> tuple[str, str]:
    """The certificate and the private key (PEM) of a server under `addresses`, localhost and 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509.oid import ExtendedKeyUsageOID

    issuer, issuer_key = read(authority), load_pem_private_key(authority_key.encode(), None)
    key = _new_private_key()
    names = list(dict.fromkeys([*addresses, "localhost", "127.0.0.1", "::1"]))
    builder = _builder(_name("LightCL fleet server"), issuer.subject, key, SERVER_DAYS)
    builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    issuer_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())  # type: ignore[arg-type]
    builder = builder.add_extension(issuer_identifier, critical=False)
    return _signed(builder, issuer_key), _private_text(key)  # type: ignore[arg-type]


def read(certificate: str) -> x509.Certificate:
    """Raises RequestError for a text that is no certificate."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(certificate.encode())
    except ValueError as error:
        raise RequestError(f"not a certificate in PEM ({error}); restore it, or make the folder anew") from error


def expiry(certificate: str) -> datetime:
    """When a certificate ends (UTC)."""
    return read(certificate).not_valid_after_utc


def names_of(certificate: str) -> list[str]:
    """The addresses that a certificate is for."""
    from cryptography import x509

    found = read(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def certificate_fingerprint(certificate: str) -> str:
    """SHA-256 of a certificate, as browsers and openssl show it."""
    from cryptography.hazmat.primitives.hashes import SHA256

    return read(certificate).fingerprint(SHA256()).hex(":").upper()


def key_fingerprint(public_key: str) -> str:
    """SHA-256 of a public key in OpenSSH's format, as `ssh-keygen -l` shows it. Raises RequestError."""
    import base64

    check_public_key(public_key)
    digest = hashlib.sha256(base64.b64decode(public_key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def check_public_key(text: str, where: str = "--public-key") -> str:
    """A public key that Flower takes, without its comment. Raises RequestError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    advice = "expected a line that begins with ecdsa-sha2-nistp384 (OpenSSH); never give a private key to the server"
    try:
        key = load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RequestError(f"{where}: not a public key ({error}); {advice}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise RequestError(f"{where}: a key of another kind ({text.split()[0]}); {advice}")
    return " ".join(text.split()[:2])


@lru_cache(maxsize=10_000)
def as_flower_sends_it(public_key: str) -> bytes:
    """The bytes by which a SuperNode names its key (PEM), of a key in OpenSSH's format."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    return load_ssh_public_key(public_key.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


# -- inside ----------------------------------------------------------------------------------------------------


def _new_private_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _name(text: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _general_name(address: str) -> x509.GeneralName:
    from cryptography import x509

    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(address.partition("%")[0]))
    return x509.DNSName(address)


def _builder(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=CLOCK_DAYS))
        .not_valid_after(now + timedelta(days=days))
    )


def _signed(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> str:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding

    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


def _private_text(key: EllipticCurvePrivateKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
