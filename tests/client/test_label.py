"""`lightcl device label`: the page's requests on real files, and what a foreign page gets."""

from __future__ import annotations

import http.client
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from client.board.config import config_of
from client.commands.label import labeling_of
from client.commands.status import status_of
from client.labeling import Labeling, LabelServer
from lightcl.data.field import FieldTasks
from lightcl.errors import RequestError
from tests.lightcl.data.field import draw, drop, later, plan, tasks
from tests.lightcl.data.odd_images import EPS, blank_png, fake_ghostscript
from tests.simulations.test_command_line import lightcl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    place.mkdir()
    plan(place).prepare(tmp_path / "state")
    drop(place, "unlabeled", range(3))
    return place


def labeling(folder: Path, found: FieldTasks | None = None) -> Labeling:
    return Labeling.of(folder, ("cup", "bottle"), found, clock=later)


@contextmanager
def serving(given: Labeling, host: str = "127.0.0.1") -> Iterator[LabelServer]:
    with LabelServer(given, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: LabelServer, method: str, path: str, values: object = None, **headers: str
) -> tuple[int, Any]:  # the status, and JSON or bytes
    connection = http.client.HTTPConnection(server.host, server.server_port, timeout=30)
    try:
        body = None if values is None else json.dumps(values)
        own = {"Content-Type": "application/json"} if values is not None else {}
        connection.putrequest(method, server.prefix + path, skip_host="Host" in headers)
        for name, value in ({"Content-Length": str(len(body or ""))} | own | headers).items():
            connection.putheader(name, value)
        connection.endheaders((body or "").encode())
        reply = connection.getresponse()
        content = reply.read()
        return reply.status, json.loads(content) if "json" in reply.headers["Content-Type"] else content
    finally:
        connection.close()


def test_an_image_is_shown_and_moved_to_its_class(folder: Path) -> None:
    with serving(labeling(folder)) as server:
        status, page = ask(server, "GET", "/")
        assert status == 200
        assert b"<title>Label images</title>" in page
        assert b"http" not in page.replace(b"http-equiv", b""), "no address of another machine"
        _, state = ask(server, "GET", "/state")
        assert (state["image"], state["waiting"]) == ("unlabeled/0000.png", 3)
        assert [(one["name"], one["key"], one["images"]) for one in state["classes"]] == [
            ("cup", "1", 0),
            ("bottle", "2", 0),
        ]
        status, content = ask(server, "GET", f"/image?name={quote(state['image'])}")
        with Image.open(io.BytesIO(content)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (12, 12))
        status, state = ask(server, "POST", "/label", {"image": "unlabeled/0000.png", "class": "bottle"})
        assert (status, state["image"], state["waiting"], state["given"]) == (200, "unlabeled/0001.png", 2, 1)
        assert state["classes"][1]["images"] == 1
    assert (folder / "bottle" / "0000.png").exists()
    assert not (folder / "unlabeled" / "0000.png").exists()


def test_skip_and_undo(folder: Path) -> None:
    given = labeling(folder)
    given.skip("unlabeled/0000.png")
    assert given.state()["image"] == "unlabeled/0001.png"
    given.label("unlabeled/0001.png", "cup")
    given.label("unlabeled/0002.png", "cup")
    assert given.state()["image"] == "unlabeled/0000.png", "a skipped one comes again at the end"
    given.undo()
    assert (given.state()["image"], given.state()["given"]) == ("unlabeled/0002.png", 1)
    given.undo()
    assert given.state()["undo"] is None
    with pytest.raises(KeyError, match="there is no label to take back"):
        given.undo()
    assert sorted(file.name for file in (folder / "unlabeled").iterdir()) == ["0000.png", "0001.png", "0002.png"]


def test_a_label_is_shown_again_at_once_when_it_is_taken_back(folder: Path) -> None:
    """A file that was just renamed looks as if it were being copied."""
    given = Labeling.of(folder, ("cup", "bottle"), clock=time.time, settle=5.0)
    assert (given.state()["image"], given.state()["arriving"]) == (None, 3)
    given.clock = later
    given.label("unlabeled/0001.png", "cup")
    given.clock = time.time
    given.undo()
    assert (given.state()["image"], given.state()["arriving"]) == ("unlabeled/0001.png", 2)


