"""The configuration file of a board: what is read, written and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from client.app import local_settings
from client.board.config import BoardConfig, Limits, config_of, default_file, read_config
from lightcl.errors import RequestError
from lightcl.exchange.join import JoinFile, new_key
from tests.simulations.test_command_line import lightcl

LEAST = {"name": "drone-1", "device": 1, "devices": 3, "server": "server.example:9092"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    config = BoardConfig(
        **LEAST, data=str(tmp_path / "images"), own_data=True, delete_learned=True, state=str(tmp_path / "state"),
        insecure=True, threads=2, accelerator="cpu", memory_mb=512, limits=Limits(85.5, 200, 20),
    )  # fmt: skip
    file = tmp_path / "device.toml"
    file.write_text(config.to_toml())
    assert read_config(file) == config


def test_the_node_configuration_is_what_the_app_reads(tmp_path: Path) -> None:
    values = {"state": "state", "data": "images", "delete_learned": True, "limits": {"temperature_c": 80}}
    config = config_of(LEAST | values, "test", tmp_path)
    node = config.node_config()
    assert node == {
        "name": "drone-1", "partition-id": 1, "num-partitions": 3, "state-dir": str(tmp_path / "state"),
        "data-path": str(tmp_path / "images"), "delete-learned": True, "limit-temperature-c": 80,
    }  # fmt: skip
    local = local_settings(node, None)
    assert (local.partition, local.partitions, local.name) == (1, 3, "drone-1")
    assert (local.state, local.data_path) == (tmp_path / "state", str(tmp_path / "images"))
    assert local.delete_learned
    assert not local_settings(config_of(LEAST, "test", tmp_path).node_config(), None).delete_learned


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": 3}, r"device is 3, but devices is 3 \(allowed: 0 to 2\)"),
        ({"device": "1"}, r'device is "1" \(allowed: a whole number'),
        ({"device": True}, "device is true"),
        ({"devices": 0}, r"devices is 0 \(allowed: a whole number from 1\)"),
        ({"name": ""}, "1 to 64 printable characters"),
        ({"name": "a\nb"}, "1 to 64 printable characters"),
        ({"server": "server"}, r"server is \"server\" \(allowed: HOST:PORT"),
        ({"server": "server:0"}, "allowed: HOST:PORT"),
        ({"accelerator": "tpu"}, "allowed: auto, cpu, cuda"),
        ({"threads": -1}, "threads is -1"),
        ({"memory_mb": 12}, "at least 64"),
        ({"own_data": 1}, "allowed: true or false"),
        ({"delete_learned": "yes"}, r"delete_learned is \"yes\" \(allowed: true or false\)"),
        ({"insecure": True, "key": "key"}, "insecure is true, but a key or certificate is set"),
        ({"limits": 3}, r"limits is 3, expected a table"),
        ({"limits": {"temperature_c": 5}}, r"limits.temperature_c is 5 \(allowed: 0 for no limit, else 20 to 150\)"),
        ({"limits": {"battery": 5}}, "unknown key limits.battery"),
        ({"sever": "a:1"}, "unknown key sever, did you mean 'server'"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(change: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        config_of({**LEAST, **change}, "device.toml", Path("/"))


def test_a_missing_key_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="server is missing"):
        config_of({key: value for key, value in LEAST.items() if key != "server"}, "device.toml", Path("/"))
    with pytest.raises(RequestError, match="run `lightcl device init`"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(RequestError, match="not a configuration of a board"):
        read_config(tmp_path / "broken.toml")


def test_the_file_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTCL_DEVICE", "/somewhere/board.toml")
    assert default_file() == Path("/somewhere/board.toml")
    monkeypatch.delenv("LIGHTCL_DEVICE")
    assert default_file() == Path.home() / ".config" / "lightcl" / "device.toml"


# -- lightcl device init -------------------------------------------------------------------------------------------


def test_init_from_a_join_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, _ = new_key()
    join = tmp_path / "join.toml"
    join.write_text(JoinFile("drone-1", 1, 3, "10.0.0.1:9092", certificate="PEM\n", key=private).to_toml())
    file = tmp_path / "board" / "device.toml"
    arguments = ("device", "init", "--config", str(file), "--join", str(join), "--threads", "2")
    images = ("--data", str(tmp_path), "--delete-learned")
    assert lightcl(monkeypatch, *arguments, *images) == 0
    config = read_config(file)
    assert (config.data, config.delete_learned) == (str(tmp_path), True)
    assert (config.name, config.device, config.devices, config.server) == ("drone-1", 1, 3, "10.0.0.1:9092")
    assert (config.insecure, config.threads) == (False, 2)
    assert Path(config.certificate).read_text() == "PEM\n"
    assert Path(config.key).read_text() == private
    assert {path.stat().st_mode & 0o777 for path in file.parent.iterdir()} == {0o600}
    assert len(list(file.parent.iterdir())) == 3


def test_init_makes_a_key_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "device.toml"
    required = ("--device", "0", "--devices", "2", "--server", "10.0.0.1:9092")
    assert lightcl(monkeypatch, "device", "init", "--config", str(file), *required) == 0
    key = Path(read_config(file).key)
    public = load_ssh_private_key(key.read_bytes(), None).public_key()
    said = capfd.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("ecdsa-sha2-nistp384 ")]
    assert public.curve.name == "secp384r1"  # type: ignore[union-attr]
    assert file.with_suffix(".key.pub").read_text() == f"{line}\n"

    before = key.read_text(), file.read_text()
    assert lightcl(monkeypatch, "device", "init", "--config", str(file), *required) == 2
    assert "use --overwrite" in capfd.readouterr().err
    assert (key.read_text(), file.read_text()) == before
    arguments = ("--config", str(file), *required, "--name", "other", "--overwrite")
    assert lightcl(monkeypatch, "device", "init", *arguments) == 0
    assert (key.read_text(), read_config(file).name) == (before[0], "other")
    assert line in capfd.readouterr().out


def test_init_without_what_it_needs_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "board" / "device.toml"
    assert lightcl(monkeypatch, "device", "init", "--config", str(file), "--device", "0") == 2
    assert "--server, --devices missing" in capfd.readouterr().err
    wrong = ("--device", "2", "--devices", "2", "--server", "a:1")
    assert lightcl(monkeypatch, "device", "init", "--config", str(file), *wrong) == 2
    assert not file.parent.exists()


def test_a_folder_that_cannot_be_written_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    required = ("--device", "0", "--devices", "2", "--server", "a:1")
    config = str(tmp_path / "file" / "device.toml")
    assert lightcl(monkeypatch, "device", "init", "--config", config, *required) == 2
    assert "cannot be written" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
