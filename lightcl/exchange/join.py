"""What a board needs to join a fleet, as one file: who it is, where the server is, and the keys of both.

`lightcl server add-device` writes it and `lightcl device init --join` reads it.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tomli_w

from lightcl.errors import RequestError, one_line

_HEADER = """\
# Copy this file to the board and run there: lightcl device init --join FILE
# It contains the board's private key: whoever has it can take the board's place. Delete it afterwards.
"""


@dataclass(frozen=True)
class JoinFile:
    """`certificate` and `key` are empty for a server without TLS; `key` also where the board makes its own."""

    name: str
    device: int
    """The device of the fleet that the board is, from 0."""
    devices: int
    server: str
    """HOST:PORT of the SuperLink."""
    certificate: str = ""
    """The certificate of the server's authority (PEM)."""
    key: str = ""
    """The board's private key (OpenSSH)."""

    def to_toml(self) -> str:
        return _HEADER + tomli_w.dumps(asdict(self), multiline_strings=True)

    @classmethod
    def read(cls, file: Path) -> JoinFile:
        """Raises RequestError where the file cannot be read, or a value is missing, unknown or of a wrong type."""
        try:
            values = tomllib.loads(file.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RequestError(f"{file}: not a join file ({one_line(str(error), 200)})") from error
        types = {one.name: {"str": str, "int": int}[str(one.type)] for one in fields(cls)}
        if unknown := sorted(set(values) - set(types)):
            raise RequestError(f"{file}: unknown key {unknown[0]!r} (allowed: {', '.join(types)})")
        for name, kind in types.items():
            optional = name in ("certificate", "key")
            if name not in values and not optional:
                raise RequestError(f"{file}: {name} is missing; make the file with `lightcl server add-device`")
            if name in values and type(values[name]) is not kind:
                raise RequestError(f"{file}: {name} is {values[name]!r}, expected {kind.__name__}")
        if not 0 <= values["device"] < values["devices"]:
            raise RequestError(
                f"{file}: device is {values['device']}, but devices is {values['devices']} "
                f"(allowed: 0 to {values['devices'] - 1})"
            )
        return cls(**values)


def new_key() -> tuple[str, str]:
    """A key pair as Flower's SuperNodes use them (ECDSA on P-384), both parts in OpenSSH's format: private, public."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return private, public
