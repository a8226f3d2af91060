"""The one typed configuration: read and checked once, at the edge; everything behind it gets typed values.

Defaults are the paper's values where it names one (Split CIFAR-10: 50 epochs, batch 32, SGD 0.01, 10 % held out).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lightcl.data.augment import Augmentation
from lightcl.data.sources import SourceName, SourceRequest
from lightcl.errors import RequestError, nearest
from lightcl.methods import AnyMethod, LightCLParameters
from lightcl.methods.base import Setting
from lightcl.networks.resnet import Stem

StrategyName = Literal["FedAvg", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "FedMedian", "FedTrimmedAvg"]

NAMED_WEIGHTS = ("builtin", "imagenet", "none")
"""What `network.weights` may be beside a file."""


class Section(BaseModel):
    # strict: neither true nor '2' nor 2.0 is the integer 2 (an integer is a float all the same).
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Data(Section):
    source: SourceName = "digits"
    """digits ships with scikit-learn; cifar10, cifar100 and fashion-mnist are downloaded; the others are your files."""
    path: Path | None = Field(default=None, strict=False)
    """Your parquet file or image folder; for the downloaded sets, the folder that holds (or gets) the copy."""
    image_size: int | None = Field(default=None, ge=8, le=1024)
    """Bring all images to this many pixels a side; default: as they are."""
    image_column: str | None = None
    """Parquet: the column of encoded images; default: img or image."""
    label_column: str | None = None
    """Parquet: the column of labels; default: label."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of every class that becomes the test split where the source brings none."""
    download: bool = True
    """Whether a data set that is not there may be downloaded."""
    augmentation: Literal["auto", Augmentation] = "auto"
    """crop-flip: random crop and horizontal flip (the paper); crop: no flip; auto: crop-flip, but none on digits,
    which a flip would change."""
    crop_padding: int = Field(default=4, ge=0, lt=1024)
    """Black pixels around an image that its random crop is taken from; fewer than the image's side."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path is not None and self.source == "digits":
            raise ValueError(
                "data.path is given, but data.source is digits, which ships with scikit-learn; name another "
                "data.source, or leave data.path out"
            )
        for key in ("image_column", "label_column"):
            if getattr(self, key) is not None and self.source != "parquet":
                raise ValueError(f"data.{key} is for data.source: parquet, not {self.source}; leave it out")
        return self


class Stream(Section):
    tasks: int = Field(default=5, ge=1, le=100_000)
    """Tasks of a stream, met one after the other."""
    classes_per_task: int = Field(default=2, ge=1, le=100_000)
    """The source needs tasks x classes_per_task classes."""
    class_order: Literal["natural", "shuffled"] | tuple[int, ...] = "natural"
    """natural: as numbered in the source; shuffled: by the seed; or a list of class numbers."""
    per_device_order: bool = False
    """With `shuffled`: every device meets the classes in an order of its own."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of every task's training samples kept out of training."""
    evaluate_on: Literal["test", "held-out"] = "test"
    """test: the test split, for reports; held-out: the training samples kept out, to choose hyperparameters on."""
    settings: Literal["auto", "til", "til+cil"] = "auto"
    """Test with the task known (til), or also with it not known (cil); auto: all that the method can be tested for."""

    @field_validator("class_order", mode="before")
    @classmethod
    def _check_class_order(cls, given: object) -> object:
        """One error in place of one for every member of the union, each of which knows half of what is allowed."""
        if given in ("natural", "shuffled"):
            return given
        listed = given if isinstance(given, list | tuple) else ()
        if not listed or not all(type(c) is int and c >= 0 for c in listed) or len(set(listed)) < len(listed):
            raise ValueError(
                f"stream.class_order is {_shown(given)}; allowed: natural, shuffled, or a list of different class "
                "numbers (from 0 on)"
            )
        return tuple(listed)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.per_device_order and self.class_order != "shuffled":
            given = "a list" if isinstance(self.class_order, tuple) else self.class_order
            raise ValueError(f"stream.per_device_order needs stream.class_order: shuffled, not {given}")
        if self.evaluate_on == "held-out" and self.held_out == 0:
            raise ValueError("stream.evaluate_on: held-out needs stream.held_out above 0")
        return self


