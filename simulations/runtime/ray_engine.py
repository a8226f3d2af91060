"""Ray for one simulation: start it or connect to a cluster, run the server over a `RayGrid`, then clean up.

On an existing cluster (`simulation.address`) every machine needs the same version of this project, and the run folder
and the cache of decoded images at the same path on a shared file system. This is checked before the server starts.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from lightcl.errors import Failure, RequestError
from lightcl.scenario import Scenario
from simulations.runtime.address import ANSWER_SECONDS, check_reachable, listens
from simulations.runtime.devices import make_app, make_local_app
from simulations.runtime.gpus import gpu_share
from simulations.runtime.identity import assume_identity, code_digest, code_folder
from simulations.runtime.pool import PoolBroken, WorkerPool
from simulations.runtime.ray_grid import RayGrid
from simulations.runtime.worker import DeviceWorker, Greeting

MOST_NODES = 64
"""Virtual nodes of a large fleet. Each is greeted once per run, and each hosts 1/64 of the devices."""
STOP_SECONDS = 10.0
"""How long the server's thread may take to notice that the run ends."""
STARTS = 10
"""How often a local Ray may fail to start in time, before the run gives up."""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}


LOCAL_PROCESSES = ("gcs_server", "raylet")
"""The programs without which a Ray on this machine does nothing and says nothing."""


@dataclass(frozen=True)
class Connection:
    """A connection to Ray. `address` is that of an existing cluster; None where Ray was started for this run.

    `processes` are those of a Ray that was started for this run (`LOCAL_PROCESSES`), by their number.
    """

    address: str | None
    processes: Mapping[int, str] = field(default_factory=dict)

    def alive(self) -> bool:
        if self.address is not None:
            return listens(self.address, timeout=ANSWER_SECONDS)
        return all(_program(pid) == name for pid, name in self.processes.items())


def run(
    server: ServerApp, state: Path, scenario: Scenario, make_client: Callable[[Path], ClientApp] | None = None
) -> None:
    """Run `server` over the scenario's devices; `make_client(state)` creates the ClientApp in every worker, which is
    the project's own if it is not given.

    Raises the ServerApp's exception; RequestError before the server starts if the cluster cannot be used;
    KeyboardInterrupt after SIGINT or SIGTERM.
    """
    assume_identity()
    with connected(scenario) as connection, marked(state) as marker:
        make_client = make_client or (make_local_app if connection.address is None else make_app)
        grid = open_grid(scenario, state, connection, marker, make_client)
        try:
            _serve(server, grid, connection)
        finally:
            grid.close()


def open_grid(
    scenario: Scenario,
    state: Path,
    connection: Connection,
    marker: str,
    make_client: Callable[[Path], ClientApp],
) -> RayGrid:
    """The grid of a run on a connected Ray. On an existing cluster it waits for the first worker's greeting."""
    workers, threads = scenario.simulation.workers, scenario.device.threads
    local = connection.address is None
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus = 1 if local else threads
    if total.get("CPU", 0) < workers * cpus:
        raise RequestError(
            f"simulation.workers is {workers} with {cpus} CPUs each (device.threads), but the Ray cluster has "
            f"{total.get('CPU', 0):g} CPUs"
        )
    gpus = int(total.get("GPU", 0)) if scenario.device.accelerator != "cpu" else 0
    options = {
        "num_cpus": cpus,
        "num_gpus": gpu_share(gpus, workers) if gpus else 0,
        "max_restarts": 0,
        "scheduling_strategy": "SPREAD",
    }
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "FLWR_TELEMETRY_ENABLED": os.environ.get("FLWR_TELEMETRY_ENABLED", "0"),
    }
    if "LIGHTCL_CACHE" in os.environ:
        environment["LIGHTCL_CACHE"] = os.environ["LIGHTCL_CACHE"]
    actor_class: Any = ray.remote(DeviceWorker)
    worker_check = WorkerCheck(code_digest(), state, local=local)

    def make_pool(on_broken: Callable[[PoolBroken], None]) -> WorkerPool:
        return WorkerPool(
            lambda: actor_class.options(**options).remote(make_client, state, marker, environment),
            workers,
            admit=worker_check.admit,
            alive=connection.alive,
            on_broken=on_broken,
            clock=time.time,
        )

    grid = RayGrid(min(scenario.fleet.devices, MOST_NODES), make_pool, _put)
    if not local:
        worker_check.wait(grid)
    return grid


def _put(record: ArrayRecord) -> Any:
    return ray.put(record)


