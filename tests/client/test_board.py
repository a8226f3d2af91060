"""The parts of `lightcl device run`, `status`, `logs`, `install` and `doctor` that need no server and no fleet."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from client.board import checks
from client.board.config import BoardConfig, config_of
from client.board.kernel import check_kernels
from client.board.network import reach, split_address
from client.board.node import pause
from client.board.supervise import _alone, is_running, notify
from client.board.unit import unit_text
from client.commands.doctor import run_board_checks
from client.commands.shared import duration
from client.commands.status import last_lines, status_of
from lightcl.errors import RequestError
from lightcl.exchange.join import new_key
from tests.simulations.test_command_line import lightcl

CHECKOUT = Path(__file__).parents[2]


def board(folder: Path, **changes: object) -> BoardConfig:
    least = {"name": "b", "device": 0, "devices": 1, "server": "127.0.0.1:9", "state": str(folder / "state")}
    return config_of({**least, **changes}, "test", folder)


def test_the_pause_grows_with_the_silence() -> None:
    assert [pause(quiet) for quiet in (0, 0.2, 4, 12, 600)] == [0.1, 0.1, 1, 3, 3]


def test_addresses() -> None:
    assert split_address("10.0.0.1:9092") == ("10.0.0.1", 9092)
    assert split_address("[::1]:80") == ("::1", 80)
    for wrong in ("host", ":1", "host:", "host:70000", "a b:1"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            split_address(wrong)


def test_what_is_wrong_with_an_address_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert reach(address) == ""
    assert "is the server running" in reach(address)
    assert "cannot be resolved" in reach("no-such-host.invalid:80")


def test_durations() -> None:
    assert [duration(seconds) for seconds in (-1, 59, 61, 7200, 200_000)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]


def test_a_state_folder_has_one_user(tmp_path: Path) -> None:
    assert not is_running(tmp_path / ".board")
    with _alone(tmp_path / ".board"):
        assert is_running(tmp_path / ".board")
        with pytest.raises(RequestError, match="another `lightcl device run` uses"), _alone(tmp_path / ".board"):
            pass
    assert not is_running(tmp_path / ".board")


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify("WATCHDOG=1")
        assert systemd.recv(100) == b"WATCHDOG=1"
    notify("WATCHDOG=1")  # nobody listens: no error


def test_the_status_of_a_board_that_never_ran(tmp_path: Path) -> None:
    values = status_of(tmp_path / "state", tmp_path / "state" / ".board")
    assert values == {"running": False, "connected": False, "free_mb": None, "newest_state": None, "field": None}


def test_a_stopped_board_is_not_connected_whatever_its_file_says(tmp_path: Path) -> None:
    folder = tmp_path / ".board"
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"connected": True, "started": 0}))
    saved = tmp_path / "abc" / "device-00000" / "state.json"
    saved.parent.mkdir(parents=True)
    saved.touch()
    values = status_of(tmp_path, folder)
    assert (values["running"], values["connected"]) == (False, False)
    assert values["newest_state"] == {"folder": str(saved.parent), "saved": saved.stat().st_mtime}
    (folder / "status.json").write_text("{")
    assert status_of(tmp_path, folder)["running"] is False


def test_the_log_goes_back_into_the_file_before(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("3\n4\n")
    (tmp_path / "log.1").write_text("1\n2\n")
    assert last_lines(tmp_path / "log", 3) == ["2", "3", "4"]
    assert last_lines(tmp_path / "log", 1) == ["4"]


def test_a_node_that_refuses_its_key_ends_the_run(tmp_path: Path) -> None:
    """The node is a process of its own; what it says is in the log."""
    (tmp_path / "key").write_text("no key")
    file = tmp_path / "device.toml"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        file.write_text(board(tmp_path, server=address, key="key").to_toml())
        done = subprocess.run(
            [sys.executable, "-m", "simulations.main", "device", "run", "--config", file], capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "is not a readable private key" in (tmp_path / "state" / ".board" / "log").read_text()


# -- install -------------------------------------------------------------------------------------------------------


def test_the_unit(tmp_path: Path) -> None:
    text = unit_text(
        name="b 100%", program=Path("/opt/a b/lightcl"), config=Path("/etc/d.toml"), user="pi", memory_mb=800
    )
    lines = text.splitlines()
    assert 'ExecStart="/opt/a b/lightcl" device run --config /etc/d.toml' in lines
    assert {"User=pi", "MemoryMax=800M", "Restart=always", "WantedBy=multi-user.target"} <= set(lines)
    assert "Description=LightCL board b 100%%" in lines
    own = unit_text(name="b", program=Path("/bin/true"), config=Path("/etc/d.toml"), user="", memory_mb=0).splitlines()
    assert "WantedBy=default.target" in own
    assert not [line for line in own if line.startswith(("User=", "MemoryMax="))]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "lightcl-device.service"
    unit.write_text(
        unit_text(name="b", program=Path("/bin/true"), config=tmp_path / "a b.toml", user="root", memory_mb=800)
    )
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_install_prints_the_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "device.toml"
    file.write_text(board(tmp_path, memory_mb=700).to_toml())
    assert lightcl(monkeypatch, "device", "install", "--config", str(file), "--print", "--user") == 0
    said = capfd.readouterr().out
    assert f"device run --config {file}" in said
    assert "MemoryMax=700M" in said


# -- doctor --------------------------------------------------------------------------------------------------------


def test_a_training_step_on_the_cpu_is_right() -> None:
    assert "differs by" in check_kernels(torch.device("cpu"))


def test_an_accelerator_that_computes_wrong_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    relu = torch.nn.functional.relu
    monkeypatch.setattr("torch.nn.functional.relu", lambda x: relu(x) + (0.01 if x.dtype == torch.float32 else 0))
    with pytest.raises(RequestError, match="wrong results of a training step"):
        check_kernels(torch.device("cpu"))


def test_a_check_that_needs_a_failed_one_is_left_out() -> None:
    def fail() -> str:
        raise RequestError("no")

    found = run_board_checks({"port": fail, "tls": lambda: "yes", "clock": lambda: "yes", "data": lambda: "there"})
    assert [(one.name, one.passed, one.text) for one in found] == [("data", True, "there")]
    found = run_board_checks({"name": lambda: "a", "port": fail, "tls": lambda: "yes"})
    assert [(one.name, one.passed) for one in found] == [("name", True), ("port", False)]


def test_keys_data_and_disk(tmp_path: Path) -> None:
    private, _ = new_key()
    key = tmp_path / "key"
    key.write_text(private)
    key.chmod(0o644)
    with pytest.raises(RequestError, match="chmod 600"):
        checks.check_key(board(tmp_path, key="key"))
    key.chmod(0o600)
    assert checks.check_key(board(tmp_path, key="key")).endswith("mode 600")
    key.write_text("no key")
    with pytest.raises(RequestError, match="not a readable private key"):
        checks.check_key(board(tmp_path, key="key"))
    with pytest.raises(RequestError, match="is its disk mounted"):
        checks.check_data(board(tmp_path, data="none"))
    with pytest.raises(RequestError, match="own_data is true, but data is not set"):
        checks.check_data(board(tmp_path, own_data=True))
    with pytest.raises(RequestError, match="delete_learned is true, but data is not set"):
        checks.check_data(board(tmp_path, delete_learned=True))
    assert checks.check_data(board(tmp_path, data=".", delete_learned=True)).endswith("may be deleted (delete_learned)")
    free = shutil.disk_usage(tmp_path).free // 10**6
    with pytest.raises(RequestError, match="MB free, at least"):
        checks.check_disk(board(tmp_path, limits={"free_disk_mb": 2 * free + 1000}))


def certificate(folder: Path, ends: datetime, begins: datetime | None = None) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    import ipaddress

    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins or datetime.now(UTC) - timedelta(days=400)).not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    files = folder / "ca.pem", folder / "server.key"
    files[0].write_bytes(made.public_bytes(Encoding.PEM))
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


@contextmanager
def web_server(tls: tuple[Path, Path] | None = None, date: str = "") -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return date or super().date_time_string(timestamp)  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_the_servers_certificate_is_checked(tmp_path: Path) -> None:
    files = certificate(tmp_path, datetime.now(UTC) + timedelta(days=400))
    other = tmp_path / "other"
    other.mkdir()
    certificate(other, datetime.now(UTC) + timedelta(days=400))
    with web_server(files) as address:
        good = board(tmp_path, server=address, certificate="ca.pem")
        answer = checks.ask(good)
        assert "valid until" in checks.check_tls(answer)
        assert "within 1 s" in checks.check_clock(answer)
        with pytest.raises(RequestError, match="the server's certificate is not accepted"):
            checks.ask(board(tmp_path, server=address, certificate=str(other / "ca.pem")))
        with pytest.raises(RequestError, match="does it use TLS"):
            checks.ask(board(tmp_path, server=address, insecure=True))
    with web_server() as address:
        assert "no TLS" in checks.check_tls(checks.ask(board(tmp_path, server=address, insecure=True)))
        with pytest.raises(RequestError, match="does not speak TLS"):
            checks.ask(board(tmp_path, server=address, certificate="ca.pem"))


def test_a_clock_that_is_off_is_found(tmp_path: Path) -> None:
    with (
        web_server(date="Thu, 01 Jan 2015 00:00:00 GMT") as address,
        pytest.raises(RequestError, match="s ahead of the server's; switch time synchronization on"),
    ):
        checks.check_clock(checks.ask(board(tmp_path, server=address, insecure=True)))


def test_an_expired_certificate_is_found(tmp_path: Path) -> None:
    certificate(tmp_path, datetime.now(UTC) - timedelta(days=1))
    with pytest.raises(RequestError, match="expired on"):
        checks.check_certificate(board(tmp_path, certificate="ca.pem"))
    certificate(tmp_path, datetime.now(UTC) + timedelta(days=10))
    assert "renew it" in checks.check_certificate(board(tmp_path, certificate="ca.pem"))
    days = timedelta(days=1)
    certificate(tmp_path, datetime.now(UTC) + 9 * days, datetime.now(UTC) + days)
    with pytest.raises(RequestError, match="is this clock right"):
        checks.check_certificate(board(tmp_path, certificate="ca.pem"))
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(RequestError, match="not a certificate in PEM format"):
        checks.check_certificate(board(tmp_path, certificate="ca.pem"))


def test_doctor_says_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "device.toml"
    file.write_text(board(tmp_path, insecure=True, devices=10).to_toml())
    assert lightcl(monkeypatch, "device", "doctor", "quickstart", "--config", str(file), "--json") == 1
    found = {one["name"]: one for one in json.loads(capfd.readouterr().out)}
    assert [name for name, one in found.items() if not one["passed"]] == ["port"]
    of_scenario = [name.removeprefix("scenario: ") for name in found if name.startswith("scenario: ")]
    assert of_scenario == ["node configuration", "data", "network", "memory"], "the board's own checks are not repeated"
    assert "is the server running" in found["port"]["text"]
    assert "a training step takes" in found["scenario: memory"]["text"]
    file.write_text(board(tmp_path, insecure=True, devices=10, memory_mb=64).to_toml())
    assert lightcl(monkeypatch, "device", "doctor", "quickstart", "--config", str(file)) == 1
    assert "memory_mb is 64: raise it" in capfd.readouterr().out
    assert lightcl(monkeypatch, "device", "doctor", "--config", str(file), "--set", "seed=1") == 2
    assert not list((tmp_path / "state").iterdir())


def test_the_unit_in_deploy_is_the_one_that_install_writes() -> None:
    text = unit_text(
        name="device", program=Path("/opt/lightcl/.venv/bin/lightcl"), config=Path("/etc/lightcl/device.toml"),
        user="lightcl", memory_mb=0,
    )  # fmt: skip
    assert (CHECKOUT / "deploy" / "lightcl-device.service").read_text() == text