class Fleet(Section):
    devices: int = Field(default=10, ge=1, le=100_000)
    """Devices of the fleet; the training images are shared out among all of them."""
    partition: Literal["iid", "dirichlet", "pathological"] = "iid"
    """iid: equal random shares; dirichlet: shares of each class by `alpha`; pathological: `classes_per_device` each."""
    alpha: float = Field(default=0.5, gt=0, le=1e6)
    """Dirichlet concentration: the smaller, the more the devices' class shares differ."""
    classes_per_device: int | None = Field(default=None, ge=1, le=100_000)
    """Pathological: how many classes a device holds; default: as many as its stream needs."""
    test_data: Literal["share", "whole"] = "share"
    """Test images of its classes a device is tested on. share: its part of them; whole: all (slower, less noise a
    device)."""


class Network(Section):
    name: Literal["resnet18"] = "resnet18"
    """The only architecture there is."""
    width: int | None = Field(default=None, ge=4, le=1024)
    """Channels of the first layer; default: that of the weights file, else the paper's 64."""
    stem: Stem | None = None
    """The first layer. cifar: 3x3 at full resolution; imagenet: 7x7 with stride 2, and pooling; default: that of the
    weights file, else cifar."""
    freeze: str | None = None
    """The last frozen block (stem, layer1.0 ... layer4.1), a whole layer, none, or auto: chosen by an analysis of
    device 0's stream before the run (docs/generalizability.md); default: the method's own."""
    freeze_threshold: float = Field(default=0.94, ge=0, le=1)
    """With `freeze: auto`: the memory stability and learning plasticity that a block needs to be frozen."""
    analysis_epochs: int = Field(default=5, ge=1, le=1_000_000)
    """Epochs a task of the analysis, and no more than `training.epochs`."""
    frozen_batch_norm: Literal["eval", "train"] | None = None
    """eval: frozen whole (ours); train: batch statistics that drift (the paper's code); default: the method's own."""
    weights: str = "builtin"
    """builtin (width 20, Tiny-ImageNet at 32x32), imagenet (torchvision, width 64), none, or a safetensors file."""


class Training(Section):
    epochs: int = Field(default=50, ge=1, le=1_000_000)
    """Local epochs a task."""
    batch_size: int = Field(default=32, ge=2, le=1_000_000)
    """Images of a training step."""
    learning_rate: float = Field(default=0.01, gt=0, le=1e30)  # float32 can hold it
    """Of SGD; constant."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Of SGD."""
    weight_decay: float = Field(default=0.0, ge=0, le=1000)
    """Of SGD (L2)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward pass; weights and loss stay fp32."""
    checkpoint_seconds: float = Field(default=60.0, ge=0, le=1e8)
    """A device that trains longer than this saves its state at the next epoch's end, not only after the message."""


