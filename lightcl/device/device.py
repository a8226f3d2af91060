"""One edge device: its private stream, its network, its method and its state on disk.

`lightcl train`, simulated devices and boards all use this class, so all three do the same thing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from lightcl.assembly import build_stream, fleet_head
from lightcl.data.batches import viewed
from lightcl.data.field import CHANNELS, NotReady
from lightcl.data.partition import Share, share_of
from lightcl.data.sources import Source, load_source
from lightcl.data.streams.field import FieldStream
from lightcl.data.tasks import Batch, Task, TaskContext, TaskStream
from lightcl.device import hardware
from lightcl.device.arithmetic import with_arithmetic
from lightcl.device.hardware import choose_accelerator, set_up_torch
from lightcl.device.metering import Board, LimitReached, Meter, Spent
from lightcl.device.network import device_network
from lightcl.device.optimizers import make_optimizer
from lightcl.device.prefix import fixed_prefix
from lightcl.device.state import DeviceValues, Position, changing_tensors, pack_optimizer, unpack_optimizer_
from lightcl.device.training import EpochProgress, OnEpoch, autocast, evaluate, train_epoch
from lightcl.exchange.messages import Telemetry, Tested, Trained
from lightcl.exchange.tensors import Arrays, Saved, adopt_, outgoing, outgoing_statistics, shared_tensors
from lightcl.metrics import AccuracyMatrix, row_over
from lightcl.networks.pruning import channel_digest
from lightcl.networks.staged import Backbone
from lightcl.networks.weights import digest
from lightcl.scenario import Scenario
from lightcl.scenario.digest import state_digest
from lightcl.seeds import derive
from lightcl.storage.shared import SharedVersions
from lightcl.storage.state import Damaged, StateError, StateFolder, Stored, under

LOSSES = "training/losses"
"""The tensor of a state with the losses of an unfinished epoch's steps: it has as many values as steps are done."""


class OutOfStep(Exception):
    """A request that does not follow from the device's position in its stream."""


