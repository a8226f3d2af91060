"""Keeps a server running: SuperLink, the gateway before it, the boards' registration, and one run after the other."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lightcl.errors import RequestError, one_line
from lightcl.storage.files import exclusive
from server.link.devices import Devices, flower_keys
from server.link.flower import Flower, FlowerError
from server.link.folder import ServerFolder, write_private
from server.link.gateway import GatewayServer
from server.link.progress import EventWatch, Say
from server.link.runs import MOST_FAILURES, Run, Runs
from server.link.superlink import SuperLink, check_port, end_marked, free_port, lives, run_process, superlink_command

TICK_SECONDS = 1.0
REFUSED_SECONDS = 10.0
"""After Flower has refused to start a run."""
LOOK_SECONDS = 20.0
"""Between two questions to Flower whether a run is still going: each starts a Python process."""


class Supervisor:
    """The work of `lightcl server run`; `say` shows a line on the console."""

    def __init__(self, folder: ServerFolder, say: Say) -> None:
        self.folder, self.say = folder, say
        self.devices, self.runs = Devices(folder), Runs(folder)
        inner_port = free_port()
        self.superlink, self.flower = SuperLink(folder, inner_port), Flower(folder, inner_port)
        self.gateway = GatewayServer(folder, inner_port, self._keys())
        self._inner_port = inner_port
        self._next_look = self._next_start = 0.0
        self._watch: EventWatch | None = None
        self._process: int | None = None
        self._shown = ""

    def run(self, idle: Callable[[], bool] = lambda: False) -> None:
        """Until the user stops it, or until `idle` holds. Ends all that it has started."""
        left = end_marked(self.folder.path)
        if left:
            self.say(f"ended {left} processes that a killed server had left")
        try:
            self.gateway.start()
            write_private(self.folder.path / "running.json", json.dumps({"pid": os.getpid(), "port": self._inner_port}))
            self.say(f"boards connect to {self.folder.settings.server}; log: {self.folder.log}")
            while not idle():
                self._tick()
                time.sleep(TICK_SECONDS)
        except KeyboardInterrupt:
            self.say("stopping; lightcl server run continues unfinished runs")
            raise
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C would leave processes behind
                signal.signal(number, signal.SIG_IGN)
            self.gateway.app.open = False
            self.superlink.stop()
            self.gateway.stop()
            (self.folder.path / "running.json").unlink(missing_ok=True)

    def _tick(self) -> None:
        if text := self.superlink.keep_up():
            self.gateway.app.open = False
            self.say(text)
            if last := self.superlink.last_lines():
                self.say(last)
        if not self.superlink.alive:
            return
        try:
            if not self.gateway.app.open:
                if not self.flower.answers():
                    return
                self._register(everything=True)
                self._cut_off_runs()
                self.gateway.app.open = True
                self.say("the server is ready")
            else:
                self._register(everything=False)
            self._report_cut_off()
            self._advance()
        except (FlowerError, RequestError, OSError) as error:
            if str(error) != self._shown:  # SuperLink may be on its way down: the next tick sees
                self._shown = str(error)
                self.say(f"warning: {one_line(str(error))}")

    # -- boards ------------------------------------------------------------------------------------------------

    def _keys(self) -> frozenset[str] | None:
        return None if self.folder.settings.insecure else flower_keys(self.devices.all())

    def _register(self, *, everything: bool) -> None:
        """Makes the boards known to Flower; `everything`: also those that it should know already."""
        if self.folder.settings.insecure:
            return
        devices = self.devices.all()
        new = [one for one in devices if one.public_key and (not one.node or one.retired)]
        if everything:
            known = self.flower.nodes()
            new += [one for one in devices if one.public_key and one.node and one.node not in known]
        for device in new:
            if device.retired:
                with suppress(FlowerError):  # it has forgotten it already
                    self.flower.unregister(device.retired)
            self.devices.note_node(device, self._registered(device.public_key))
            self.say(f"registered board {device.name} (device {device.device})")
        self.gateway.app.keys = flower_keys(devices)

    def _registered(self, key: str) -> str:
        try:
            return self.flower.register(key)
        except FlowerError as error:
            if "already in use" not in str(error).lower():
                raise
        # The server was killed before it could write the number down: it is the one that no board has.
        ours = {number for one in self.devices.all() for number in (one.node, one.retired)}
        unknown = [number for number in self.flower.nodes() if number not in ours]
        if len(unknown) != 1:
            raise FlowerError("Flower knows the key of a board under a number that is not known here")
        return unknown[0]

    def _report_cut_off(self) -> None:
        """Says whose replies the gateway has cut off."""
        while self.gateway.app.cut_off:
            key = self.gateway.app.cut_off.pop()
            name = next((one.name for one in self.devices.all() if key in flower_keys([one])), "a board without a key")
            most = self.folder.settings.most_reply_mib
            self.say(
                f"warning: {name}: its reply was cut off after {most} MiB; if the network is that large, raise "
                "most_reply_mib in server.toml and start the server again"
            )

    # -- runs --------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One step of the first run that is not over."""
        run = next((run for run in self.runs.all() if run.open), None)
        if run is None:
            return
        if self._watch is None or self._watch.run != run.number:
            self._watch = EventWatch(run.number, Path(run.out), self.say)
        self._watch.show()
        if run.progress.complete:
            self._finish(run)
        elif run.flower and run.state == "going":
            if self._process_died():
                self.flower.stop(run.flower)
                self._ended(run, "its process was killed")
            elif time.monotonic() >= self._next_look:
                self._look(run)
        elif time.monotonic() >= self._next_start:
            self._start(run)

    def _start(self, run: Run) -> None:
        resume = run.progress.begun
        config: dict[str, str | bool] = {
            "scenario": str(self.runs.scenario_file(run)), "set": "", "out": run.out, "resume": resume,
        }  # fmt: skip
        rounds = run.progress.rounds
        self._next_start = time.monotonic() + REFUSED_SECONDS
        number = self.flower.start(config)
        self.runs.save(replace(run, state="going", flower=number, starts=run.starts + 1))
        verb = f"continues after round {rounds}" if resume else "starts"
        self.say(f"run {run.number} ({run.given}) {verb}; results in {run.out}")
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._process = None

    def _process_died(self) -> bool:
        """Whether the run's process was there and is gone; Flower itself notices that after a minute."""
        if self._process is None:
            self._process = run_process(self.folder.path)
            return False
        return not lives(self._process)

    def _cut_off_runs(self) -> None:
        """A SuperLink that has just started does not work on the runs of the one before, though its database says so.

        They start again at once, and it is not their failure.
        """
        for run in self.runs.all():
            if run.state == "going":
                self.flower.stop(run.flower)
                self.runs.save(replace(run, state="waiting"))
                self._next_start = 0.0

    def _look(self, run: Run) -> None:
        """Whether Flower still works on a run; if not, it waits for its next start or is given up."""
        self._next_look = time.monotonic() + LOOK_SECONDS
        status, details = self.flower.status(run.flower)
        if status not in ("pending", "starting", "running"):
            self._ended(run, details or f"Flower says {status}")

    def _ended(self, run: Run, reason: str) -> None:
        """The run's process is gone: its work is done, or it waits for its next start, or is given up."""
        self._process = None
        if run.progress.complete:  # written since the last look
            self._finish(run)
            return
        reason = one_line(run.progress.failure() or reason)
        ended = run.after_end(run.progress.rounds, reason)
        self.runs.save(ended)
        self._next_start = time.monotonic() + ended.pause
        self.say(f"run {run.number} failed: {reason}")
        if ended.state == "failed":
            self.say(
                f"run {run.number} is given up after {MOST_FAILURES} failures without a finished round; to try it "
                f"again: lightcl server start with the same SCENARIO and --out {run.out}"
            )
        else:
            self.say(f"run {run.number} starts again in {ended.pause:g} s (failure {ended.failures})")

    def _finish(self, run: Run) -> None:
        results = run.progress.results()
        self.runs.save(replace(run, state="done", reason=""))
        finished, devices = results.get("devices_finished", "?"), results.get("devices", "?")
        self.say(f"run {run.number} is complete: {finished} of {devices} devices finished; lightcl report {run.out}")


@contextmanager
def only_server(folder: ServerFolder) -> Iterator[None]:
    """Keeps a second server from the folder. Raises RequestError."""
    held = exclusive(folder.path, wait=False)
    try:
        held.__enter__()
    except BlockingIOError as error:
        raise RequestError(
            f"--folder: a server runs on {folder.path} already; ask it for a run with `lightcl server start`"
        ) from error
    try:
        yield
    finally:
        held.__exit__(None, None, None)


def check_before_start(folder: ServerFolder) -> None:
    """What can be known before anything starts. Raises RequestError."""
    folder.check_certificates()
    superlink_command(folder, 0)
    Devices(folder).all()
    Runs(folder).all()
    check_port(folder.settings.listen, folder.settings.port)
