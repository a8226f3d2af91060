"""`lightcl device predict` and `serve`: answers while a device trains."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client import endpoint
from client.endpoint import Endpoint, Follower
from lightcl.data.sources import load_source
from lightcl.device.device import EdgeDevice
from lightcl.errors import RequestError
from lightcl.export.folders import find_model
from lightcl.export.model import DESCRIPTION, read_model
from lightcl.preparation import open_run
from lightcl.records.folder import RunFolder
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent, small
from tests.lightcl.export.trained import scenario, train
from tests.simulations.test_command_line import lightcl

FOUR_EPOCHS = scenario(training={"epochs": 4, "batch_size": 32, "learning_rate": 0.05, "checkpoint_seconds": 0.0})


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "digit.png"
    Image.fromarray(np.asarray(load_source(scenario().source_request()).test.images[0, ..., 0])).save(file)
    return file


@contextmanager
def serving(follower: Follower) -> Iterator[Endpoint]:
    """The endpoint on a free port, in a thread."""
    with Endpoint(follower, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Endpoint, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def test_predict_prints_class_score_and_version(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(scenario(), tmp_path / "state")
    model = read_model(*find_model(tmp_path / "state"))
    scores = model.scores(model.read_image(str(picture), "")[None])[0]
    assert lightcl(monkeypatch, "device", "predict", picture, picture, "--from", tmp_path / "state") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == printed[1] == f"{picture}  {scores.argmax()}  {scores.max():.1%}"
    assert printed[2] == "model: device 0, task 1, epoch 1 of 1"
    assert lightcl(monkeypatch, "device", "predict", picture, "--from", tmp_path / "state", "--json") == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["class"] == str(scores.argmax())
    assert answer["score"] == pytest.approx(float(scores.max()))
    assert answer["model"] == {"device": 0, "task": 1, "epochs": 1, "shared": 0, "finished": True}
    (tmp_path / "notes.txt").write_text("no image")
    assert lightcl(monkeypatch, "device", "predict", tmp_path / "notes.txt", "--from", tmp_path / "state") == 2
    assert "notes.txt: the image does not decode" in capsys.readouterr().err
    assert lightcl(monkeypatch, "device", "predict", picture, "--from", tmp_path / "nowhere") == 2


def test_a_board_answers_from_its_state_dir_without_the_server(tmp_path: Path) -> None:
    """What the ClientApp writes beside the state is enough; every device of the fleet has its own."""
    run = RunFolder(tmp_path / "run")
    open_run(run, small(), "flwr run", "fleet", resume=False, overwrite=False)
    Coordinator(small(), run, "r", Silent()).run(InProcessGrid(tmp_path / "boards", 3))
    for number in range(3):
        place = find_model(tmp_path / "boards", number)
        assert place.about.device == number
        model = read_model(*place)
        assert model.position.task == 1
        assert model.finished
        assert model.about.classes == ("0", "1", "2", "3")


def test_the_endpoint_answers_with_class_score_and_version(tmp_path: Path, picture: Path) -> None:
    train(scenario(), tmp_path / "state")
    with Follower(partial(find_model, tmp_path / "state")) as follower, serving(follower) as server:
        status, answer = ask(server, "POST", "/predict", picture.read_bytes())
        scores = follower.model.scores(follower.model.read_image(str(picture), "")[None])[0]
        assert status == 200
        assert answer["class"] == str(scores.argmax())
        assert answer["score"] == pytest.approx(float(scores.max()))
        assert ask(server, "GET", "/health") == (
            200, {"model": answer["model"], "classes": [str(digit) for digit in range(10)]},
        )  # fmt: skip
        assert server.server_address[0] == "127.0.0.1"


def test_what_a_bad_request_gets(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(scenario(), tmp_path / "state", tasks=1)
    monkeypatch.setattr(endpoint, "MOST_BYTES", 1000)
    with Follower(partial(find_model, tmp_path / "state")) as follower, serving(follower) as server:
        status, answer = ask(server, "POST", "/predict", b"no image")
        assert status == 400
        assert "the image does not decode" in answer["error"]
        assert ask(server, "POST", "/predict", b"x" * 1001)[0] == 413
        assert ask(server, "POST", "/predict", **{"Content-Length": "many"})[0] == 411
        assert ask(server, "POST", "/predict", **{"Content-Length": "9" * 5000})[0] == 413
        assert ask(server, "POST", "/elsewhere", b"x")[0] == 404
        assert ask(server, "GET", "/predict")[0] == 404
        assert ask(server, "POST", "/predict", picture.read_bytes())[0] == 200, "it still answers"
        with pytest.raises(RequestError, match=f"--port {server.server_port}: Address already in use"):
            Endpoint(follower, server.server_port)


def test_the_follower_changes_to_finished_models_alone(tmp_path: Path) -> None:
    """A checkpoint after each epoch (`checkpoint_seconds: 0`): after two, both generations are in the middle of it."""
    train(FOUR_EPOCHS, tmp_path, tasks=1)
    place = find_model(tmp_path)
    follower = Follower(lambda: place)
    device = EdgeDevice(FOUR_EPOCHS, 0, tmp_path)
    newest, followed = [], []

    def on_epoch(task: int, done: int, loss: float) -> None:
        model = read_model(*place)
        newest.append((model.position.task, model.position.epochs, model.finished))
        follower.look()
        followed.append((follower.model.position.task, follower.model.position.epochs))

    device.train(1, 4, on_epoch)
    assert newest == [(0, 4, True), (1, 2, False), (1, 3, False), (1, 3, False)]
    assert followed == [(0, 4)] * 4
    follower.look()
    assert (follower.model.position.task, follower.model.finished) == (1, True)


def test_a_state_that_cannot_be_read_leaves_the_model_before_it(tmp_path: Path) -> None:
    train(scenario(), tmp_path, tasks=1)
    follower = Follower(partial(find_model, tmp_path))
    first = follower.model
    text = (tmp_path / "state.json").read_text()
    (tmp_path / "state.json").write_text("{")
    follower.look()
    assert follower.model is first
    assert follower.problem is not None
    assert "cannot be read" in follower.problem
    (tmp_path / "state.json").write_text(text)
    follower.look()
    assert follower.problem is None
    assert (tmp_path / DESCRIPTION).exists()


def test_an_endpoint_that_starts_before_the_first_model_waits_for_it(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "POLL_SECONDS", 0.05)
    boards = tmp_path / "boards"
    with Follower(partial(find_model, boards)) as follower, serving(follower) as server:
        for method, path in (("POST", "/predict"), ("GET", "/health")):
            status, answer = ask(server, method, path, picture.read_bytes())
            assert status == 503
            assert answer["error"].startswith("no model yet")
        train(scenario(), boards / "first" / "device-00000", tasks=1)
        assert _answer_of(server, picture, task=0)["model"]["finished"]
        # A newer run of the same board takes over as soon as it has a model.
        train(scenario(), boards / "second" / "device-00000", tasks=2)
        assert _answer_of(server, picture, task=1)["model"]["finished"]
        assert follower.find().folder == boards / "second" / "device-00000"


def _answer_of(server: Endpoint, picture: Path, task: int) -> dict:
    """The first answer by a model of this task."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        status, answer = ask(server, "POST", "/predict", picture.read_bytes())
        if status == 200 and answer["model"]["task"] == task:
            return answer
        time.sleep(0.05)
    raise AssertionError(f"no answer by a model of task {task}")


