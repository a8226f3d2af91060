"""Simulations on a Ray cluster of two nodes, started on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lightcl.errors import RequestError
from lightcl.scenario import Scenario
from simulations.runtime import check_cluster
from tests.simulations.test_simulation import LIGHTCL, SCENARIO, lightcl, rows

RAY = Path(sys.executable).with_name("ray")


class Cluster:
    """A head and a second node with one CPU each; `stop` kills them as a power cut would."""

    def __init__(self, folder: Path) -> None:
        gcs, client = free_port(), free_port(20_000)
        self.address, self.client_address = f"127.0.0.1:{gcs}", f"ray://127.0.0.1:{client}"
        common = ["--num-cpus", "1", "--block", "--disable-usage-stats"]
        head = ["--head", "--port", gcs, "--ray-client-server-port", client, "--include-dashboard", "false"]
        self._processes = [self._start(*head, "--temp-dir", folder, *common)]
        self._wait_for(1)
        self._processes.append(self._start("--address", self.address, *common))
        self._wait_for(2)

    def _start(self, *words: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [RAY, "start", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
        )

    def _wait_for(self, nodes: int) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            asked = subprocess.run(
                [RAY, "status", "--address", self.address], capture_output=True, text=True, check=False
            )
            if f"/{nodes}.0 CPU" in asked.stdout:
                return
            time.sleep(0.5)
        raise AssertionError(asked.stdout + asked.stderr)

    def stop(self) -> None:
        family: list[psutil.Process] = []
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                family += psutil.Process(process.pid).children(recursive=True)
            process.kill()
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        for process in self._processes:
            process.wait()
        psutil.wait_procs(family, timeout=20)


def free_port(above: int = 0) -> int:
    """A port that nothing listens on; Ray reserves 10002 to 19999 for its workers."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port > above:
            return port


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # short: it names sockets
        started = Cluster(Path(folder))
        yield started
        started.stop()


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SCENARIO)
    return file


def test_an_address_at_which_nothing_listens_is_refused_before_anything_is_written(scenario: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    for given in (address, f"ray://{address}"):
        request = Scenario.model_validate({"simulation": {"address": given}})
        with pytest.raises(RequestError, match=rf"simulation.address is '{given}', but nothing listens there"):
            check_cluster(request)
    out = scenario.parent / "run"
    done = lightcl("simulate", scenario, "--out", out, "--set", f"simulation.address={address}", check=False)
    assert done.returncode == 2
    assert "nothing listens there" in done.stderr
    assert not out.exists()


@pytest.mark.slow
def test_two_ray_nodes_give_the_numbers_of_one_machine(scenario: Path, cluster: Cluster) -> None:
    here, there, client = (scenario.parent / name for name in ("here", "there", "client"))
    change = ("--set", "server.aggregation=suffix")
    lightcl("simulate", scenario, "--out", here, *change)
    lightcl("simulate", scenario, "--out", there, *change, "--set", f"simulation.address={cluster.address}")
    assert rows(there) == rows(here)
    lightcl("simulate", scenario, "--out", client, *change, "--set", f"simulation.address={cluster.client_address}")
    assert rows(client) == rows(here)
    many = lightcl(
        "simulate", scenario, "--out", scenario.parent / "many", "--set", "simulation.workers=3",
        "--set", f"simulation.address={cluster.address}", check=False,
    )  # fmt: skip
    assert many.returncode == 2
    assert "simulation.workers is 3" in many.stderr
    assert "has 2 CPUs" in many.stderr


@pytest.mark.slow
def test_a_cluster_that_goes_away_ends_the_run_with_a_reason_and_resume_continues(
    scenario: Path, cluster: Cluster
) -> None:
    here, lost = scenario.parent / "here", scenario.parent / "lost"
    change = ("--set", "server.aggregation=suffix", "--set", "training.epochs=40")
    process = subprocess.Popen(
        [LIGHTCL, "simulate", scenario, "--out", lost, *change, "--set", f"simulation.address={cluster.address}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (lost / "devices.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    cluster.stop()
    _, said = process.communicate(timeout=90)
    assert process.returncode == 1, said
    assert "the Ray cluster no longer answers" in said
    assert "--resume" in said
    assert "Traceback" not in said
    lightcl("simulate", scenario, "--out", lost, *change, "--resume")
    lightcl("simulate", scenario, "--out", here, *change)
    assert rows(lost) == rows(here)
