"""`lightcl server init`, `add-device` and `keys`: what they write, and what they refuse without writing."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lightcl.errors import RequestError
from lightcl.exchange.join import JoinFile, new_key
from server.link import certificates
from server.link.devices import Devices, flower_keys
from server.link.folder import ServerFolder, Settings
from server.link.superlink import check_port, pause_before_restart
from tests.simulations.test_command_line import lightcl

ADDRESS = ("--address", "192.168.0.10")


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    return ServerFolder.create(
        tmp_path / "server", Settings("192.168.0.10", devices=3), ["192.168.0.10"], overwrite=False
    )


def test_the_commands_make_what_boards_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIGHTCL_SERVER", str(tmp_path / "server"))
    assert lightcl(monkeypatch, "server", "init", *ADDRESS, "--address", "fleet.example", "--devices", 2) == 0
    assert "192.168.0.10:9092" in capfd.readouterr().out
    folder = ServerFolder.open(None)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    for file in (folder.authority_key, folder.certificate, folder.path / "join" / "board-0.toml"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    joins = [JoinFile.read(folder.path / "join" / f"board-{number}.toml") for number in range(2)]
    assert [(join.name, join.device, join.devices, join.server) for join in joins] == [
        ("board-0", 0, 2, "192.168.0.10:9092"),
        ("board-1", 1, 2, "192.168.0.10:9092"),
    ]
    assert joins[0].certificate == folder.authority.read_text()
    assert joins[0].key != joins[1].key
    assert certificates.names_of(folder.certificate.read_text())[:2] == ["192.168.0.10", "fleet.example"]
    assert lightcl(monkeypatch, "server", "keys") == 0
    shown = capfd.readouterr().out
    assert all(certificates.key_fingerprint(one.public_key) in shown for one in Devices(folder).all())
    assert lightcl(monkeypatch, "server", "devices") == 0
    assert "no server runs on this folder" in capfd.readouterr().err


def test_an_existing_folder_is_refused_and_stays_as_it_is(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()}
    assert lightcl(monkeypatch, "server", "init", *ADDRESS, "--folder", folder.path) == 2
    assert "holds a server already" in capfd.readouterr().err
    assert {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()} == before
    assert lightcl(monkeypatch, "server", "init", *ADDRESS, "--folder", folder.path, "--overwrite") == 0
    assert folder.authority.read_bytes() != before[folder.authority]


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    assert lightcl(monkeypatch, "server", "init", *ADDRESS, "--folder", tmp_path, "--overwrite") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_nothing_is_left_of_a_folder_that_could_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert lightcl(monkeypatch, "server", "init", *ADDRESS, "--folder", tmp_path / "file" / "server") == 2

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ServerFolder, "save", full)
    assert lightcl(monkeypatch, "server", "init", *ADDRESS, "--folder", tmp_path / "server") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_boards_are_added_until_the_fleet_is_full(folder: ServerFolder) -> None:
    devices = Devices(folder)
    devices.add("kitchen")
    devices.add("roof", number=2)
    devices.add("garden")
    assert [(one.device, one.name) for one in devices.all()] == [(0, "kitchen"), (1, "garden"), (2, "roof")]
    with pytest.raises(RequestError, match="kitchen, garden, roof"):
        devices.add("cellar")
    with pytest.raises(RequestError, match="is board 'roof'"):
        devices.add("cellar", number=2)
    with pytest.raises(RequestError, match="allowed: 0 to 2"):
        devices.add("cellar", number=3)
    with pytest.raises(RequestError, match="'garden' exists"):
        devices.add("garden")
    with pytest.raises(RequestError, match="NAME is"):
        devices.add("../x")


def test_a_board_may_bring_its_own_key_and_get_a_new_one(folder: ServerFolder) -> None:
    devices, (_, public) = Devices(folder), new_key()
    file = devices.add("kitchen", public_key=public + " root@kitchen\n")
    assert JoinFile.read(file).key == ""
    (one,) = devices.all()
    assert one.public_key == public
    with pytest.raises(RequestError, match="'kitchen' has this key"):
        devices.add("roof", public_key=public)
    devices.note_node(one, "77")
    devices.add("kitchen", replaces=True)
    (again,) = devices.all()
    assert (again.device, again.node, again.retired) == (0, "", "77")
    assert again.public_key != public
    assert len(flower_keys([one, again])) == 2
    devices.note_node(one, "78")  # the old key's number comes late
    assert devices.all() == [again]
    with pytest.raises(RequestError, match="no board 'roof'"):
        devices.add("roof", replaces=True)


def test_the_number_of_boards_is_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = ("--folder", tmp_path / "server")
    assert lightcl(monkeypatch, "server", "init", *ADDRESS, *place) == 0
    assert lightcl(monkeypatch, "server", "add-device", "a", *place) == 2
    assert "--devices N" in capfd.readouterr().err
    assert lightcl(monkeypatch, "server", "add-device", "a", "--devices", 2, *place) == 0
    assert lightcl(monkeypatch, "server", "add-device", "b", *place) == 0
    assert JoinFile.read(tmp_path / "server" / "join" / "b.toml").devices == 2
    assert lightcl(monkeypatch, "server", "add-device", "c", "--devices", 1, *place) == 2
    capfd.readouterr()
    assert lightcl(monkeypatch, "server", "add-device", "c", "--devices", 3, *place) == 0
    assert "set devices = 3" in capfd.readouterr().err
    missing = ("--public-key", tmp_path / "no.pub")
    assert lightcl(monkeypatch, "server", "add-device", "d", "--devices", 4, *missing, *place) == 2
    assert ServerFolder.open(tmp_path / "server").settings.devices == 3


def test_a_server_without_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ("--folder", tmp_path / "server")
    assert lightcl(monkeypatch, "server", "init", *ADDRESS, "--insecure", "--devices", 1, *place) == 0
    join = JoinFile.read(tmp_path / "server" / "join" / "board-0.toml")
    assert (join.certificate, join.key) == ("", "")
    assert not list((tmp_path / "server").glob("*.pem"))
    assert lightcl(monkeypatch, "server", "keys", *place) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("port = 9092", "port = 99999"), "port is 99999"),
        (lambda text: text.replace("port = 9092", 'port = "9092"'), "expected int"),
        (lambda text: text.replace("devices =", "device ="), "did you mean 'devices'"),
        (lambda text: text + "x = [", "not TOML"),
    ],
)
def test_settings_with_a_mistake(folder: ServerFolder, change: object, said: str) -> None:
    file = folder.path / "server.toml"
    file.write_text(change(file.read_text()))  # type: ignore[operator]
    with pytest.raises(RequestError, match=said):
        ServerFolder.open(folder.path)


def test_a_damaged_or_missing_folder(folder: ServerFolder, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="lightcl server init"):
        ServerFolder.open(tmp_path / "nowhere")
    folder.authority_key.unlink()
    with pytest.raises(RequestError, match=r"lacks ca\.key"):
        ServerFolder.open(folder.path)


def test_an_expired_certificate_stops_the_start_and_is_renewed(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder.check_certificates()
    monkeypatch.setattr(certificates, "SERVER_DAYS", -1)
    monkeypatch.setattr(certificates, "CLOCK_DAYS", 3)
    folder.renew(["192.168.0.10"])
    assert certificates.expiry(folder.certificate.read_text()) < datetime.now(UTC)
    assert lightcl(monkeypatch, "server", "run", "quickstart", "--folder", folder.path) == 2
    assert "lightcl server keys --renew" in capfd.readouterr().err
    monkeypatch.setattr(certificates, "SERVER_DAYS", 730)
    assert lightcl(monkeypatch, "server", "keys", "--folder", folder.path) == 0
    assert "server certificate: EXPIRED" in capfd.readouterr().out
    assert lightcl(monkeypatch, "server", "keys", "--renew", "--address", "fleet.example", "--folder", folder.path) == 0
    folder.check_certificates()
    assert "fleet.example" in certificates.names_of(folder.certificate.read_text())
    assert certificates.expiry(folder.certificate.read_text()) > datetime.now(UTC) + timedelta(days=700)


def test_an_address_that_the_certificate_does_not_have(folder: ServerFolder) -> None:
    file = folder.path / "server.toml"
    file.write_text(file.read_text().replace("192.168.0.10", "10.0.0.7"))
    with pytest.raises(RequestError, match=r"address is '10\.0\.0\.7'"):
        ServerFolder.open(folder.path).check_certificates()


def test_a_port_in_use() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RequestError, match="cannot be used"):
            check_port("127.0.0.1", taken.getsockname()[1])


def test_pauses_before_restarts() -> None:
    assert [pause_before_restart(deaths) for deaths in (1, 2, 3, 6, 7, 50)] == [1, 2, 4, 32, 60, 60]
