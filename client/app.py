"""A device as a Flower ClientApp: decode a message, let the device work, encode the reply.

On a board, local matters come from the SuperNode's `--node-config`: `partition-id` (which device of the fleet this is;
with `num-partitions`, which devices: see Greeting), `name`, `data-path`, `weights-path`, `own-data` (all of the
local data is this device's), `delete-learned` (learned images may be deleted), `state-dir`, `accelerator`, `threads`;
and beyond which heat, disk and battery the board backs off: `limit-temperature-c`, `limit-free-disk-mb`,
`limit-battery-percent`.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from pydantic import ValidationError

from client.board.config import default_state_folder
from client.kept import KeptDevices, Opened
from lightcl.assembly import fleet_head, stream_plan
from lightcl.data.field import CHANNELS, FieldDamaged, FieldPlan, FieldTasks, NotReady
from lightcl.data.images import names_digest
from lightcl.data.partition import Share, Shares
from lightcl.data.sources import Source, SourceRequest, comes_to_boards, load_source
from lightcl.data.sources.field import FIELD
from lightcl.data.streams import learnable
from lightcl.data.streams.field import FieldStream
from lightcl.device.arithmetic import with_arithmetic
from lightcl.device.device import EdgeDevice, OutOfStep
from lightcl.device.hardware import choose_accelerator, gpu_uuid
from lightcl.device.metering import Board, LimitReached, Limits
from lightcl.device.network import device_network
from lightcl.device.telemetry import Sensors, nvml_gpu
from lightcl.device.training import TrainingFailure
from lightcl.errors import RequestError, nearest, one_line
from lightcl.exchange.compression import codec_named
from lightcl.exchange.messages import (
    ARRAYS,
    EXAMPLES,
    INSTRUCTION,
    METRICS,
    NOTICE,
    REPLY,
    TELEMETRY,
    TESTED,
    BackOff,
    Greeting,
    Instruction,
    Notice,
    ProtocolError,
    Refusal,
    Tested,
)
from lightcl.exchange.tensors import Arrays, ExchangeError
from lightcl.exchange.wire import decoded, packed
from lightcl.export.model import Description
from lightcl.networks.lending import NetworkLender
from lightcl.scenario import Scenario, scenario_from_json
from lightcl.storage.files import exclusive
from lightcl.storage.shared import SharedVersions
from lightcl.storage.state import StateError

Refusable = (
    RequestError, StateError, FieldDamaged, OutOfStep, TrainingFailure, ExchangeError, ProtocolError, OSError,
)  # fmt: skip
"""Errors that a device answers with a Refusal. An OSError comes from the disk: no room, or no permission."""


@dataclass(frozen=True)
class Local:
    """What a device knows of itself and the server does not decide."""

    partition: int
    partitions: int
    name: str
    state: Path
    data_path: str | None = None
    weights_path: str | None = None
    own_data: bool = False
    delete_learned: bool = False
    accelerator: str | None = None
    threads: int | None = None
    limit_temperature_c: float | None = None
    limit_free_disk_mb: float | None = None
    limit_battery_percent: float | None = None

    durable: bool = True
    """Whether a saved state survives a power cut; in a simulation it does not, and a save waits for no disk."""
    root: Path = Path("/")
    """Where the sensors' `sys` and `proc` are."""

    def board(self, folder: Path, accelerator: str) -> Board | None:
        """The machine under a device with this state folder; None in a simulation, where nothing is measured."""
        if not self.durable:
            return None
        uuid = gpu_uuid(choose_accelerator(accelerator))
        limits = Limits(self.limit_temperature_c, self.limit_free_disk_mb, self.limit_battery_percent)
        return Board(folder, Sensors(self.root, nvml_gpu(uuid) if uuid else None), limits)

    @property
    def overrides(self) -> Overrides:
        return Overrides(self.name, self.data_path, self.weights_path, self.accelerator, self.threads)