class Server(Section):
    aggregation: Literal["none", "suffix", "suffix+head"] = "none"
    """none: isolated devices; suffix: its weighted average is shared, heads stay local; suffix+head: both shared."""
    strategy: StrategyName = "FedAvg"
    """The Flower strategy (flwr.serverapp.strategy) that makes the new shared weights. FedAvg: their mean, weighted by
    examples; FedAvgM: with momentum on the server; FedAdam, FedAdagrad, FedYogi: the mean change is the gradient of
    such an optimiser; FedMedian, FedTrimmedAvg: against outliers."""
    strategy_options: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(default_factory=dict)
    """Its keyword arguments, e.g. {server_momentum: 0.9} or {eta: 0.01, tau: 0.001}."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the devices that train in a round; the least advanced ones go first, ties are drawn by seed."""
    rounds_per_task: int = Field(default=1, ge=1, le=1_000_000)
    """A task's epochs are spread over this many rounds."""
    round_timeout: float = Field(default=86_400.0, gt=0, le=1e8)
    """Seconds a round may take, queueing included."""
    connect_timeout: float = Field(default=600.0, gt=0, le=1e8)
    """Seconds to wait for all devices to connect; while none has, boards that are busy get up to `round_timeout`."""
    max_failures: int = Field(default=3, ge=1, le=1_000_000)
    """Consecutive failures after which a device is left out for the rest of the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for option in ("server_momentum", "beta_1", "beta_2"):
            share = self.strategy_options.get(option, 0.0)
            if share >= 1:
                raise ValueError(f"server.strategy_options.{option} is {share:g}; allowed: from 0 to below 1")
        return self


class Runtime(Section):
    workers: int = Field(default=2, ge=1, le=1024)
    """Ray workers of a simulation; has no influence on the numbers."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Torch threads a device computes with. Part of the recipe: another count may round differently."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the CUDA device where there is one, else the CPU; cuda: an error where there is none."""


class Scenario(Section):
    name: str = Field(default="scenario", pattern=r"^[A-Za-z0-9._-]+$", max_length=80)
    """Letters, digits, dot, dash and underscore; names the default run folder."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Everything random derives from it: partition, order of classes, batches, initial weights."""
    data: Data = Data()
    stream: Stream = Stream()
    fleet: Fleet = Fleet()
    network: Network = Network()
    method: Annotated[AnyMethod, Field(discriminator="name")] = LightCLParameters()
    training: Training = Training()
    server: Server = Server()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.stream.class_order, tuple):
            wanted = self.stream.tasks * self.stream.classes_per_task
            if len(self.stream.class_order) < wanted:
                raise ValueError(
                    f"stream.class_order lists {len(self.stream.class_order)} classes, but {self.stream.tasks} tasks x "
                    f"{self.stream.classes_per_task} classes need {wanted}"
                )
        if self.stream.settings == "til+cil" and "cil" not in self.method.settings:
            raise ValueError(
                f"stream.settings asks for cil, but method {self.method.name} answers only where the task is known "
                "(allowed: auto, til)"
            )
        if self.server.aggregation != "none" and not self.method.shareable:
            raise ValueError(
                f"server.aggregation is {self.server.aggregation!r}, but what method {self.method.name} trains differs "
                "from device to device and cannot be averaged (allowed: none)"
            )
        if isinstance(self.method, LightCLParameters):
            least = self.method.smallest_memory(self.frozen_batch_norm)
            if self.method.memory_size < least:
                raise ValueError(
                    f"method.memory_size is {self.method.memory_size}, but batch-norm in training mode (method."
                    f"memory_batch_norm is {self.method.memory_batch_norm}, network.frozen_batch_norm "
                    f"{self.frozen_batch_norm}) has no variance over a single sample: at least {least}"
                )
        if self.server.rounds_per_task > self.training.epochs:
            raise ValueError(
                f"server.rounds_per_task is {self.server.rounds_per_task}, but training.epochs gives only "
                f"{self.training.epochs} epochs to spread over them"
            )
        if self.fleet.partition != "pathological":
            if self.fleet.classes_per_device is not None:
                raise ValueError(f"fleet.classes_per_device is for partition: pathological, not {self.fleet.partition}")
        elif self.fleet.classes_per_device is None:
            needed = self.stream.tasks * self.stream.classes_per_task
            return self.model_copy(update={"fleet": self.fleet.model_copy(update={"classes_per_device": needed})})
        return self

    def source_request(self) -> SourceRequest:
        data = self.data
        return SourceRequest(
            data.source, data.path, data.image_size, data.image_column, data.label_column, data.test_fraction,
            self.seed, data.download,
        )  # fmt: skip

    @property
    def augmentation(self) -> Augmentation:
        if self.data.augmentation != "auto":
            return self.data.augmentation
        return "none" if self.data.source == "digits" else "crop-flip"

    @property
    def frozen_batch_norm(self) -> Literal["eval", "train"]:
        return self.network.frozen_batch_norm or self.method.default_frozen_batch_norm

    @property
    def settings(self) -> tuple[Setting, ...]:
        """What the devices are tested for."""
        return ("til",) if self.stream.settings == "til" else self.method.settings

    @property
    def first_task(self) -> int:
        """The task a stream begins with: joint training waits until all are there."""
        return self.stream.tasks - 1 if self.method.joint else 0

    def epochs_until(self, part: int) -> int:
        """Epochs of a task that are done after its round number `part` (1-based): spread as evenly as they go."""
        return self.training.epochs * part // self.server.rounds_per_task

    def to_yaml(self) -> str:
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