def test_no_image_is_lost_under_another_of_the_same_name(folder: Path) -> None:
    draw(folder / "cup" / "0000.png", 77)
    before = (folder / "cup" / "0000.png").read_bytes()
    given = labeling(folder)
    given.label("unlabeled/0000.png", "cup")
    assert (folder / "cup" / "0000.png").read_bytes() == before
    assert (folder / "cup" / "0000-2.png").exists()


def test_the_page_says_how_many_the_next_task_has(folder: Path, tmp_path: Path) -> None:
    drop(folder, "bottle", range(30, 36))
    drop(folder, "cup", range(40, 45))
    tasks(tmp_path / "state", folder).gather(0)
    given = labeling(folder, tasks(tmp_path / "state", folder))
    given.label("unlabeled/0000.png", "cup")
    assert given.state()["task"] == "task 1: 1 of 10 labeled images (2 wait for a label)"
    drop(folder, "bottle", range(50, 56))
    drop(folder, "cup", range(60, 65))
    tasks(tmp_path / "state", folder).gather(1)
    with pytest.raises(KeyError, match=r"cup/0000.png is part of a task already"):
        given.undo()
    assert (folder / "cup" / "0000.png").exists()


def test_what_cannot_be_shown_is_named_and_passed_over(folder: Path) -> None:
    (folder / "unlabeled" / "0000.png").write_bytes(b"half")
    with serving(labeling(folder)) as server:
        assert ask(server, "GET", "/image?name=unlabeled/0000.png")[0] == 404
        _, state = ask(server, "GET", "/state")
    reason = "the image does not decode (not an image, or an unknown format)"
    problems = [f"unlabeled/0000.png cannot be shown: {reason}"]
    assert (state["image"], state["problems"]) == ("unlabeled/0001.png", problems)


def test_other_formats_and_too_many_pixels_are_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript = fake_ghostscript(folder.parent, monkeypatch)
    (folder / "unlabeled" / "0000.png").write_bytes(EPS)
    (folder / "unlabeled" / "0001.png").write_bytes(blank_png(8000, 6000))
    with serving(labeling(folder)) as server:
        assert ask(server, "GET", "/image?name=unlabeled/0000.png")[0] == 404
        assert ask(server, "GET", "/image?name=unlabeled/0001.png")[0] == 404
        assert ask(server, "GET", "/image?name=unlabeled/0002.png")[0] == 200
        _, state = ask(server, "GET", "/state")
    assert state["image"] == "unlabeled/0002.png"
    assert state["problems"][1].startswith("unlabeled/0001.png cannot be shown: the image has 8000x6000 pixels")
    assert not ghostscript.exists()


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "indexed.png", "photo.tif"])
def test_a_large_photo_is_shown_small_and_upright(folder: Path, name: str) -> None:
    """Its left half is red; its orientation says that it was taken with the camera turned to the right."""
    photo = Image.new("RGB", (2000, 1000), (0, 0, 200))
    photo.paste((200, 0, 0), (0, 0, 1000, 1000))
    exif = Image.Exif()
    exif[0x0112] = 6
    if name == "indexed.png":
        photo = photo.convert("P", palette=Image.Palette.ADAPTIVE)
    photo.save(folder / "unlabeled" / name, exif=exif)
    shown = Image.open(io.BytesIO(labeling(folder).picture(f"unlabeled/{name}")))
    assert shown.size == (800, 1600)
    top, bottom = shown.getpixel((400, 200)), shown.getpixel((400, 1400))
    assert top[0] > 150 > 50 > top[2]
    assert bottom[2] > 150 > 50 > bottom[0]


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "unlabeled/../../secret.png", "cup/0001.png", "", "unlabeled/0000.png\0"]
)
def test_no_path_leads_out_of_the_folder(folder: Path, name: str) -> None:
    draw(folder.parent / "secret.png", 5)
    drop(folder, "cup", range(1, 2))
    with serving(labeling(folder)) as server:
        assert ask(server, "GET", f"/image?name={quote(name)}")[0] == 404
        for path in ("/label", "/skip"):
            assert ask(server, "POST", path, {"image": name, "class": "bottle"})[0] == 409
        assert ask(server, "POST", "/label", {"image": "unlabeled/0000.png", "class": "../.."})[0] == 409
        assert ask(server, "GET", "/../secret.png")[0] == 404
    assert (folder.parent / "secret.png").exists()


