"""The checks of `lightcl device doctor` that need no scenario. Each returns what was found, or raises what to do."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from client.board.config import BoardConfig
from client.board.network import reach, split_address, unresolved
from client.board.setup import public_key
from client.board.supervise import is_running
from lightcl.errors import Failure, RequestError

_CLOCK_SECONDS = 60
_SOON_DAYS = 30
_PROBE_SECONDS = 60


def check_python(config: BoardConfig) -> str:
    return f"Python {sys.version.split()[0]} on {os.uname().machine}"


def check_torch(config: BoardConfig) -> str:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    return f"PyTorch {torch.__version__}, {built}"


def check_kernel(config: BoardConfig, wanted: str) -> str:
    """`wanted` is the accelerator of the scenario, which the board's own setting overrides."""
    from client.board.kernel import check_kernels, memory_text
    from lightcl.device.hardware import choose_accelerator

    device = choose_accelerator(config.accelerator or wanted)
    found = check_kernels(device)
    return f"{memory_text(device)}; {found}"


def check_disk(config: BoardConfig) -> str:
    folder = _existing(config.state_folder)
    free = shutil.disk_usage(folder).free // 10**6
    least = max(config.limits.free_disk_mb, 100)
    if free < least:
        raise RequestError(
            f"{folder}: {free} MB free, at least {least} are needed; remove states of old runs, or set another `state`"
        )
    return f"{free} MB free for {config.state_folder}"


def check_state(config: BoardConfig) -> str:
    """Writes and removes a file, and reads all states of devices."""
    import warnings

    from lightcl.storage.state import StateFolder

    folder = config.state_folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        pass
    found = sorted(file.parent for file in folder.glob("*/device-*/state.json"))
    older = 0
    for device in found:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            StateFolder(device).load()
        older += bool(seen)
    text = f"{folder} is writable, {len(found)} saved states can be read"
    return text + (f"; {older} of them only in the generation before the last" if older else "")


def check_data(config: BoardConfig) -> str:
    if not config.data:
        for name in ("own_data", "delete_learned"):
            if getattr(config, name):
                raise RequestError(
                    f"{name} is true, but data is not set; set data to the folder of this board's images"
                )
        return "no images of its own; the scenario's data.path is used, which data.source: field refuses"
    path = Path(config.data)
    if not path.exists():
        raise RequestError(f"data: {path} does not exist; is its disk mounted?")
    if path.is_dir():
        allowed = "; learned images may be deleted (delete_learned)" if config.delete_learned else ""
        return f"{path}: {sum(1 for _ in path.iterdir())} entries{allowed}"
    with path.open("rb"):
        return f"{path}: {path.stat().st_size / 1e6:.1f} MB"


def check_name(config: BoardConfig) -> str:
    host, port = split_address(config.server)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise RequestError(unresolved(host, error)) from error
    return f"{host} is {found[0][4][0]}"


def check_port(config: BoardConfig) -> str:
    if problem := reach(config.server):
        raise RequestError(problem)
    return f"{config.server} accepts connections"


@dataclass(frozen=True)
class Answer:
    """What a server says to a plain request: the Date header, and its certificate under TLS."""

    date: str | None
    received: float
    """By this machine's clock, in seconds since 1970."""
    certificate: Mapping[str, object] | None


def check_tls(answer: Answer) -> str:
    """The server has answered: its certificate is the authority's and names it, or there is no TLS on either side."""
    if answer.certificate is None:
        return "no TLS (insecure = true): only for a network that you trust"
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(answer.certificate["notAfter"])), UTC)
    return f"the server's certificate is valid until {ends:%Y-%m-%d}{_soon(ends)}"


def check_clock(answer: Answer) -> str:
    """This machine's clock against the server's, from the Date header of its answer."""
    if not answer.date:
        return "not checked: the server's answers carry no time"
    off = answer.received - parsedate_to_datetime(answer.date).timestamp()
    if abs(off) > _CLOCK_SECONDS:
        raise RequestError(
            f"the clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the server's; switch time "
            "synchronization on (timedatectl set-ntp true), or set the clock; certificates are checked against it"
        )
    return f"within {max(abs(off), 1):.0f} s of the server's"


