"""The boards of a fleet, as the server knows them: one file each, and the join file that a board gets."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from lightcl.errors import RequestError
from lightcl.exchange.join import JoinFile, new_key
from lightcl.storage.files import exclusive
from server.link.certificates import check_public_key
from server.link.folder import ServerFolder, write_private

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Device:
    """A board. `node` is the number by which Flower knows it; empty until it is registered there.

    `retired` is the number of the key that it had before, until Flower has forgotten it.
    """

    name: str
    device: int
    public_key: str
    added: str
    node: str = ""
    retired: str = ""

    @classmethod
    def read(cls, file: Path) -> Self:
        try:
            return cls(**tomllib.loads(file.read_text()))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, TypeError) as error:
            raise RequestError(
                f"{file} cannot be read ({error}); restore it, or delete it and add the board again"
            ) from error


class Devices:
    """The boards of a server's folder."""

    def __init__(self, folder: ServerFolder) -> None:
        self.folder = folder
        self._files = folder.path / "devices"

    def all(self) -> list[Device]:
        """By device number."""
        return sorted((Device.read(file) for file in self._files.glob("*.toml")), key=lambda one: one.device)

    def save(self, device: Device) -> None:
        import tomli_w

        write_private(self._files / f"{device.name}.toml", tomli_w.dumps(asdict(device)))

    def note_node(self, device: Device, node: str) -> None:
        """Keeps by which number Flower knows a board, unless the board has got another key meanwhile."""
        with exclusive(self._files):
            now = Device.read(self._files / f"{device.name}.toml")
            if now.public_key == device.public_key:
                self.save(replace(now, node=node, retired=""))

    def add(
        self, name: str, *, public_key: str | None = None, number: int | None = None, replaces: bool = False
    ) -> Path | None:
        """Adds a board with a new key pair and writes its join file; returns that file.

        With `public_key` the board has made the pair itself: there is a join file too, without a key. A board that
        `replaces` the one of that name gets its number. Raises RequestError.
        """
        if not NAME.fullmatch(name):
            raise RequestError(
                f"NAME is {name!r} (allowed: letters, digits, '.', '_' and '-', 63 at most, beginning with a letter or "
                "digit)"
            )
        settings = self.folder.settings
        with exclusive(self._files):
            known = {one.name: one for one in self.all()}
            if replaces and name not in known:
                raise RequestError(f"--replace: there is no board {name!r} (boards: {', '.join(known) or 'none'})")
            if name in known and not replaces:
                raise RequestError(f"board {name!r} exists; replace its key with --replace, or choose another name")
            if replaces:
                number = known[name].device
            others = [one for one in known.values() if one.name != name]
            number = _free_number(number, {one.device: one.name for one in others}, settings.devices)
            private = ""
            if public_key is None and not settings.insecure:
                private, public_key = new_key()
            key = check_public_key(public_key) if public_key else ""
            taken = next((one.name for one in others if key and one.public_key == key), None)
            if taken:
                raise RequestError(f"--public-key: board {taken!r} has this key; each board needs its own")
            if key and name in known and known[name].public_key == key:
                raise RequestError(f"--public-key: board {name!r} has this key already")
            join = JoinFile(
                name, number, settings.devices, settings.server,
                certificate="" if settings.insecure else self.folder.authority.read_text(), key=private,
            )  # fmt: skip
            file = self.folder.path / "join" / f"{name}.toml"
            write_private(file, join.to_toml())
            now = datetime.now(UTC).isoformat(timespec="seconds")
            retired = (known[name].node or known[name].retired) if name in known else ""
            self.save(Device(name, number, key, now, retired=retired))
        return file


def _free_number(asked: int | None, taken: dict[int, str], devices: int) -> int:
    """The device of the fleet that a new board is. Raises RequestError."""
    if asked is not None and asked in taken:
        raise RequestError(f"--device {asked} is board {taken[asked]!r}; choose another number")
    free = [number for number in range(devices) if number not in taken]
    if asked is None and not free:
        raise RequestError(
            f"the fleet has {devices} boards ({', '.join(taken[one] for one in sorted(taken))}); for more of them set "
            "--devices to the new number, and change it on the boards that have joined"
        )
    if asked is not None and not 0 <= asked < devices:
        raise RequestError(f"--device is {asked}, but the fleet has {devices} boards (allowed: 0 to {devices - 1})")
    return free[0] if asked is None else asked


def flower_keys(devices: Iterable[Device]) -> frozenset[str]:
    """The keys of boards as their requests carry them: Base64 of PEM."""
    import base64

    from server.link.certificates import as_flower_sends_it

    return frozenset(base64.b64encode(as_flower_sends_it(one.public_key)).decode() for one in devices if one.public_key)