@dataclass(frozen=True)
class Overrides:
    """The keys of a scenario that a node decides for itself; None leaves the scenario's. `name` is for errors."""

    name: str = field(compare=False)
    data_path: str | None
    weights_path: str | None
    accelerator: str | None
    threads: int | None

    def apply(self, scenario: Scenario) -> Scenario:
        """The scenario with this node's own data folder, weights, accelerator and threads."""
        changes = {
            ("data", "path"): self.data_path,
            ("network", "weights"): self.weights_path,
            ("device", "accelerator"): self.accelerator,
            ("device", "threads"): self.threads,
        }
        if not any(changes.values()):
            return scenario
        values = scenario.model_dump(mode="json")
        for (section, key), value in changes.items():
            if value:
                values[section][key] = value
        try:
            return Scenario.model_validate(values)
        except ValidationError as error:
            raise RequestError(f"--node-config of {self.name}: {error}") from error


Pack = Callable[[EdgeDevice], ArrayRecord]


def outgoing(device: EdgeDevice) -> Arrays:
    """What a device sends, compressed as the scenario says."""
    return codec_named(device.scenario.server.compression).compress(device.outgoing())


def in_one_array(device: EdgeDevice) -> ArrayRecord:
    """What a board sends: all tensors in one of bytes (lightcl/exchange/wire.py)."""
    return ArrayRecord({name: Array(array) for name, array in packed(outgoing(device)).items()})


def make_app(
    state: Path | None = None, *, durable: bool = True, root: Path = Path("/"), pack: Pack = in_one_array
) -> ClientApp:
    """The app; `state` is where devices keep theirs when the node's configuration does not say.

    `durable`: whether their states survive a power cut. `root`: where the sensors' `sys` and `proc` are. `pack`:
    how a reply carries a device's tensors.
    """
    app = ClientApp()

    def settings(context: Context) -> Callable[[], Local]:
        return lambda: replace(local_settings(context.node_config, state), durable=durable, root=root)

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        return _answer(message, settings(context), _greet)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, settings(context), partial(_with_device, partial(_train, pack=pack)))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(message, settings(context), partial(_with_device, _evaluate))

    return app


Act = Callable[[Instruction, Scenario, Local, Message], RecordDict]


def _answer(message: Message, settings: Callable[[], Local], act: Act) -> Message:
    try:
        local = settings()
        instruction = Instruction.from_record(message.content.config_records.get(INSTRUCTION))
        content = act(instruction, _scenario(instruction.scenario, local.overrides), local, message)
    except Refusable as error:
        content = _refusal(error)
    return Message(content, reply_to=message)


def _greet(instruction: Instruction, scenario: Scenario, local: Local, message: Message) -> RecordDict:
    devices = scenario.fleet.devices
    own = "own-data" if local.own_data else f"data.source: {scenario.data.source}"
    if (local.own_data or comes_to_boards(scenario.data.source)) and 0 < local.partitions < devices:
        raise RequestError(
            f"node {local.name!r} has {own}, so it is one device, but as one of num-partitions={local.partitions} "
            f"nodes for {devices} devices it would be several with the same images; set fleet.devices and "
            "num-partitions to the number of boards"
        )
    if comes_to_boards(scenario.data.source):
        plan = field_plan(scenario, local, local.partition)
        plan.prepare(_folder_of(instruction.run, local.partition, local) / FIELD)
        digest, tasks = names_digest(plan.classes), list(range(plan.tasks))  # all of them will come
        greeting = Greeting(
            local.partition, local.partitions, local.name, CHANNELS, len(plan.classes), digest, True, tasks
        )
        return _reply(greeting.to_record())
    source = _source(scenario.source_request())
    tasks = []
    if local.own_data:
        tasks = list(learnable(stream_plan(scenario), source, whole_share(source), local.partition))
    head = _head(instruction.scenario, local.overrides, local.own_data)
    greeting = Greeting(
        local.partition, local.partitions, local.name, source.channels, len(head), source.names_digest(head),
        local.own_data, tasks,
    )  # fmt: skip
    return _reply(greeting.to_record())