def check_key(config: BoardConfig) -> str:
    if not config.key:
        return "none: the server must allow boards without keys"
    file = Path(config.key)
    public_key(file)
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise RequestError(f"{file} can be read by others (mode {mode:o}); run: chmod 600 {file}")
    return f"{file}, mode {mode:o}"


def check_certificate(config: BoardConfig) -> str:
    """The authority's certificate, which this board trusts."""
    if not config.certificate:
        return "none set" + ("" if config.insecure else "; those of the system are used")
    from cryptography import x509

    file = Path(config.certificate)
    try:
        loaded = x509.load_pem_x509_certificate(file.read_bytes())
    except ValueError as error:
        raise RequestError(f"{file} is not a certificate in PEM format; copy it again from the server") from error
    begins, ends, now = loaded.not_valid_before_utc, loaded.not_valid_after_utc, datetime.now(UTC)
    if now < begins:
        raise RequestError(f"{file} is not valid before {begins:%Y-%m-%d}; is this clock right ({now:%Y-%m-%d})?")
    if now > ends:
        raise RequestError(f"{file} expired on {ends:%Y-%m-%d}; renew the server's certificates and copy it again")
    return f"{file}, valid until {ends:%Y-%m-%d}{_soon(ends)}"


def check_sensors(config: BoardConfig) -> str:
    from lightcl.device.telemetry import Sensors

    found = Sensors().found()
    return "; ".join(f"{kind}: {text}" for kind, text in found.items()) or "none found; no limits of heat or battery"


def check_accepted(config: BoardConfig, file: Path) -> str:
    """Joins the fleet for a moment, in a process of its own. A board that runs is in the fleet already."""
    if is_running(config.board_folder):
        return "`lightcl device run` is running; see `lightcl device status`"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "client.board.node", str(file), "--probe"], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False,
            env={"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", **os.environ},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RequestError(f"the server did not answer within {_PROBE_SECONDS} s; is it a SuperLink?") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise Failure(said[-1] if said else f"the node ended with {done.returncode}")
    return "the server lets this board join"


def ask(config: BoardConfig) -> Answer:
    """Sends the server a plain request. Raises RequestError where its certificate or its answer is wrong."""
    host, port = split_address(config.server)
    link: http.client.HTTPConnection
    if config.insecure:
        link = http.client.HTTPConnection(host, port, timeout=10)
    else:
        trusted = ssl.create_default_context(cafile=config.certificate or None)
        link = http.client.HTTPSConnection(host, port, timeout=10, context=trusted)
    try:
        link.connect()
        certificate = link.sock.getpeercert() if isinstance(link.sock, ssl.SSLSocket) else None
        link.request("GET", "/")
        return Answer(link.getresponse().headers.get("Date"), time.time(), certificate)
    except ssl.SSLCertVerificationError as error:
        raise RequestError(
            f"the server's certificate is not accepted ({error.verify_message}); check `certificate`, the address in "
            "`server` (the certificate must name it) and this machine's clock"
        ) from error
    except (ssl.SSLError, http.client.HTTPException, ConnectionError) as error:
        if isinstance(error, ConnectionRefusedError):
            raise RequestError(reach(config.server) or str(error)) from error
        wanted = "does not speak plain HTTP; does it use TLS? Then remove `insecure` and set `certificate`"
        if not config.insecure:
            wanted = "does not speak TLS; if it runs without, and the network is trusted, set insecure = true"
        raise RequestError(f"{config.server} {wanted} ({type(error).__name__})") from error
    except OSError as error:
        raise RequestError(reach(config.server) or f"{config.server}: {error}") from error
    finally:
        link.close()


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _soon(ends: datetime) -> str:
    days = (ends - datetime.now(UTC)).days
    return f", in {days} days: renew it" if days < _SOON_DAYS else ""
