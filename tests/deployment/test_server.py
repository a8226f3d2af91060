"""`lightcl server run` with real SuperNodes, TLS, keys and a database: results, kills, and who is refused."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from lightcl.exchange.join import new_key
from server.link.certificates import own_addresses
from server.link.devices import Devices
from server.link.folder import ServerFolder
from server.link.superlink import marked
from tests.deployment.processes import (
    LightServer,
    Processes,
    neutral,
    processes,
    rows,
    simulated_rows,
    wait_for,
    wait_until,
)

__all__ = ["neutral", "processes"]  # fixtures

pytestmark = pytest.mark.slow

SCENARIO = """
name: boards
network: {{weights: none, width: 4}}
stream: {{tasks: {tasks}}}
fleet: {{devices: {devices}, test_data: whole}}
training: {{epochs: 1, batch_size: 16, learning_rate: 0.05}}
server: {{aggregation: suffix}}
"""


def scenario(place: Path, *, tasks: int, devices: int) -> Path:
    file = place / "boards.yaml"
    file.write_text(SCENARIO.format(tasks=tasks, devices=devices))
    return file


def events(run: Path) -> list[dict[str, Any]]:
    file = run / "events.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_a_run_of_three_boards_gives_what_the_simulation_gives(processes: Processes, tmp_path: Path) -> None:
    """The run is asked for from another terminal, of a server that came up without one.

    Two boards are of the kit, one is a plain SuperNode.
    """
    server, file, out = LightServer(processes, tmp_path, 3), scenario(tmp_path, tasks=5, devices=3), tmp_path / "run"
    server.run()
    server.kit_board(0)
    server.kit_board(1)
    server.board(2)
    server.call("start", str(file), "--out", str(out))
    wait_for(out / "results.json", processes, 400)

    assert rows(out) == simulated_rows(file, processes, tmp_path / "simulated")
    assert {json.loads(line)["name"] for line in (out / "devices.jsonl").read_text().splitlines()} == {
        "board-0", "board-1", "board-2",
    }  # fmt: skip
    assert server.states() == dict.fromkeys(("board-0", "board-1", "board-2"), "online")
    assert "is complete already" in server.call("start", str(file), "--out", str(out))


def test_a_killed_server_continues_its_run_by_itself(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 in the middle of four rounds: the run's process, SuperLink, the server alone, and everything at once."""
    server, file, out = LightServer(processes, tmp_path, 2), scenario(tmp_path, tasks=5, devices=2), tmp_path / "run"
    command = (str(file), "--out", str(out))
    running = server.run(*command)
    for number in range(2):
        server.kit_board(number)

    def in_round(number: int) -> None:
        def training() -> bool:
            found = [one for one in events(out) if one["event"] in ("round_started", "phase_started")]
            return [one.get("round", one.get("phase")) for one in found[-2:]] == [number, "train"]

        wait_until(training, f"round {number} trains", processes, 300)

    killed: list[float] = []

    def kill(*programs: str) -> None:
        killed.append(time.time())
        found = [pid for pid in marked(server.folder) if any(name in arguments(pid) for name in programs)]
        assert found, processes.logs()
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    in_round(1)
    kill("flwr-serverapp")
    in_round(2)
    kill("flower-superlink")
    in_round(3)
    killed.append(time.time())
    running.kill()  # what it had started lives on
    running.wait()
    running = server.run(*command)
    in_round(4)
    running.kill()
    running.wait()
    kill("")
    server.run(*command)
    wait_for(out / "results.json", processes, 400)

    assert rows(out) == simulated_rows(file, processes, tmp_path / "simulated")
    started = [one for one in events(out) if one["event"] == "round_started"]
    expected = [1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert [one["round"] for one in started] == expected, "each round that was cut off is repeated, and no other one"
    repeated = [datetime.fromisoformat(one["time"]).timestamp() for one in started[1:8:2]]
    with capsys.disabled():
        waited = ", ".join(f"{again - then:.1f}" for then, again in zip(killed, repeated, strict=True))
        print(f"\nfrom a kill to the repeated round (run, SuperLink, server, everything): {waited} s")  # noqa: T201


def arguments(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_who_is_refused(processes: Processes, tmp_path: Path) -> None:
    server = LightServer(processes, tmp_path, 2)
    server.run()
    authority = str(server.folder / "ca.crt")
    honest = server.board(0)
    wait_until(lambda: server.states()["board-0"] == "online", "board-0 is online", processes, 60)

    no_key = server.board(1, name="no-key", key="")
    wrong_key = server.board(1, name="wrong-key", key=new_key()[0])
    plain = server.board(1, "--insecure", "--max-retries", "3", name="plain")
    second = server.board(0, name="second")
    for process, name in ((no_key, "no-key"), (wrong_key, "wrong-key"), (plain, "plain"), (second, "second")):
        wait_until(lambda one=process: one.poll() is not None, f"{name} has ended", processes, 90)  # type: ignore[misc]
        assert process.returncode != 0, name
        assert "Received" not in (tmp_path / f"{name}.log").read_text()
    assert server.states() == {"board-0": "online", "board-1": "never seen"}
    assert honest.poll() is None

    # The part of Flower that starts runs and registers keys asks for none: it is not on the boards' port.
    with httpx.Client(verify=authority_context(authority)) as client:
        for path in ("control/list-nodes", "control/register-node", "control/start-run", "runtime/pull-pending-tasks",
                     "fleet/../control/list-nodes"):  # fmt: skip
            answer = client.post(f"https://127.0.0.1:{server.port}/v1/{path}", content=b"")
            assert answer.status_code == 404, path
    inner = json.loads((server.folder / "running.json").read_text())["port"]
    elsewhere = [address for address in own_addresses() if address.count(".") == 3 and not address.startswith("127.")]
    for address in elsewhere[:1]:
        with pytest.raises(httpx.ConnectError):
            httpx.post(f"http://{address}:{inner}/v1/control/list-nodes", content=b"")

    # The board that lost its key gets a new one; the old one is refused from then on.
    processes.stop(honest)
    server.call("add-device", "board-0", "--replace")
    registered = lambda: (tmp_path / "server.log").read_text().count("registered board board-0") == 2  # noqa: E731
    wait_until(registered, "the new key is registered", processes, 60)
    again = server.board(0, name="board-0-new")
    wait_until(lambda: server.states()["board-0"] == "online", "board-0 is online again", processes, 90)
    assert again.poll() is None
    old = server.board(0, name="board-0-old", key=(tmp_path / "board-0" / "key").read_text())
    wait_until(lambda: old.poll() is not None, "the old key has been refused", processes, 90)
    assert old.returncode != 0


def test_a_server_that_forgot_its_boards_finds_them_again(processes: Processes, tmp_path: Path) -> None:
    server = LightServer(processes, tmp_path, 2)

    def run_once() -> dict[str, str]:
        """Starts and stops a server; the numbers by which Flower knows the boards."""
        running = server.run()
        assert server.states() == {"board-0": "never seen", "board-1": "never seen"}
        running.terminate()
        assert running.wait(60) == 130
        assert marked(server.folder) == [], "it has ended everything that it started"
        assert not (server.folder / "running.json").exists()
        return {one.name: one.node for one in Devices(ServerFolder.open(server.folder)).all()}

    first = run_once()
    devices = Devices(ServerFolder.open(server.folder))
    devices.note_node(devices.all()[1], "")  # as if it was killed before it could write the number down
    assert run_once() == first
    server.folder.joinpath("superlink.db").unlink()
    again = run_once()
    assert again.keys() == first.keys()
    assert not set(again.values()) & {*first.values(), ""}


def authority_context(file: str) -> Any:
    import ssl

    return ssl.create_default_context(cafile=file)