def field_plan(scenario: Scenario, local: Local, device: int) -> FieldPlan:
    """How the images of this board become tasks, for a `scenario` with this node's overrides.

    The scenario comes from the server, which may neither choose a folder of this machine nor have its files deleted.
    Raises RequestError where the node's own configuration does not name the folder or allow the deletion.
    """
    if local.data_path is None:
        raise RequestError(
            "data.source: field needs the folder of this board's images, and only the board names it: set data in "
            "device.toml (lightcl device init --data FOLDER), or data-path in --node-config"
        )
    plan = FieldPlan.of(stream_plan(scenario), device)
    if plan.keep != "all" and not local.delete_learned:
        raise RequestError(
            f"data.keep is {plan.keep!r}, which deletes learned images in {plan.path}, and this board does not allow "
            "it: set delete_learned = true in device.toml (lightcl device init --delete-learned), or "
            "delete-learned=true in --node-config; or data.keep: all in the scenario"
        )
    return plan


def _folder_of(run: str, device: int, local: Local) -> Path:
    """The state folder of a device in a run. Raises ProtocolError for a run's name that cannot be a folder's."""
    if not run.isalnum():
        raise ProtocolError(f"Instruction.run is {run!r}, expected letters and digits")
    return local.state / run / f"device-{device:05d}"


def _with_device(
    work: Callable[[EdgeDevice, Instruction, Callable[[], None]], RecordDict],
    instruction: Instruction,
    scenario: Scenario,
    local: Local,
    message: Message,
) -> RecordDict:
    """Opens the device from its state on disk, unless it is open still, and lets it work.

    `receive` gives it what the server shares.
    """
    folder = _folder_of(instruction.run, instruction.device, local)
    with _alone_in(folder), _opened(instruction, scenario, local, folder) as opened:
        device, about = opened.device, opened.about
        if local.durable:  # a board: `lightcl device predict` and `serve` read its state without the server
            about.write(folder)
        _delete_learned(device)

        def receive() -> None:
            record = message.content.array_records.get(ARRAYS)
            if record is not None:
                sent = decoded(record)
                device.receive(codec_named(scenario.server.compression).restore(sent), instruction.version)

        try:
            content = work(device, instruction, receive)
            if device.method.prefix_features.notice:  # a warning in this process may reach nobody
                content[NOTICE] = ConfigRecord(Notice(one_line(device.method.prefix_features.notice)).to_record())
            opened.stays = device.awaits_test
            return content
        except (LimitReached, NotReady) as reached:
            position = (device.position.task, device.position.epochs, device.saved_version)
            for_images = True if isinstance(reached, NotReady) else None
            return _reply(BackOff(*position, reached.reason, reached.seconds, for_images).to_record())
        except Refusable as error:
            return _refusal(error, device)


def _opened(instruction: Instruction, scenario: Scenario, local: Local, folder: Path) -> AbstractContextManager[Opened]:
    open_device = _open_field if comes_to_boards(scenario.data.source) else _open
    if local.durable:  # a board may be idle for weeks, and has no memory to spare
        return open_device(instruction, scenario, local, folder)
    kept = _kept(instruction.scenario, local.overrides, local.state)
    return kept.opened(
        (instruction.run, instruction.round), folder, lambda: open_device(instruction, scenario, local, folder)
    )


@contextmanager
def _open(instruction: Instruction, scenario: Scenario, local: Local, folder: Path) -> Iterator[Opened]:
    """The device of a scenario whose images are there."""
    source = _source(scenario.source_request())
    share = (
        whole_share(source) if local.own_data else _shares(instruction.scenario, local.overrides)[instruction.device]
    )
    head = _head(instruction.scenario, local.overrides, local.own_data)
    lender = _lender(instruction.scenario, local.overrides, source.channels, len(head), many=not local.durable)
    with lender.lent() as network:
        device = EdgeDevice(
            scenario, instruction.device, folder, source=source, share=share, head=head, network=network,
            durable=local.durable, board=local.board(folder, scenario.device.accelerator),
            shared=None if local.durable else SharedVersions(folder.parent / "shared"),  # a board is one device
        )  # fmt: skip
        with closing(device):
            yield Opened(device, Description.of(scenario, instruction.device, source, device.stream.head))


