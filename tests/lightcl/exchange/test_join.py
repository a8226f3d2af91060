"""The file with which a board joins a fleet."""

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from lightcl.errors import RequestError
from lightcl.exchange.join import JoinFile, new_key

FILE = JoinFile("drone-0", 1, 3, "192.168.0.10:9092", certificate="-----BEGIN\nabc\n", key="-----BEGIN\nxyz\n")


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "drone-0.toml"
    file.write_text(FILE.to_toml())
    assert JoinFile.read(file) == FILE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "name is missing"),
        ("name = ", "not a join file"),
        ('name = "a"\ndevice = "0"\ndevices = 1\nserver = "b:1"', "device is '0', expected int"),
        ('name = "a"\ndevice = true\ndevices = 1\nserver = "b:1"', "device is True, expected int"),
        ('name = "a"\ndevice = 3\ndevices = 3\nserver = "b:1"', "allowed: 0 to 2"),
        ('name = "a"\ndevice = 0\ndevices = 3\nserver = "b:1"\ncolor = 1', "unknown key 'color'"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, words):
    file = tmp_path / "join.toml"
    file.write_text(text)
    with pytest.raises(RequestError, match=words):
        JoinFile.read(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="not a join file"):
        JoinFile.read(tmp_path / "none.toml")


def test_a_key_pair_fits_together():
    private, public = new_key()
    loaded = load_ssh_private_key(private.encode(), None).public_key()
    assert loaded.public_numbers() == load_ssh_public_key(public.encode()).public_numbers()
    assert loaded.curve.name == "secp384r1"