class EdgeDevice:
    """A device that learns its stream task by task and survives being killed at any point.

    Tasks have the scenario's numbers everywhere; the device learns those in `stream.ids` and skips the others.

    `share` is the device's part of `source`; the default is its part under the scenario's partition. `folder` holds its
    state; `durable`: whether the state survives a power cut. `network` is the result of `device_network` for the
    scenario; the device takes it over. `shared` is where the devices of one machine keep the tensors that they all
    receive. `head` are the classes of the head (`fleet_head`); give them with a `share` where the fleet is known.
    `stream` is a device's stream whose images come with time; it takes the place of `source`, `share` and `head`.
    `board` is the machine that the training is measured on; None: nothing is measured, and there are no limits.

    Raises RequestError for a scenario that cannot be carried out, StateError for unreadable state.
    """

    def __init__(
        self, scenario: Scenario, number: int, folder: Path, *, source: Source | None = None,
        share: Share | None = None, network: Backbone | None = None, durable: bool = True,
        shared: SharedVersions | None = None, head: Sequence[int] | None = None, board: Board | None = None,
        stream: FieldStream | None = None,
    ) -> None:  # fmt: skip
        hardware.reset_peak()  # a simulation's worker runs many devices, large and small ones
        scenario = with_arithmetic(scenario)
        self.scenario, self.number = scenario, number
        if stream is not None:
            self.stream: TaskStream = stream
            channels = CHANNELS
        else:
            if source is None:
                source = load_source(scenario.source_request())
            if share is None:
                share = share_of(source, scenario.fleet, scenario.seed, number)
                head = fleet_head(scenario, source) if head is None else head
            self.stream = build_stream(scenario, source, share, number, head)
            channels = source.channels
        self.accelerator = choose_accelerator(scenario.device.accelerator)
        set_up_torch(self.accelerator, scenario.device.threads)
        if network is None:
            network = device_network(scenario, in_channels=channels, classes=self.stream.head_classes)
        self.network = network
        if self.network.head.weight.device != self.accelerator:  # walking through all tensors takes a millisecond
            self.network.to(self.accelerator)
        self.prefix_digest = digest(self.network.prefix)
        self.channel_digest = self.network.prefix.derive("channels", lambda: channel_digest(self.network))
        self.method = scenario.method.build(self.network)
        if scenario.fixed_prefix:
            self.method.prefix_features = fixed_prefix(scenario, self.network, self.prefix_digest)
        self.position = self._start = Position(self.stream.ids[self.stream.first] if self.stream else 0, 0)
        self.version = self.saved_version = 0
        """Of the shared tensors: in memory, and those that a device opened from the saved state has."""
        self._received: Mapping[str, np.ndarray] | None = None
        """Not None: the network has shared tensors that the saved state has not; these, if other states may refer to
        them."""
        self.last_report: Trained | None = None
        self.telemetry: Telemetry | None = None
        """Of the last report's training; None where nothing is measured."""
        self._board = board
        self._unfinished: Spent | None = None
        self._losses: list[torch.Tensor] = []  # of the steps of an unfinished epoch
        self.rows: dict[str, dict[int, list[float]]] = {"til": {}, "cil": {}}
        self._state = StateFolder(folder, durable=durable)
        self._shared_versions = shared
        self._start_of_head = shared.start(self._own_head()) if shared else None  # before the state, which refers to it
        self._saved_at = time.monotonic()
        self._optimizer_values: dict[str, Any] = {}  # as of the last save; they belong to the tensors saved with them
        self._lost: Path | None = None  # the missing file of its shared tensors
        if not self._restore():
            self.optimizer = make_optimizer(self.method, scenario)

    @property
    def finished(self) -> bool:
        """Whether the last task is learned; a device without tasks has nothing to learn."""
        return not self.stream or self.position == Position(self.stream.ids[-1], self.scenario.training.epochs)

    @property
    def awaits_test(self) -> bool:
        """Whether a task is learned that the device has not been tested on."""
        task = self.position.task
        return self.position.epochs == self.scenario.training.epochs and task not in self.rows["til"]

    @property
    def bytes_in_memory(self) -> int:
        """What the device has for itself alone: its suffix and head, and what its method keeps; also its prefix where
        that changes and is not shared (`frozen_batch_norm: train`)."""
        shared = self.network.frozen_batch_norm == "eval"
        own = changing_tensors(self.network) if shared else self.network.state_dict()
        return sum(tensor.nbytes for tensor in (*own.values(), *self.method.state_dict().values()))

    def close(self) -> None:
        """Forgets what was still to be computed for the device, which refers to the device itself.

        Without that only Python's collector frees a device, which it may do late, or never after `gc.freeze`.
        """
        self.method.prefix_features.announce(())

    def is_as_saved(self) -> bool:
        """Whether the saved state is the one that this object has saved or read, and nothing was received since."""
        return self._received is None and self._state.is_current()

    def matrix(self, setting: str) -> AccuracyMatrix:
        """The accuracy matrix so far, with holes where a task is skipped; `setting` is "til" or "cil"."""
        return AccuracyMatrix.from_rows(self.rows[setting], self.scenario.stream.tasks, self.stream.ids)

    # -- training ----------------------------------------------------------------------------------------------

    def train(self, task: int, until_epoch: int, on_epoch: OnEpoch | None = None) -> Trained:
        """Learns `task` until `until_epoch` of its epochs are done, then saves the state.

        The same request twice trains once and returns the same report. Raises OutOfStep where the request
        does not follow from the device's position, TrainingFailure where the loss is no longer a number; after that the
        device must be opened again, from its last saved state. Raises LimitReached where the board is outside its
        limits: the step at hand is done and the state is saved, and the same request continues there. Raises NotReady
        where the images of the task are not there so far; only what was received is saved then.
        """
        goal = Position(task, until_epoch)
        if self.last_report is not None and goal == self.position == Position(
            self.last_report.task, self.last_report.epochs
        ):
            self._check_complete()
            return replace(self.last_report, version=self.version)
        self._check_step(goal)
        self._check_complete()
        start = time.monotonic()
        try:
            context, progress = self._context(task), EpochProgress(self._losses)
        except NotReady:
            self.save_received()
            raise
        paused: LimitReached | None = None
        with Meter(self._board) if self._board else nullcontext() as meter:
            try:
                loss = self._train(goal, context, progress, meter, on_epoch)
            except LimitReached as reached:
                paused = reached
        self.method.prefix_features.release()  # the saved state is a copy of the weights
        tally = meter.tally if meter else None
        spent = (self._unfinished or Spent()).plus(progress.images, time.monotonic() - start, tally)
        if paused:
            if progress.images:
                self._unfinished = spent
                self._save()
            else:  # it was refused before anything began
                self.save_received()
            raise paused
        peak = hardware.peak() / 2**20
        self._unfinished = None
        self.telemetry = self._board.telemetry(meter, spent) if self._board and meter else None
        self.last_report = Trained(
            device=self.number,
            task=task,
            epochs=until_epoch,
            version=self.version,
            prefix=self.prefix_digest,
            channel_sets=self.channel_digest,
            examples=len(context.task.train),
            loss=loss,
            seconds=spent.seconds,
            peak_memory_mib=peak,
        )
        self._save()
        return self.last_report

    def _train(
        self, goal: Position, context: TaskContext, progress: EpochProgress, meter: Meter | None,
        on_epoch: OnEpoch | None,
    ) -> float:  # fmt: skip
        """The epochs up to the goal; the mean loss of the last one. Raises LimitReached."""
        if meter:
            meter.check(again=self._unfinished is not None)
            progress.check = meter.check
        begun = self.position.task == goal.task and (self.position.epochs > 0 or bool(progress.losses))
        epochs = range(self.position.epochs if begun else 0, goal.epochs)
        self.method.prefix_features.announce(self._announced(context, epochs))
        if not begun:
            self.position = Position(goal.task, 0)
            self.network.train()
            with autocast(self.scenario, self.accelerator):
                self.method.begin_task(context)
            self.optimizer = make_optimizer(self.method, self.scenario)
        loss = float("nan")
        for epoch in range(self.position.epochs, goal.epochs):
            loss = train_epoch(self.method, self.optimizer, context, self.scenario, epoch, progress)
            progress.losses = self._losses = []
            self.position = Position(goal.task, epoch + 1)
            if epoch + 1 == self.scenario.training.epochs:
                self.network.eval()
                with autocast(self.scenario, self.accelerator):
                    self.method.end_task(context)
                # The next task has an optimizer of its own, so nobody needs the state of this one.
                self.optimizer = make_optimizer(self.method, self.scenario)
            elif (
                epoch + 1 < goal.epochs
                and time.monotonic() - self._saved_at > self.scenario.training.checkpoint_seconds
            ):
                self._save()
            if on_epoch:
                on_epoch(goal.task, epoch + 1, loss)
            if meter and epoch + 1 < goal.epochs:
                meter.check()
        return loss

    def _announced(self, context: TaskContext, epochs: range) -> Iterator[Batch]:
        """What the prefix will be asked for while the task is learned up to the end of these epochs, and in the test
        after it."""
        views = [view for view in dict.fromkeys(map(context.view, epochs)) if view is not None]
        yield from (viewed(context.task.train, view) for view in views[:1])
        yield from self.method.looks_at(context)
        yield from (viewed(context.task.train, view) for view in views[1:])
        yield context.task.tested_on(self.scenario.stream.evaluate_on).load()

    def skip_to(self, task: int) -> None:
        """Starts a device that has learned nothing at `task`, as if there were no earlier tasks.

        Raises OutOfStep where it has begun already or does not learn this task.
        """
        if self.position != self._start or task not in self.stream.ids:
            raise OutOfStep(f"device {self.number} cannot begin with task {task}: it is at {self.position}")
        self.position = self._start = Position(task, 0)

    def _check_step(self, goal: Position) -> None:
        total = self.scenario.training.epochs
        ids = self.stream.ids
        if goal.task not in ids or not 0 < goal.epochs <= total:
            raise OutOfStep(
                f"the request is for task {goal.task}, epoch {goal.epochs}, but device {self.number} learns "
                f"{len(ids)} of {self.scenario.stream.tasks} tasks ({', '.join(map(str, ids)) or 'none'}), of {total} "
                "epochs each"
            )
        here = self.position
        same_task = goal.task == here.task and goal.epochs > here.epochs
        follows = self.stream.position_of(goal.task) == self.stream.position_of(here.task) + 1
        next_task = follows and here.epochs == total
        if not (same_task or next_task):
            raise OutOfStep(
                f"device {self.number} has done {here.epochs} of {total} epochs of task {here.task} and cannot go to "
                f"task {goal.task}, epoch {goal.epochs}"
            )

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self) -> Tested:
        """Tests the device's tasks up to the current one, keeps the row of the accuracy matrix and saves the state.

        Tasks whose test images are deleted (`data.keep: none`) are holes in the row. Raises OutOfStep for a device
        without tasks.
        """
        if not self.stream:
            raise OutOfStep(f"device {self.number} learns no task, so there is nothing to test")
        self._check_complete()
        start = time.monotonic()
        task = self.position.task
        tested = [one for one in self._until(task) if len(one.tested_on(self.scenario.stream.evaluate_on))]
        results = evaluate(self.method, tested, self.scenario, self.accelerator)
        report = Tested(
            device=self.number,
            task=task,
            epochs=self.position.epochs,
            version=self.version,
            til=[r.til for r in results],
            cil=[r.cil for r in results] if "cil" in self.scenario.settings else [],
            tasks=[t.id for t in tested],
            images=[r.images for r in results],
            seconds=time.monotonic() - start,
        )
        self.rows["til"][task] = row_over(self.stream.ids, report.tasks, report.til)
        if report.cil:
            self.rows["cil"][task] = row_over(self.stream.ids, report.tasks, report.cil)
        if self._received is not None:
            self.save_received()
        elif self.last_report is None:  # nothing is trained yet, so the tensors may not be saved
            self._save()
        else:
            self._state.save(None, self._values().to_json())
        return report

    # -- exchange ----------------------------------------------------------------------------------------------

    def receive(self, arrays: Mapping[str, np.ndarray], version: int) -> None:
        """Adopts shared tensors of a newer version. On ExchangeError nothing has changed.

        They are saved with what follows, a training or a test: a device that is killed before gets the message again.
        """
        if version > self.version:
            adopt_(self.method, arrays, self.scenario.server.aggregation)
            self.version, self._lost = version, None
            self._received = arrays if self._shared_versions else {}  # a board has no room for a second copy

    def save_received(self) -> None:
        """Saves what was received, where the saved state does not have it and nothing was trained since."""
        if self._received is not None:
            self._save(shared=self._shared_file(self._received) if self._shared_versions else None)

    def may_receive(self, task: int, until_epoch: int) -> bool:
        """Whether shared tensors may replace the device's own before it trains `task` until `until_epoch`.

        Not if that training is finished or has begun: then the reply was lost or the device was killed meanwhile, and
        the tensors would undo its progress. Always if its own shared tensors are missing.
        """
        if self._lost:
            return True
        reported = self.last_report and Position(self.last_report.task, self.last_report.epochs)
        begun = bool(self._losses) or (self.position != self._start and self.position != reported)
        return not begun and self.position != Position(task, until_epoch)

    def check_version(self, version: int) -> None:
        """Raises OutOfStep where the device has older shared tensors than the server believes.

        That is the case after a damaged state, when the device went back to the generation before it.
        """
        if self.version < version:
            raise OutOfStep(
                f"device {self.number} has version {self.version} of the shared tensors, the request is for version "
                f"{version}; send them again"
            )

    def _check_complete(self) -> None:
        if self._lost:
            raise OutOfStep(
                f"device {self.number} has no shared tensors: its state refers to {self._lost.name}, which is missing "
                "or damaged; send the newest version again"
            )

    def check_at(self, task: int, epochs: int) -> None:
        """Raises OutOfStep where the device is not at this point of its stream."""
        if self.position != Position(task, epochs):
            raise OutOfStep(
                f"device {self.number} is at epoch {self.position.epochs} of task {self.position.task}, "
                f"not at epoch {epochs} of task {task}"
            )

    def outgoing(self) -> Arrays:
        """The tensors for the server."""
        return outgoing(self.network, self.scenario.server.aggregation) | self.outgoing_statistics()

    def outgoing_statistics(self) -> Arrays:
        """Those of them that are no weights; there are some only with the reply that finishes a task."""
        finished = self.position.epochs == self.scenario.training.epochs
        return outgoing_statistics(self.method) if finished else {}

    def saved_outgoing(self) -> dict[str, Saved]:
        """Where the tensors of `outgoing` are on disk, without the statistics; empty where they are not all there."""
        tensors = shared_tensors(self.network, self.scenario.server.aggregation)
        file = self._state.file_with([f"network/{name}" for name in tensors])
        if file is None or self._received is not None or any(t.dtype != torch.float32 for t in tensors.values()):
            return {}
        return {name: Saved(file, f"network/{name}", tuple(tensor.shape)) for name, tensor in tensors.items()}

    # -- state -------------------------------------------------------------------------------------------------

    def _values(self) -> DeviceValues:
        return DeviceValues(
            device=self.number,
            scenario=state_digest(self.scenario),
            prefix=self.prefix_digest,
            channels=self.channel_digest,
            accelerator=self.accelerator.type,
            position=self.position,
            version=self.version,
            report=self.last_report,
            rows={"til": self.rows["til"], "cil": self.rows["cil"]},
            optimizer=self._optimizer_values,
            telemetry=self.telemetry,
            unfinished=self._unfinished,
        )

    def _shared_file(self, received: Mapping[str, np.ndarray]) -> Path | None:
        """The file of the tensors that all devices have after receiving this version; None where the disk is full."""
        assert self._shared_versions is not None
        tensors = {f"network/{n}": tensor for n, tensor in changing_tensors(self.network).items() if n in received}
        try:
            return self._shared_versions.file(self.version, tensors) if tensors else None
        except (OSError, safetensors.SafetensorError):  # the state then holds all of its tensors, or is refused as well
            return None

    def _own_head(self) -> dict[str, torch.Tensor]:
        """Of all that changes, what a device with a shared suffix does not share; empty where it shares all or none."""
        if self.scenario.server.aggregation != "suffix":
            return {}
        name, head = self.network.head_name, self.network.head.state_dict()
        return {f"network/{name}.{key}": tensor.detach().cpu().clone() for key, tensor in head.items()}

    def _save(self, shared: Path | None = None) -> None:
        tensors = {f"network/{name}": tensor for name, tensor in changing_tensors(self.network).items()}
        tensors |= {f"method/{name}": tensor for name, tensor in self.method.state_dict().items()}
        # Between tasks an optimizer has no state, and to find all parameters' names takes a third of a millisecond.
        names = list(self.method.trainable()) if self.optimizer.state else []
        optimizer, self._optimizer_values = pack_optimizer(self.optimizer, names)
        tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
        if self._losses:
            tensors[LOSSES] = torch.stack(self._losses)
        start = self._start_of_head if shared else None  # until its test a device holds far more than a head
        self._state.save(tensors, self._values().to_json(), shared=shared, start=start)
        self._received, self.saved_version = None, self.version
        self._saved_at = time.monotonic()

    def _restore(self) -> bool:
        """Takes over the saved state; whether there is one."""
        stored = self._state.load(self._check_stored)
        if stored is None:
            return False
        tensors, values = stored.tensors, DeviceValues.of(stored.values)
        folder = self._state.folder
        if values.scenario != state_digest(self.scenario) or values.device != self.number:
            raise StateError(
                f"{folder}: holds the state of device {values.device} under another scenario; "
                "use another folder or remove this one"
            )
        if values.channels != self.channel_digest:
            raise StateError(
                f"{folder}: was saved with other channels ({values.channels}, now "
                f"{self.channel_digest}): the pruned weights have changed; use those of the first run"
            )
        if values.prefix != self.prefix_digest:
            raise StateError(
                f"{folder}: was saved with another frozen prefix ({values.prefix}, now "
                f"{self.prefix_digest}): the weights have changed; use those of the first run"
            )
        if values.accelerator != self.accelerator.type:
            raise StateError(
                f"{folder}: was saved on {values.accelerator} and would give other numbers on "
                f"{self.accelerator.type}; set device.accelerator, use another folder or remove this one"
            )
        try:
            self._adopt_(tensors, values)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise StateError(
                f"{folder}: the saved tensors are not those of this method and network ({type(error).__name__}: "
                f"{error}); use another folder, or remove this one: the device then begins its stream again"
            ) from error
        self.position, self.last_report = values.position, values.report
        self.telemetry, self._unfinished = values.telemetry, values.unfinished
        self._lost = stored.lost
        self.version = self.saved_version = 0 if self._lost else values.version
        self.rows = {setting: dict(values.rows[setting]) for setting in ("til", "cil")}
        return True

    def _check_stored(self, stored: Stored) -> None:
        """Raises Damaged for a state that no device of this scenario can have; whose state it is, is not checked."""
        values = DeviceValues.of(stored.values)
        if values.scenario != state_digest(self.scenario) or values.device != self.number:
            return  # its stream is another
        values.check(self.stream, self.scenario.training.epochs)
        if values.channels != self.channel_digest:
            return
        for name, target in changing_tensors(self.network).items():
            tensor = stored.tensors.get(f"network/{name}")
            if tensor is None and not stored.lost:
                raise Damaged(f"the tensor {name} is missing")
            if tensor is not None and tensor.shape != target.shape:
                raise Damaged(f"the tensor {name} has shape {list(tensor.shape)}, expected {list(target.shape)}")

    def _adopt_(self, tensors: Mapping[str, torch.Tensor], values: DeviceValues) -> None:
        with torch.no_grad():
            for name, target in changing_tensors(self.network).items():
                if f"network/{name}" in tensors:  # shared tensors may be gone; new ones come before they are needed
                    target.copy_(tensors[f"network/{name}"])
        # On a board the tensors are a map of the file; in a simulation they are views of all that was read of it.
        copy = not self._state.durable
        self.method.load_state_dict(
            {name: tensor.to(self.accelerator, copy=copy) for name, tensor in under(tensors, "method/").items()}
        )
        if LOSSES in tensors:
            self._losses = list(tensors[LOSSES].to(self.accelerator).unbind())
        self.optimizer = make_optimizer(self.method, self.scenario)
        self._optimizer_values = values.optimizer
        state = {name: tensor.clone() if copy else tensor for name, tensor in under(tensors, "optimizer/").items()}
        names = list(self.method.trainable()) if state or values.optimizer["state"] else []
        unpack_optimizer_(self.optimizer, names, state, self._optimizer_values)

    def _context(self, task: int) -> TaskContext:
        to_learn = self.stream.to_learn(self.stream.position_of(task))
        seen = sorted({row for t in self._until(task) for row in t.rows})
        return TaskContext(
            to_learn,
            torch.tensor(to_learn.rows, device=self.accelerator),
            torch.tensor(seen, device=self.accelerator),
            self.scenario.training.batch_size,
            derive(self.scenario.seed, "device", self.number, "task", task),
            self.accelerator,
            self.scenario.training.epochs,
            self.scenario.augmentation,
            self.scenario.data.crop_padding,
            self._start.task,
            self.scenario.data.views,
            self.scenario.seed,
        )

    def _until(self, task: int) -> Sequence[Task]:
        """The device's tasks up to and including this one."""
        return self.stream[: self.stream.position_of(task) + 1]
