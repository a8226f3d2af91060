"""The folder of a server: settings, certificates, keys of the boards, Flower's database, runs and logs.

server.toml           address, port and limits; may be edited while the server is stopped
ca.crt, ca.key        the authority: boards get the certificate, the key signs the server's certificates
server.pem            the certificate that the server shows to boards, and its private key
devices/NAME.toml     a board: its number, its public key, and by which number Flower knows it
join/NAME.toml        what the board needs, with its private key: copy it to the board, then delete it
runs/NUMBER.json      a run that was asked for; NUMBER.yaml its scenario
superlink.db          Flower's database
flower/, app/         Flower's own files, and the app that it sends to the boards
logs/                 superlink.log
running.json          process and port of the server that runs
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from lightcl.errors import RequestError, nearest, one_line
from lightcl.storage.files import exclusive, sync_names_above, write_atomically
from server.link import certificates

DEFAULT_PORT = 9092
_SETTINGS_HEADER = """\
# The server of a fleet of boards, made by `lightcl server init`. Changes take effect when the server starts again.
# address: under which boards reach it; it must stand in the certificate (`lightcl server keys`).
# devices: how many boards the fleet has; 0 until the first is added.
"""


def default_folder() -> Path:
    """`$LIGHTCL_SERVER`, else `~/.config/lightcl/server`."""
    return Path(os.environ.get("LIGHTCL_SERVER") or Path.home() / ".config" / "lightcl" / "server")


@dataclass(frozen=True)
class Settings:
    """server.toml."""

    address: str
    port: int = DEFAULT_PORT
    listen: str = "0.0.0.0"
    """The address of the network card to listen on; 0.0.0.0: all of them."""
    devices: int = 0
    insecure: bool = False
    """No TLS and no keys: anyone who can reach the port can join."""
    most_reply_mib: int = 1024
    """A longer reply of a board is cut off."""
    most_requests_per_second: int = 50
    """Of one board; more are slowed down. A reply takes one or two requests per tensor."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("port", 1, 65535), ("devices", 0, 1_000_000), ("most_reply_mib", 1, 1 << 20),
            ("most_requests_per_second", 1, 1_000_000),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise RequestError(f"{name} is {getattr(self, name)} (allowed: {least} to {most})")

    @property
    def server(self) -> str:
        """HOST:PORT, as boards get it."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def to_toml(self) -> str:
        import tomli_w

        return _SETTINGS_HEADER + tomli_w.dumps(asdict(self))

    @classmethod
    def from_toml(cls, text: str, where: str) -> Self:
        """Raises RequestError naming `where` and the key."""
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RequestError(f"{where}: not TOML ({error})") from error
        kinds = {one.name: {"str": str, "int": int, "bool": bool}[str(one.type)] for one in fields(cls)}
        for key, value in values.items():
            if key not in kinds:
                raise RequestError(f"{where}: unknown key {key!r}{nearest(key, kinds)} (allowed: {', '.join(kinds)})")
            if type(value) is not kinds[key]:
                raise RequestError(f"{where}: {key} is {value!r}, expected {kinds[key].__name__}")
        if "address" not in values:
            raise RequestError(f"{where}: address is missing (the host name or IP address of this server)")
        try:
            return cls(**values)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from error


@dataclass(frozen=True)
class ServerFolder:
    """A folder as described above; `path` is absolute."""

    path: Path
    settings: Settings = field(compare=False)

    @classmethod
    def open(cls, given: Path | None) -> Self:
        """The folder `given`, else the default one. Raises RequestError where there is none, or it is damaged."""
        path = (given or default_folder()).expanduser().absolute()
        try:
            text = (path / "server.toml").read_text()
        except FileNotFoundError as error:
            raise RequestError(
                f"--folder: {path} holds no server; make one with `lightcl server init`, or name its folder"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--folder: {path / 'server.toml'} cannot be read ({one_line(str(error))})") from error
        folder = cls(path, Settings.from_toml(text, str(path / "server.toml")))
        missing = [file.name for file in folder._needed() if not file.is_file()]
        if missing:
            raise RequestError(
                f"--folder: {path} lacks {', '.join(missing)}; restore it from a backup, or make the folder anew with "
                "`lightcl server init --overwrite` (every board must join again)"
            )
        return folder

    @classmethod
    def create(cls, given: Path | None, settings: Settings, addresses: Sequence[str], *, overwrite: bool) -> Self:
        """Makes the folder with its certificates: all of it, or nothing. Raises RequestError."""
        path = (given or default_folder()).expanduser().absolute()
        _check_free(path, overwrite)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.mkdir(parents=True, mode=0o700)
            made = cls(partial, settings)
            made._fill(addresses)
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
            sync_names_above(path)
        except OSError as error:
            raise RequestError(f"--folder: {path} cannot be written to ({error.strerror or error})") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls(path, settings)

    def _fill(self, addresses: Sequence[str]) -> None:
        for name in ("devices", "join", "runs", "flower", "app", "logs"):
            (self.path / name).mkdir()
        if not self.settings.insecure:
            certificate, key = certificates.new_authority()
            write_private(self.authority, certificate)
            write_private(self.authority_key, key)
            self.renew(addresses)
        self.save()

    def renew(self, addresses: Sequence[str]) -> None:
        """Makes a new certificate of the server; boards accept it, since they know the authority."""
        authority, authority_key = self.authority.read_text(), self.authority_key.read_text()
        certificate, key = certificates.new_certificate(authority, authority_key, addresses)
        # One file of both, so that a crash in between leaves no certificate with another's key.
        write_private(self.certificate, certificate + key)

    def save(self) -> None:
        """Writes server.toml."""
        write_private(self.path / "server.toml", self.settings.to_toml())

    def _needed(self) -> list[Path]:
        return [] if self.settings.insecure else [self.authority, self.authority_key, self.certificate]

    # -- its files ---------------------------------------------------------------------------------------------

    @property
    def authority(self) -> Path:
        return self.path / "ca.crt"

    @property
    def authority_key(self) -> Path:
        return self.path / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's certificate, followed by its private key."""
        return self.path / "server.pem"

    @property
    def database(self) -> Path:
        return self.path / "superlink.db"

    @property
    def log(self) -> Path:
        return self.path / "logs" / "superlink.log"

    def check_certificates(self) -> None:
        """Raises RequestError for a certificate that has expired, or is of no use under the server's address."""
        if self.settings.insecure:
            return
        now = datetime.now(UTC)
        text = self.certificate.read_text()
        if (ends := certificates.expiry(self.authority.read_text())) < now:
            raise RequestError(
                f"{self.authority}: the authority's certificate expired on {ends:%Y-%m-%d}; make a new folder with "
                "`lightcl server init --overwrite` and let every board join again"
            )
        if (ends := certificates.expiry(text)) < now:
            raise RequestError(
                f"{self.certificate}: the server's certificate expired on {ends:%Y-%m-%d}; make a new one with "
                "`lightcl server keys --renew` (boards need nothing new); if the date of this machine is wrong, set it"
            )
        if self.settings.address not in (names := certificates.names_of(text)):
            raise RequestError(
                f"server.toml: address is {self.settings.address!r}, but the certificate is for {', '.join(names)}; "
                "run `lightcl server keys --renew`"
            )

    # -- the server that runs ----------------------------------------------------------------------------------

    def running(self) -> dict[str, Any] | None:
        """Process (`pid`) and inner `port` of the server that runs on this folder, or None."""
        try:
            with exclusive(self.path, wait=False):
                return None
        except BlockingIOError:
            pass
        try:
            found: dict[str, Any] = json.loads((self.path / "running.json").read_text())
        except (OSError, ValueError):
            return {}  # it is only starting
        return found


def _check_free(path: Path, overwrite: bool) -> None:
    """Raises RequestError where a new folder may not be made."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RequestError(f"--folder: {path} is a file, not a folder")
    if (path / "server.toml").exists():
        if not overwrite:
            raise RequestError(
                f"--folder: {path} holds a server already; add boards with `lightcl server add-device`, or replace it "
                "with --overwrite (its certificates and keys are lost: every board must join again)"
            )
        try:
            with exclusive(path, wait=False):
                return
        except BlockingIOError as error:
            raise RequestError(f"--overwrite: a server runs on {path}; stop it first") from error
    if names := sorted(file.name for file in path.iterdir()):
        raise RequestError(f"--folder: {path} holds other files ({', '.join(names[:3])}); name another folder")


def write_private(file: Path, text: str) -> None:
    """Replaces a file that only this user may read."""
    before = os.umask(0o077)
    try:
        write_atomically(file, text)
    finally:
        os.umask(before)
