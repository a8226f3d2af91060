"""The configuration of a board: one TOML file, which `lightcl device init` writes. Light at import."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from client.board.network import split_address
from lightcl.errors import RequestError, nearest, one_line, shown

ACCELERATORS = ("", "auto", "cpu", "cuda")
PATHS = ("data", "weights", "state", "certificate", "key")

_HEADER = """\
# This board in the fleet; written by `lightcl device init`. An empty text or 0 stands for "not set".
# After a change: lightcl device doctor, then restart `lightcl device run`.
"""


@dataclass(frozen=True)
class Limits:
    """When the board backs off. 0 stands for no limit."""

    temperature_c: float = 0
    """The hottest sensor may have this many degrees Celsius."""
    free_disk_mb: int = 0
    """At least this many megabytes are left on the state folder's disk."""
    battery_percent: int = 0
    """At least this much charge is left, where there is a battery."""


@dataclass(frozen=True)
class BoardConfig:
    """The keys of the file. Paths are absolute once read."""

    name: str
    """The board's name in the records."""
    device: int
    """The device of the fleet that this board is, from 0."""
    devices: int
    """Devices in the fleet."""
    server: str
    """HOST:PORT of the server."""
    data: str = ""
    """Folder or file of its own images, in place of the scenario's `data.path`."""
    own_data: bool = False
    """All images under `data` are this board's; otherwise it takes its share of them."""
    delete_learned: bool = False
    """Learned images under `data` may be deleted, as the scenario's `data.keep` says. Without it the board refuses."""
    weights: str = ""
    """Its copy of the pre-trained weights, in place of the scenario's `network.weights`."""
    state: str = ""
    """Folder for its state and log. Empty: $LIGHTCL_STATE, else ~/.local/state/lightcl."""
    certificate: str = ""
    """The certificate of the server's authority (PEM). Empty: those of the system."""
    key: str = ""
    """The board's private key (OpenSSH, ECDSA). Empty: it joins without one."""
    insecure: bool = False
    """No TLS: only in a network that you trust."""
    accelerator: str = ""
    """auto, cpu or cuda, in place of the scenario's `device.accelerator`."""
    threads: int = 0
    """PyTorch threads, in place of the scenario's `device.threads`."""
    memory_mb: int = 0
    """Memory budget: `doctor` compares it with the scenario's footprint, and the systemd unit enforces it."""
    idle_minutes: float = 10
    """After so many minutes without a message the memory of PyTorch and of the images is given back. 0: never."""
    limits: Limits = field(default_factory=Limits)

    @property
    def state_folder(self) -> Path:
        """Where the states of the devices lie."""
        return Path(self.state) if self.state else default_state_folder()

    @property
    def board_folder(self) -> Path:
        """Lock, status and log of `lightcl device run`, beside the states of the runs."""
        return self.state_folder / ".board"

    def node_config(self) -> dict[str, bool | int | float | str]:
        """The same as Flower's node configuration, which `client.app` reads; keys that are not set are left out."""
        values: dict[str, bool | int | float | str] = {
            "data-path": self.data,
            "weights-path": self.weights,
            "own-data": self.own_data,
            "delete-learned": self.delete_learned,
            "accelerator": self.accelerator,
            "threads": self.threads,
            "limit-temperature-c": self.limits.temperature_c,
            "limit-free-disk-mb": self.limits.free_disk_mb,
            "limit-battery-percent": self.limits.battery_percent,
        }
        return {
            "name": self.name, "partition-id": self.device, "num-partitions": self.devices,
            "state-dir": str(self.state_folder), **{key: value for key, value in values.items() if value},
        }  # fmt: skip

    def to_toml(self) -> str:
        return _HEADER + tomli_w.dumps(asdict(self))


def default_state_folder() -> Path:
    """`$LIGHTCL_STATE`, else `~/.local/state/lightcl`."""
    return Path(os.environ.get("LIGHTCL_STATE") or Path.home() / ".local" / "state" / "lightcl")


def default_file() -> Path:
    """`$LIGHTCL_DEVICE`, else `~/.config/lightcl/device.toml`."""
    return Path(os.environ.get("LIGHTCL_DEVICE") or Path.home() / ".config" / "lightcl" / "device.toml").expanduser()