_SECTIONS = {name for name in Scenario.model_fields if name not in ("name", "seed")}


NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-f]+)$", re.IGNORECASE),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(e[-+]?[0-9]+)?|[0-9]+e[-+]?[0-9]+|\.inf)$|\.nan$", re.IGNORECASE
    ),
}


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2: 1e-2 is one; 1:30 (ninety to version 1.1) and 010 (eight) are none."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as the library declares it)
        first: [(tag, pattern) for tag, pattern in known if tag not in NUMBERS]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Puts texts in quotes that either version would take for numbers."""


for _kind in (_Loader, _Dumper):
    for _tag, _pattern in NUMBERS.items():
        _kind.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


# -- reading -------------------------------------------------------------------------------------------------------


def load_scenario(file: Path, changes: Sequence[str] = ()) -> Scenario:
    """Reads a YAML file and applies `KEY=VALUE` changes (dotted keys, YAML values); of a key given twice the last wins.

    Relative paths in it are relative to the current folder. Raises RequestError naming file, line and key.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        tree, values = _parse(text, str(file))
    except ValueError as error:
        raise RequestError(f"{file}: not valid YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RequestError(f"{file}: a scenario is a mapping of keys to values, not {type(values).__name__}")
    values = {key: {} if value is None and key in _SECTIONS else value for key, value in values.items()}
    changed = {_apply(values, change) for change in sorted(changes, key=_reach)}
    if isinstance(values.get("method"), dict):
        values["method"] = {"name": "lightcl"} | values["method"]
    try:
        return _with_absolute_paths(Scenario.model_validate(values))
    except ValidationError as error:
        lines = [_explain(problem, file, tree, changed) for problem in error.errors()]
        raise RequestError("\n".join(dict.fromkeys(lines))) from error


def scenario_from_json(text: str) -> Scenario:
    """A device's check of what the server sent. Raises RequestError."""
    try:
        return Scenario.model_validate_json(text)
    except ValidationError as error:
        raise RequestError(
            "\n".join(_explain(problem, Path("<message>"), None, set()) for problem in error.errors())
        ) from error


def scenario_schema() -> dict[str, Any]:
    """JSON schema of a scenario file, for editors."""
    return Scenario.model_json_schema()


def scenario_keys() -> str:
    """All keys of a scenario with what they may be, as Markdown tables (docs/scenario-keys.md)."""
    fields = Scenario.model_fields
    lines = ["# Scenario keys", "", "Made by `lightcl schema --markdown`; every key may be left out.", *_KEY_TABLE]
    lines += _key_rows(Scenario, "", [name for name in fields if name not in _SECTIONS])
    for name in sorted(_SECTIONS - {"method"}, key=list(fields).index):
        section = fields[name].annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        lines += ["", f"## {name}", *_KEY_TABLE, *_key_rows(section, f"{name}.", list(section.model_fields))]
    default = fields["method"].default.name
    methods = {member.model_fields["name"].default: member for member in method_types()}
    by_row: dict[str, list[str]] = {}
    for method in sorted(methods, key=lambda method: method != default):
        keys = [key for key in methods[method].model_fields if key != "name"]
        for row in _key_rows(methods[method], "method.", keys):
            by_row.setdefault(row, []).append(method)
    rows: dict[str, list[str]] = {}  # a key that several methods have in common is said once
    for row, having in by_row.items():
        rows.setdefault(", ".join(having), []).append(row)
    names = ", ".join(f"`{name}`" for name in methods)
    lines += [
        "",
        "## method",
        "",
        "The other keys depend on the method: they are below, under the methods that have them.",
    ]
    lines += [*_KEY_TABLE, f"| `method.name` | {names} | `{json.dumps(default)}` | The README says what each does. |"]
    for together, theirs in rows.items():
        lines += ["", f"## method: {together}", *_KEY_TABLE, *theirs]
    return "\n".join(lines) + "\n"


def _parse(text: str, origin: str) -> tuple[yaml.Node | None, Any]:
    """The nodes and the values of a YAML text.

    Raises ValueError with one line where it is not valid, RequestError for a key that stands twice in one section.
    """
    try:
        loader = _Loader(text)
        tree = loader.get_single_node()
        _refuse_twins(tree, origin)
        return tree, None if tree is None else loader.construct_document(tree)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(line + ", ".join(filter(None, (error.context, error.problem)))) from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).replace('in "<unicode string>", ', "at ").split())) from error
    except RecursionError as error:
        raise ValueError("nested too deeply, or an anchor that holds itself") from error


