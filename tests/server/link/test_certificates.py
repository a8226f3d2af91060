"""Certificates that a TLS client accepts or refuses, and keys as OpenSSH and Flower write them."""

from __future__ import annotations

import base64
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from lightcl.errors import RequestError
from lightcl.exchange.join import new_key
from server.link import certificates


@pytest.fixture(scope="module")
def authority() -> tuple[str, str]:
    return certificates.new_authority()


def shake_hands(place: Path, authority: str, pem: str, name: str) -> str:
    """Connects by TLS to a server with `pem`, as `name`; returns "" or what the client says."""
    (place / "server.pem").write_text(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "server.pem")
    one, other = socket.socketpair()

    def serve() -> None:
        try:
            context.wrap_socket(one, server_side=True).close()
        except OSError:
            one.close()

    thread = threading.Thread(target=serve)
    thread.start()
    client = ssl.create_default_context(cadata=authority)
    try:
        client.wrap_socket(other, server_hostname=name).close()
        return ""
    except ssl.SSLError as error:
        return str(error)
    finally:
        other.close()
        thread.join()


@pytest.mark.parametrize("name", ["192.168.0.10", "fleet.example", "localhost", "127.0.0.1", "::1"])
def test_a_client_that_knows_the_authority_accepts_the_server(
    authority: tuple[str, str], tmp_path: Path, name: str
) -> None:
    pem = "".join(certificates.new_certificate(*authority, ["192.168.0.10", "fleet.example"]))
    assert shake_hands(tmp_path, authority[0], pem, name) == ""


def test_a_client_refuses_another_name_and_another_authority(authority: tuple[str, str], tmp_path: Path) -> None:
    pem = "".join(certificates.new_certificate(*authority, ["192.168.0.10"]))
    assert "IP address mismatch" in shake_hands(tmp_path, authority[0], pem, "192.168.0.11")
    other, _ = certificates.new_authority()
    assert "certificate verify failed" in shake_hands(tmp_path, other, pem, "192.168.0.10")


def test_a_renewed_certificate_is_accepted_like_the_first(authority: tuple[str, str], tmp_path: Path) -> None:
    first, second = (certificates.new_certificate(*authority, ["10.0.0.1"]) for _ in range(2))
    assert certificates.certificate_fingerprint(first[0]) != certificates.certificate_fingerprint(second[0])
    assert shake_hands(tmp_path, authority[0], "".join(second), "10.0.0.1") == ""


def test_fingerprints_are_those_of_ssh_keygen(tmp_path: Path) -> None:
    _, public = new_key()
    (tmp_path / "key.pub").write_text(public + " board\n")
    try:
        shown = subprocess.run(
            ["ssh-keygen", "-lf", tmp_path / "key.pub"], capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("ssh-keygen is not installed")
    assert certificates.key_fingerprint(public) == shown.split()[1]


def test_flower_names_a_key_as_we_do() -> None:
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    private, public = new_key()
    assert certificates.as_flower_sends_it(public) == public_key_to_bytes(
        load_ssh_private_key(private.encode(), None).public_key()  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a public key"),
        (new_key()[0], "never give a private key"),
        ("ssh-ed25519 " + base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(range(32))).decode(), "kind"),
        ("ecdsa-sha2-nistp384 AAAA", "not a public key"),
    ],
)
def test_what_is_no_key_of_a_board(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        certificates.check_public_key(text)


def test_addresses() -> None:
    assert certificates.check_address("192.168.0.10") == "192.168.0.10"
    assert certificates.check_address("[fe80::1]") == "fe80::1"
    assert certificates.check_address("fleet.example") == "fleet.example"
    for wrong in ("", "192.168.0.10:9092", "300.1.2.3", "a b", "http://x", "-x"):
        with pytest.raises(RequestError, match="--address"):
            certificates.check_address(wrong)
    assert all(certificates.check_address(one) for one in certificates.own_addresses())
