"""Writes the files with which a board joins: configuration, key and the server's certificate, all or none."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from client.board.config import BoardConfig
from lightcl.errors import RequestError
from lightcl.exchange.join import new_key
from lightcl.storage.files import sync

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

KEY_SUFFIX, PUBLIC_SUFFIX, CERTIFICATE_SUFFIX = ".key", ".key.pub", ".ca.pem"


def write_files(
    file: Path, config: BoardConfig, *, certificate: str, key: str, overwrite: bool
) -> tuple[BoardConfig, str]:
    """Writes the configuration, and beside it the certificate and the private key, where they are given as text.

    A board that uses TLS and has no key gets a new one, or keeps the one that an earlier `init` made. Returns the
    configuration as written and the public key of a board that made its own, else an empty text. Raises RequestError.
    """
    texts: dict[Path, str] = {}
    public = ""
    if certificate:
        config = replace(config, certificate=str(file.with_suffix(CERTIFICATE_SUFFIX)))
        texts[Path(config.certificate)] = certificate
    if not config.insecure and not config.key:
        own = file.with_suffix(KEY_SUFFIX)
        config = replace(config, key=str(own))
        if key:
            texts[own] = key
        elif own.exists():  # the server knows it
            public = public_key(own)
        else:
            texts[own], public = new_key()
    if public:
        texts[file.with_suffix(PUBLIC_SUFFIX)] = f"{public}\n"
    texts[file] = config.to_toml()  # the last one: without it the others are nothing
    existing = [path for path in texts if path.exists()]
    if existing and not overwrite:
        raise RequestError(f"{existing[0]} exists; use --overwrite, or another file (--config)")
    _write_all(texts)
    return config, public


def public_key(file: Path) -> str:
    """The public half of a private key's file, in OpenSSH's format. Raises RequestError."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return private_key(file).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def private_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """The key by which this board proves who it is. Raises RequestError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        loaded = load_ssh_private_key(file.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise RequestError(
            f"key: {file} is not a readable private key in OpenSSH's format ({error}); remove it and run `lightcl "
            "device init --overwrite`, then add the new key on the server"
        ) from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise RequestError(
            f"key: {file} is not an ECDSA key, which Flower's nodes use; let `lightcl device init` make one"
        )
    return loaded


def _write_all(texts: dict[Path, str]) -> None:
    """Writes all files with mode 0600, then puts them in place; a failure before that leaves nothing behind."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in texts}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(temporary[path], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:  # noqa: PTH123
                out.write(text)
            sync(temporary[path])
        for path in texts:
            temporary[path].replace(path)
    except OSError as error:
        for path in temporary.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise RequestError(
            f"{error.filename or 'the configuration'} cannot be written ({error.strerror}); make room or name another "
            "file (--config)"
        ) from error