def _reach(change: str) -> tuple[int, bool]:
    """Sorts what replaces a whole section before what sets a key in it, so that neither order of typing loses a key."""
    key = change.partition("=")[0]
    return key.count("."), key != "method.name"


_KEY_TABLE = ("", "| key | allowed | default | |", "|---|---|---|---|")


def _key_rows(section: type[BaseModel], prefix: str, keys: Sequence[str]) -> list[str]:
    """A row of the table for each of these keys."""
    allowed = section.model_json_schema()["properties"]
    rows = []
    for key in keys:
        field = section.model_fields[key]
        *more, last = _allowed(allowed[key])
        may_be = f"{', '.join(more)} or {last}" if more else last
        default = json.dumps(field.get_default(call_default_factory=True), default=str)
        meaning = (field.description or "").replace("\n", " ")
        rows.append(f"| `{prefix}{key}` | {may_be} | `{default}` | {meaning} |")
    return rows


def _allowed(schema: Mapping[str, Any]) -> list[str]:
    """What a JSON schema of one value lets through, alternative by alternative."""
    if "anyOf" in schema:
        return [text for member in schema["anyOf"] for text in _allowed(member)]
    if "const" in schema or "enum" in schema:
        return [f"`{value}`" for value in schema.get("enum", [schema.get("const")])]
    kind = schema["type"]
    if kind in ("integer", "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        over, under = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        left = f"{low} ≤" if low is not None else f"{over} <" if over is not None else ""
        right = f"≤ {high}" if high is not None else f"< {under}" if under is not None else ""
        if left and not right:
            return [f"{kind} {'≥' if over is None else '>'} {low if over is None else over}"]
        return [f"{left} {kind} {right}".strip()]
    if kind == "array":
        return [f"list of {_allowed(schema['items'])[0]}s"]
    if kind == "object":
        keys = ", ".join(f"`{name}`" for name in schema.get("propertyNames", {}).get("enum", ()))
        return [f"{keys or 'names'}, each with {_allowed(schema['additionalProperties'])[0]}"]
    return {"boolean": ["`true`", "`false`"], "null": ["`null`"]}.get(kind, [schema.get("format", "text")])


def _apply(values: dict[str, Any], change: str) -> str:
    key, equals, text = change.partition("=")
    if not equals or not all(key.split(".")):
        raise RequestError(f"--set {change}: expected KEY=VALUE, for instance training.epochs=5")
    try:
        _, value = _parse(text, f"--set {key}")
    except ValueError as error:
        raise RequestError(f"--set {key}: {text!r} is not a YAML value ({error})") from error
    *path, last = key.split(".")
    section = values
    for name in path:
        inner = section.get(name)
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, dict):
            raise RequestError(f"--set {key}: {name!r} is a value, not a section")
        section = inner
    if key == "method.name" and section.get("name", "lightcl") != value:
        section.clear()  # the other keys of the section belong to the method that was named before
    section[last] = value
    return key


def _with_absolute_paths(scenario: Scenario) -> Scenario:
    """Workers run in other folders, so paths are settled where the user typed them."""
    data, network = scenario.data, scenario.network
    if data.path is not None:
        data = data.model_copy(update={"path": data.path.expanduser().absolute()})
    if network.weights not in NAMED_WEIGHTS:
        network = network.model_copy(update={"weights": str(Path(network.weights).expanduser().absolute())})
    return scenario.model_copy(update={"data": data, "network": network})