@contextmanager
def _open_field(instruction: Instruction, scenario: Scenario, local: Local, folder: Path) -> Iterator[Opened]:
    """The device of a scenario whose images come with time."""
    plan = field_plan(scenario, local, instruction.device)
    plan.note(folder / FIELD)
    stream = FieldStream(FieldTasks(folder / FIELD, plan))
    side = plan.image_size
    with _lender(instruction.scenario, local.overrides, CHANNELS, len(plan.classes), many=False).lent() as network:
        device = EdgeDevice(
            scenario, instruction.device, folder, stream=stream, durable=local.durable, network=network,
            board=local.board(folder, scenario.device.accelerator),
        )  # fmt: skip
        with closing(device):
            yield Opened(device, Description(scenario, instruction.device, plan.classes, side, side, CHANNELS))


def _delete_learned(device: EdgeDevice) -> None:
    """Deletes images of a field stream that `data.keep` does not keep: those of the tasks before the device's.

    The server has asked for the next task, so it has the report of the one before; and the state that is saved with the
    next task begun needs no older images, nor does the generation before it.
    """
    if not isinstance(device.stream, FieldStream) or device.stream.joint:
        return
    try:
        device.stream.delete_before(device.position.task)
    except OSError as error:
        warnings.warn(
            f"learned images cannot be deleted (data.keep: {device.stream.tasks.plan.keep}): {error}; it is tried "
            "again with the next message",
            RuntimeWarning,
            stacklevel=2,
        )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Locks a device's state folder. Raises StateError where the disk refuses it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder))
        except OSError as error:
            raise StateError(
                f"{folder}: the state folder cannot be used ({error.strerror or error}); make room, give this user the "
                "right to write, or set another folder (state-dir in --node-config)"
            ) from error
        yield


def whole_share(source: Source) -> Share:
    """The share of a board with images of its own: all of them."""
    return Share(np.arange(len(source.train)), np.arange(len(source.test)))


def _train(device: EdgeDevice, instruction: Instruction, receive: Callable[[], None], *, pack: Pack) -> RecordDict:
    if device.may_receive(instruction.task, instruction.until_epoch):
        receive()
        device.check_version(instruction.version)
    trained = device.train(instruction.task, instruction.until_epoch)
    _delete_learned(device)  # before a test: the same tasks are tested, whatever else happens
    content = _reply(trained.to_record())
    if device.telemetry:
        content[TELEMETRY] = ConfigRecord(device.telemetry.to_record())
    arrays = pack(device)
    if arrays:
        content[ARRAYS] = arrays
        content[METRICS] = MetricRecord({EXAMPLES: trained.examples})
    if instruction.evaluate:
        content[TESTED] = ConfigRecord(_tested(device).to_record())
    return content


def _evaluate(device: EdgeDevice, instruction: Instruction, receive: Callable[[], None]) -> RecordDict:
    device.check_at(instruction.task, instruction.until_epoch)
    receive()
    device.check_version(instruction.version)
    return _reply(_tested(device).to_record())


def _tested(device: EdgeDevice) -> Tested:
    """Tests the device. Raises FieldDamaged where the images of a task that it learned are gone.

    They do not come again, so this is no reason to wait for images.
    """
    try:
        return device.evaluate()
    except NotReady as error:
        raise FieldDamaged(
            f"{error.reason}, but the device has learned it: the folder of its images is lost; restore the state "
            "folder from a copy, or remove it: the device then begins its stream again"
        ) from error


def _reply(record: dict[str, object]) -> RecordDict:
    return RecordDict({REPLY: ConfigRecord(record)})  # type: ignore[arg-type]


def _refusal(error: Exception, device: EdgeDevice | None = None) -> RecordDict:
    position = (device.position.task, device.position.epochs, device.saved_version) if device else (-1, -1, -1)
    return _reply(Refusal(*position, reason=f"{type(error).__name__}: {error}").to_record())


NODE_KEYS = (
    "partition-id", "num-partitions", "name", "data-path", "weights-path", "own-data", "delete-learned", "state-dir",
    "accelerator", "threads", "limit-temperature-c", "limit-free-disk-mb", "limit-battery-percent",
)  # fmt: skip
"""The keys of a node's configuration; Flower's simulation sets the first two itself."""