def read_config(file: Path) -> BoardConfig:
    """Raises RequestError where the file is missing or a key is missing, unknown or not allowed."""
    try:
        values = tomllib.loads(file.read_text())
    except FileNotFoundError as error:
        raise RequestError(f"{file} does not exist; run `lightcl device init`, or set LIGHTCL_DEVICE") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RequestError(f"{file}: not a configuration of a board ({one_line(str(error), 200)})") from error
    return config_of(values, str(file), file.parent)


def config_of(values: Mapping[str, Any], where: str, folder: Path) -> BoardConfig:
    """A configuration from values as a TOML file has them; relative paths start at `folder`.

    `where` is the source of the values for errors. Raises RequestError.
    """
    limits = values.get("limits", {})
    if not isinstance(limits, Mapping):
        raise RequestError(f"{where}: limits is {shown(limits)}, expected a table ([limits])")
    _check_table(values, BoardConfig, "", where)
    _check_table(limits, Limits, "limits.", where)
    config = BoardConfig(**{**values, "limits": Limits(**limits)})
    if not config.device < config.devices:
        raise RequestError(
            f"{where}: device is {config.device}, but devices is {config.devices} (allowed: 0 to {config.devices - 1})"
        )
    if config.insecure and (config.key or config.certificate):
        raise RequestError(
            f"{where}: insecure is true, but a key or certificate is set, which needs TLS; remove one or the other"
        )
    paths = {name: str(folder / Path(value).expanduser()) for name in PATHS if (value := getattr(config, name))}
    return replace(config, **paths)  # type: ignore[arg-type]


def _check_table(values: Mapping[str, Any], table: type, prefix: str, where: str) -> None:
    known = {one.name: one for one in fields(table)}
    for name in values:
        if name not in known:
            raise RequestError(
                f"{where}: unknown key {prefix}{name!s}{nearest(name, known)} (allowed: {', '.join(known)})"
            )
    for name, one in known.items():
        if name in values and name != "limits":
            kind, allowed, fits = _RULES[prefix + name]
            value = values[name]
            right = type(value) is kind or (kind is float and type(value) is int)
            if not right or not fits(value):
                raise RequestError(f"{where}: {prefix}{name} is {shown(value)} (allowed: {allowed})")
        elif name not in values and prefix + name in ("name", "device", "devices", "server"):
            raise RequestError(f"{where}: {one.name} is missing (allowed: {_RULES[name][1]})")


def _is_address(text: str) -> bool:
    try:
        split_address(text)
    except ValueError:
        return False
    return True


Rule = tuple[type, str, Callable[[Any], bool]]
"""The type of a value, what is allowed in words, and whether a value of that type is."""


def _rule(kind: type, allowed: str, fits: Callable[[Any], bool] = lambda _: True) -> Rule:
    return kind, allowed, fits


_PATH = _rule(str, "a path in quotes", lambda text: "\0" not in text and "\n" not in text)
_FLAG = _rule(bool, "true or false")
_RULES = {
    "name": _rule(str, "1 to 64 printable characters", lambda text: 0 < len(text) <= 64 and text.isprintable()),
    "device": _rule(int, "a whole number from 0 to devices - 1", lambda number: number >= 0),
    "devices": _rule(int, "a whole number from 1", lambda number: number >= 1),
    "server": _rule(str, "HOST:PORT, e.g. 192.168.0.10:9092", _is_address),
    "data": _PATH,
    "own_data": _FLAG,
    "delete_learned": _FLAG,
    "weights": _PATH,
    "state": _PATH,
    "certificate": _PATH,
    "key": _PATH,
    "insecure": _FLAG,
    "accelerator": _rule(str, "auto, cpu, cuda, or empty for the scenario's", lambda text: text in ACCELERATORS),
    "threads": _rule(int, "0 for the scenario's, else 1 to 1024", lambda number: 0 <= number <= 1024),
    "memory_mb": _rule(int, "0 for no budget, else at least 64", lambda number: number == 0 or number >= 64),
    "idle_minutes": _rule(float, "0 for never, else minutes", lambda number: 0 <= number < float("inf")),
    "limits.temperature_c": _rule(float, "0 for no limit, else 20 to 150", lambda x: x == 0 or 20 <= x <= 150),
    "limits.free_disk_mb": _rule(int, "0 for no limit, else megabytes", lambda number: number >= 0),
    "limits.battery_percent": _rule(int, "0 for no limit, else 1 to 99", lambda number: 0 <= number <= 99),
}  # fmt: skip