def _explain(problem: Mapping[str, Any], file: Path, tree: yaml.Node | None, changed: set[str]) -> str:
    """One line for one of pydantic's errors: file, line, key, what was given, what is allowed."""
    raw = problem["loc"]
    # A union adds the tag of the member it tried to the location; that is not a key of the file.
    tagged = len(raw) > 1 and raw[0] == "method" and raw[1] in method_names()
    location = [raw[0], *raw[2:]] if tagged else list(raw)
    location = [part for part in location if not (isinstance(part, str) and "[" in part)]  # a dictionary's [key]
    kind, given = problem["type"], problem.get("input")
    if kind == "union_tag_invalid":
        location.append("name")
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":  # its text begins with the key and may name others, each of which may be the culprit
        named = [found.split(".") for found in re.findall(rf"\b(?:{'|'.join(_SECTIONS)})(?:\.\w+)+", message)]
        where, key = _place(named or [location], file, tree, changed)
        return f"{where}: {message.removeprefix(f'{key} ') if where == f'--set {key}' else message}"
    where, key = _place([location], file, tree, changed)
    where += "" if where == f"--set {key}" else f": {key}"
    if kind == "extra_forbidden":
        known = _keys_of(location[:-1], raw)
        return f"{where}: unknown key{nearest(str(location[-1]), known)} (allowed here: {', '.join(known)})"
    if kind == "union_tag_invalid":
        name = given.get("name") if isinstance(given, dict) else given
        return f"{where}: unknown method {_shown(name)} (allowed: {', '.join(method_names())})"
    return f"{where}: {message[0].lower()}{message[1:]}, not {_shown(given)}"


def _place(
    locations: Sequence[Sequence[Any]], file: Path, tree: yaml.Node | None, changed: set[str]
) -> tuple[str, str]:
    """Where one of the keys was given, and that key: by --set, else in a line of the file, else nowhere."""
    keys = [".".join(str(part) for part in location) for location in locations]
    lines = [_line_of(tree, location) for location in locations]
    for key, (_, whole) in zip(keys, lines, strict=True):
        for change in sorted(changed, key=len, reverse=True):  # the most particular first
            if f"{key}.".startswith(f"{change}.") or (not whole and change.startswith(f"{key}.")):
                return f"--set {change}", key
    for key, (line, whole) in zip(keys, lines, strict=True):
        if whole:
            return f"{file}, line {line}", key
    line = lines[0][0]
    return f"{file}, line {line}" if line else str(file), keys[0]


def _shown(given: object) -> str:
    """A value as it would stand in the file, cut to some 80 characters; it may be endless."""
    pieces = json.JSONEncoder(default=str, skipkeys=True, check_circular=False).iterencode(given)
    text = "".join(islice(pieces, 80))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_twins(node: yaml.Node | None, origin: str) -> None:
    """Raises RequestError for a key that stands twice in one section; YAML would take the last one silently."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused by the constructor
            if key.value in seen:
                raise RequestError(f"{origin}, line {line}: key {key.value!r} stands in line {seen[key.value]} already")
            seen[key.value] = line
            _refuse_twins(value, origin)


def method_types() -> tuple[type[AnyMethod], ...]:
    """The parameters of every method there is."""
    return get_args(AnyMethod)


def method_names() -> list[str]:
    return [get_args(member.model_fields["name"].annotation)[0] for member in method_types()]


def _keys_of(location: Sequence[Any], raw: Sequence[Any]) -> list[str]:
    """The keys allowed in the section at `location`."""
    if not location:
        return list(Scenario.model_fields)
    if location[0] == "method":
        for member in get_args(AnyMethod):
            if get_args(member.model_fields["name"].annotation)[0] in raw:
                return list(member.model_fields)
    annotation = Scenario.model_fields[location[0]].annotation
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _line_of(tree: yaml.Node | None, location: Sequence[Any]) -> tuple[int | None, bool]:
    """1-based line of the deepest part of `location` that the file has, and whether that is all of it."""
    line = None
    for part in location:
        if isinstance(tree, yaml.MappingNode):
            found = next(((k, v) for k, v in tree.value if k.value == part), None)
            if found is None:
                return line, False
            line, tree = found[0].start_mark.line + 1, found[1]
        elif isinstance(tree, yaml.SequenceNode) and isinstance(part, int) and part < len(tree.value):
            tree = tree.value[part]
            line = tree.start_mark.line + 1
        else:
            return line, False
    return line, bool(location)