def test_requests_of_foreign_pages_are_refused(folder: Path) -> None:
    with serving(labeling(folder)) as server:
        port = server.server_port
        for headers in (
            {"Host": f"evil.example:{port}"}, {"Host": ""}, {"Origin": "http://evil.example"}, {"Origin": "null"},
            {"Origin": f"http://127.0.0.1:{port + 1}"}, {"Origin": "http://["}, {"Sec-Fetch-Site": "cross-site"},
        ):  # fmt: skip
            for method, path, values in (("GET", "/state", None), ("POST", "/skip", {"image": "unlabeled/0000.png"})):
                assert ask(server, method, path, values, **headers)[0] == 403, headers
        status, _ = ask(server, "POST", "/skip", {"image": "unlabeled/0000.png"}, **{"Content-Type": "text/plain"})
        assert status == 400, "a form of another page may send text"
        assert ask(server, "POST", "/skip", ["no object"])[0] == 400
        assert ask(server, "POST", "/skip", {"image": "x" * 20_000})[0] == 400
        assert ask(server, "POST", "/skip", {}, **{"Content-Length": "9" * 5000})[0] == 400
        assert ask(server, "POST", "/elsewhere", {})[0] == 404
        with socket.create_connection((server.host, port), timeout=30) as connection:
            connection.sendall(f"GET http://[ HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
        assert ask(server, "GET", "/state", Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200
    assert labeling(folder).state()["image"] == "unlabeled/0000.png"


def test_a_client_that_leaves_is_no_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LabelServer(labeling(folder), "127.0.0.1", 0) as server:
        for error in (ConnectionResetError(104, "Connection reset by peer"), RuntimeError("odd")):
            assert capsys.readouterr().err == ""
            try:
                raise error
            except (ConnectionError, RuntimeError):
                server.handle_error(None, ("127.0.0.1", 1))
    assert "RuntimeError: odd" in capsys.readouterr().err


def test_on_another_address_the_page_has_a_secret_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"--host 0\.0\.0\.0: name one address"):
        LabelServer(labeling(folder), "0.0.0.0", 0)
    with pytest.raises(RequestError, match="--host nowhere: not an address"):
        LabelServer(labeling(folder), "nowhere", 0)
    with serving(labeling(folder)) as server:
        server.prefix = "/secret"
        assert ask(server, "GET", "/state")[0] == 200
        server.prefix, asked = "/another", server.prefix
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        connection.request("GET", f"{asked}/state")
        assert connection.getresponse().status == 404
        with pytest.raises(RequestError, match="Address already in use"):
            LabelServer(labeling(folder), "127.0.0.1", server.server_port)


def test_where_the_images_and_classes_come_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert labeling_of(folder, None, []).classes == ("bottle", "cup")
    assert labeling_of(folder, None, ["plate"]).classes == ("plate",)
    config = tmp_path / "device.toml"
    values = {"name": "board", "device": 0, "devices": 1, "server": "127.0.0.1:9092", "data": str(folder),
              "state": str(tmp_path / "boards")}  # fmt: skip
    config.write_text(config_of(values, "", tmp_path).to_toml())
    assert labeling_of(None, config, []).tasks is None
    plan(folder, classes=("cup", "bottle", "plate")).prepare(tmp_path / "boards" / "r" / "device-00000" / "field")
    found = labeling_of(None, config, [])
    assert found.classes == ("cup", "bottle", "plate")
    assert found.tasks is not None
    with pytest.raises(RequestError, match="name one of them"):
        labeling_of(folder, config, [])
    assert lightcl(monkeypatch, "device", "label", tmp_path / "missing") == 2
    assert "missing is not a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert lightcl(monkeypatch, "device", "label", tmp_path / "empty") == 2
    assert "has no folders of classes; make one per class" in capsys.readouterr().err


def test_status_says_what_a_board_waits_for(folder: Path, tmp_path: Path) -> None:
    assert status_of(tmp_path / "boards", tmp_path / "boards" / ".board")["field"] is None
    plan(folder).prepare(tmp_path / "boards" / "r" / "device-00000" / "field")
    found = status_of(tmp_path / "boards", tmp_path / "boards" / ".board")["field"]
    assert found["folder"] == str(folder)
    assert found["text"] == "task 0: 0 of 10 labeled images (3 are arriving)"


def test_the_page_starts_without_pytorch(folder: Path) -> None:
    """A board's memory is for the training."""
    code = f"""
import sys
from pathlib import Path
from client.commands.label import labeling_of
labeling_of(Path({str(folder)!r}), None, []).state()
from client.commands.status import field_of
field_of(Path({str(folder.parent)!r}))
print('torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