def local_settings(node: Mapping[str, object], state: Path | None) -> Local:
    """The node's configuration; `state` is its default state folder. Raises RequestError naming the key."""
    for key in node:
        if key not in NODE_KEYS:  # a misspelled limit would be none
            raise RequestError(
                f"--node-config: unknown key {key!r}{nearest(key, NODE_KEYS)} (allowed: {', '.join(NODE_KEYS)})"
            )

    def number(key: str, default: int) -> int:
        value = node.get(key, default)
        if isinstance(value, bool) or not str(value).isdecimal():
            raise RequestError(f"--node-config {key} is {value!r}, expected a whole number")
        return int(str(value))

    def limit(key: str) -> float | None:
        value = node.get(key)
        try:
            found = None if value is None or isinstance(value, bool) else float(str(value))
        except ValueError:
            found = None
        if value is not None and (found is None or not 0 <= found < float("inf")):
            raise RequestError(f"--node-config {key} is {value!r}, expected a number from 0")
        return found

    def flag(key: str) -> bool:
        value = node.get(key, False)
        if not isinstance(value, bool):
            raise RequestError(f"--node-config {key} is {value!r}, expected true or false (without quotes)")
        return value

    def path(key: str) -> str | None:
        return str(Path(str(node[key])).expanduser()) if node.get(key) else None

    partition = number("partition-id", 0)
    folder = path("state-dir")
    return Local(
        partition=partition,
        partitions=number("num-partitions", 0),
        name=str(node.get("name") or f"{socket.gethostname()}-{partition}"),
        state=Path(folder) if folder else state or default_state_folder(),
        data_path=path("data-path"),
        weights_path=path("weights-path"),
        own_data=flag("own-data"),
        delete_learned=flag("delete-learned"),
        accelerator=str(node["accelerator"]) if node.get("accelerator") else None,
        threads=number("threads", 0) or None,
        limit_temperature_c=limit("limit-temperature-c"),
        limit_free_disk_mb=limit("limit-free-disk-mb"),
        limit_battery_percent=limit("limit-battery-percent"),
    )


# A worker of a simulation serves many devices of one scenario. What is the same for all of them is made once.


@lru_cache(maxsize=2)
def _scenario(text: str, overrides: Overrides) -> Scenario:
    """The scenario of an instruction, as this node changes it, with what is auto resolved. Raises RequestError."""
    return with_arithmetic(overrides.apply(scenario_from_json(text)))


@lru_cache(maxsize=2)
def _head(text: str, overrides: Overrides, own_data: bool) -> tuple[int, ...]:
    """The classes of the head: the same on all nodes of a fleet. Raises RequestError."""
    scenario = _scenario(text, overrides)
    return fleet_head(scenario, _source(scenario.source_request()), own_data=own_data)


@lru_cache(maxsize=1)
def _lender(text: str, overrides: Overrides, channels: int, classes: int, *, many: bool) -> NetworkLender:
    """Networks before the first task.

    Where a process serves `many` devices, what is computed from the frozen prefix stays in memory, and so does a
    network that a device is done with.
    """
    template = device_network(_scenario(text, overrides), in_channels=channels, classes=classes)
    template.eval()  # as after a task: changing the mode of all modules takes a millisecond
    if many and template.frozen_batch_norm == "eval":
        template.prefix.derived = {}
    return NetworkLender(template, again=many)


@lru_cache(maxsize=1)
def _kept(text: str, overrides: Overrides, state: Path) -> KeptDevices:
    """Devices of a scenario, with their states in folders of `state`; those of another scenario are forgotten."""
    return KeptDevices()


@lru_cache(maxsize=1)
def _shares(text: str, overrides: Overrides) -> Shares:
    scenario = _scenario(text, overrides)
    return Shares(_source(scenario.source_request()), scenario.fleet, scenario.seed)


@lru_cache(maxsize=2)
def _source(request: SourceRequest) -> Source:
    return load_source(request)


app = make_app()