class WorkerCheck:
    """Checks that the workers' machines have what a run needs; the first greeting decides.

    `local`: they run on this machine, in a Ray that was started for this run.
    """

    def __init__(self, code: str, state: Path, *, local: bool) -> None:
        self._code, self._state, self._local = code, state, local
        self._answered = threading.Event()
        self._problem = ""

    def admit(self, greeting: Greeting) -> None:
        if greeting.code != self._code:
            self._problem = self._other_code_here(greeting) if self._local else self._other_code(greeting)
        elif not greeting.sees_state:
            self._problem = (
                f"the worker on {greeting.host} does not see {self._state}; put the run folder (--out) on a file "
                "system that all machines of the cluster share, at the same path"
            )
        self._answered.set()
        if self._problem:
            raise PoolBroken(self._problem)

    def _other_code(self, greeting: Greeting) -> str:
        return (
            f"the worker on {greeting.host} runs different code ({greeting.code}, here {self._code}); "
            "install the same version of lightcl-fleet on every machine of the cluster"
        )

    def _other_code_here(self, greeting: Greeting) -> str:
        here = code_folder()
        if greeting.folder == here:
            return f"the code in {here} was changed while the workers started"
        return (
            f"this command runs the code in {here}, but its workers run the installed code in {greeting.folder}, which "
            f"differs; set PYTHONPATH={here}, or install that folder (pip install -e {here})"
        )

    def wait(self, grid: RayGrid, seconds: float = 120.0) -> None:
        """Raises RequestError if the first worker cannot be used or does not start in time."""
        deadline = time.monotonic() + seconds
        while not self._answered.wait(0.1):
            if grid.failure:
                self._problem = grid.failure
                break
            if time.monotonic() > deadline:
                self._problem = f"no worker started within {seconds:g} s; are the cluster's CPUs in use?"
                break
        if self._problem:
            grid.close()
            raise RequestError(f"simulation.address: {self._problem}")


def _serve(server: ServerApp, grid: RayGrid, connection: Connection) -> None:
    """Runs the server in a thread, so that signals reach this one at once."""
    raised: list[BaseException] = []

    def serve() -> None:
        try:
            server(grid, Context(1, 0, {}, RecordDict(), {}))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=serve, name="server", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.5)
    except KeyboardInterrupt:
        # Ray sends SIGTERM to its drivers when the cluster goes away: the user did not interrupt the run.
        if connection.alive():
            grid.close()
            thread.join(STOP_SECONDS)
            raise
        grid.fail("the Ray cluster no longer answers")
        thread.join(STOP_SECONDS)
    if raised:
        raise raised[0]


@contextmanager
def connected(scenario: Scenario) -> Iterator[Connection]:
    """Connects to Ray for the duration of a `with` block."""
    address = scenario.simulation.address
    with _own_signals():
        if address is None:
            processes = _start_local(scenario.simulation.workers)
        else:
            processes = {}
            _connect(address)
    if address is not None and not address.startswith("ray://"):
        address = ray.get_runtime_context().gcs_address
    try:
        yield Connection(address, processes)
    finally:
        with _own_signals():
            ray.shutdown()


def _start_local(workers: int) -> dict[int, str]:
    """Starts Ray on this machine; returns its `LOCAL_PROCESSES`.

    Ray gives its processes 30 s, which a busy machine may exceed: then it tries again.

    Raises Failure where Ray was too slow `STARTS` times.
    """
    for _ in range(STARTS):
        before = _children()
        try:
            ray.init(
                address="local",  # neither RAY_ADDRESS nor another Ray on this machine is meant
                num_cpus=workers,
                include_dashboard=False,
                _temp_dir=tempfile.gettempdir() + "/ray",
                **QUIET,
            )
        except Exception as error:
            if "timed out" not in str(error):  # Ray has no class of its own for it
                raise
            ray.shutdown()
            for pid in _children() - before:  # Ray forgets them, and they would slow down the next start
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            programs = {pid: _program(pid) for pid in _children() - before}
            return {pid: name for pid, name in programs.items() if name in LOCAL_PROCESSES}
    raise Failure(f"Ray did not start within 30 s, {STARTS} times in a row; is this machine overloaded?")


def _children() -> set[int]:
    """The processes that this one has started and that still run (Linux)."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            _, parent, *_ = (place / "stat").read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                found.add(int(place.name))
    return found


def _program(pid: int) -> str:
    """The name of the program that a process runs; empty where the process has ended, also if nobody has noticed."""
    try:
        return Path((Path("/proc") / str(pid) / "cmdline").read_text().partition("\0")[0]).name
    except OSError:
        return ""


def _connect(address: str) -> None:
    """Connects to a cluster. Raises RequestError where that is not possible."""
    check_reachable(address)
    options = {name: value for name, value in QUIET.items() if name != "configure_logging"}
    try:
        ray.init(address=address, **(options if address.startswith("ray://") else QUIET))
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"simulation.address is {address!r}, but Ray cannot connect: {first}") from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Restores the signal handlers that Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def marked(state: Path) -> Iterator[str]:
    """Puts a marker file into `state`, by which a worker knows that it sees the same folder; yields its name."""
    state.mkdir(parents=True, exist_ok=True)
    marker = state / f".marker-{secrets.token_hex(4)}"
    marker.touch()
    try:
        yield marker.name
    finally:
        marker.unlink(missing_ok=True)