@pytest.mark.slow
def test_serve_answers_while_training_is_killed_and_goes_on(tmp_path: Path, picture: Path) -> None:
    """Real processes: `lightcl train`, killed with -9 and resumed, and `lightcl device serve` beside it."""
    file, run = tmp_path / "scenario.yaml", tmp_path / "run"
    file.write_text(
        "stream: {tasks: 5}\nfleet: {devices: 1}\nnetwork: {weights: none, width: 16}\n"
        "training: {epochs: 25, checkpoint_seconds: 0}\ndevice: {accelerator: cpu}\n"
    )
    words = [sys.executable, "-m", "simulations.main"]
    command = [*words, "train", str(file), "--out", str(run), "--no-report"]
    trainer = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    server = None
    try:
        _wait_for((run / "devices" / "device-00000" / "state.json").exists)
        serve = [*words, "device", "serve", "--from", str(run), "--port", "0"]
        server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        port = int(server.stdout.readline().rsplit(":", 1)[1])
        tasks, finished, killed = [], [], False
        until = time.monotonic() + 300
        while trainer.poll() is None or tasks[-1] < 4:
            assert time.monotonic() < until
            status, answer = _post(port, picture)
            assert status in (200, 503)
            if status == 503:  # before the first save of tensors
                assert not tasks
                continue
            finished.append(answer["model"]["finished"])
            tasks.append(answer["model"]["task"])
            if tasks[-1] >= 1 and not killed:
                killed = True
                trainer.kill()
                trainer.wait(30)
                assert _post(port, picture)[0] == 200
                trainer = subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL)
            time.sleep(0.05)
        assert killed
        assert trainer.wait(60) == 0
        assert finished == sorted(finished), "after a finished model, none in the middle of a task"
        assert tasks == sorted(tasks), "it never goes back to an older model"
        model = read_model(*find_model(run))
        scores = model.scores(model.read_image(str(picture), "")[None])[0]
        _, answer = _post(port, picture)
        assert answer["class"] == model.about.classes[scores.argmax()]
        assert answer["score"] == pytest.approx(float(scores.max()), abs=1e-6)
    finally:
        for process in (trainer, server):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(30)


def _post(port: int, picture: Path) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/predict", picture.read_bytes())
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def _wait_for(there: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not there():
        assert time.monotonic() < until
        time.sleep(0.05)
