"""A scenario from a YAML file or from code, with changes, and errors that say where a wrong value was given."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lightcl.errors import RequestError, nearest, shown
from lightcl.methods.base import METHODS, MethodParameters
from lightcl.networks.section import NAMED_WEIGHTS
from lightcl.scenario.model import SECTIONS, Scenario
from lightcl.scenario.yaml_text import line_of, parse

STANDARD_INPUT = "-"
"""The name of a scenario that is read from there."""
MAIN_KEYS = {
    "data": "source", "stream": "tasks", "fleet": "devices", "network": "name", "method": "name",
    "training": "epochs", "server": "aggregation", "device": "accelerator", "simulation": "workers",
}  # fmt: skip
"""The key of each section that is meant where a value stands in the section's place."""


def bundled_scenarios() -> dict[str, Path]:
    """The scenarios that ship with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "bundled").glob("*.yaml"))}


def find_scenario(wanted: Path) -> Path:
    """A scenario file, or the bundled scenario of that name where there is no such file; `-` stays as it is.

    Raises RequestError for a name without suffix and folder that is neither.
    """
    name = str(wanted)
    if name == STANDARD_INPUT:
        return wanted
    if wanted.exists() and not (wanted.is_dir() and name in bundled_scenarios()):
        return wanted
    bundled = bundled_scenarios().get(name)
    if bundled is None and wanted.name == name and not wanted.suffix:
        raise unknown_scenario(name)
    return bundled or wanted


def unknown_scenario(name: str) -> RequestError:
    """The error for a name that is no bundled scenario."""
    known = bundled_scenarios()
    return RequestError(
        f"{name}: no such file and no such bundled scenario{nearest(name, known)} (bundled: {', '.join(known)})"
    )


@dataclass(frozen=True)
class Origin:
    """Where values come from, for errors: the file and its YAML nodes, and the keys that were changed afterwards.

    `change` is how a changed key is named; {} stands for the key.
    """

    file: str
    tree: yaml.Node | None = None
    changed: set[str] = field(default_factory=set)
    change: str = "--set {}"


def load_scenario(
    given: str | Path | Mapping[str, Any], changes: Sequence[str] | Mapping[str, Any] | None = None, **sections: Any
) -> Scenario:
    """The scenario of a YAML file, of a bundled name or of a dictionary, with changes.

    `changes` are `KEY=VALUE` texts (dotted keys, YAML values; of a key given twice the last wins), or a dictionary such
    as `{"training.epochs": 2}`. `sections` changes keys too: `training={"epochs": 2}`, `seed=3`. Relative paths are
    relative to the current folder. Raises RequestError naming file, line and key.
    """
    if isinstance(given, Mapping):
        file, tree = "scenario", None
        values: dict[str, Any] = {key: _copy(value) for key, value in given.items()}
    else:
        file, tree, values = _read(find_scenario(Path(given)))
    values = {key: {} if value is None and key in SECTIONS else value for key, value in values.items()}
    in_code = bool(sections) or isinstance(changes, Mapping)
    edits = dict(changes) if isinstance(changes, Mapping) else dict(map(_parsed, changes or []))
    for key, value in sections.items():
        edits |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, Mapping) else {key: value}
    origin = Origin(file, tree, set(edits), "{} (given in code)" if in_code else "--set {}")
    for key, value in sorted(edits.items(), key=_reach):
        _apply_(values, key, value, origin)
    if isinstance(values.get("method"), dict):
        values["method"] = {"name": "lightcl"} | values["method"]
    try:
        return _with_absolute_paths(Scenario.model_validate(values))
    except ValidationError as error:
        method = values.get("method")
        name = method.get("name") if isinstance(method, dict) else None
        lines = [_explain(problem, origin, name) for problem in error.errors()]
        raise RequestError("\n".join(dict.fromkeys(lines))) from error


def _copy(value: Any) -> Any:
    """A section that changes do not write through to the caller's."""
    return dict(value) if isinstance(value, Mapping) else value


def _read(file: Path) -> tuple[str, yaml.Node | None, dict[str, Any]]:
    """Name, YAML nodes and values of a file. Raises RequestError."""
    name = "the standard input" if str(file) == STANDARD_INPUT else str(file)
    try:
        text = sys.stdin.read() if str(file) == STANDARD_INPUT else file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # also bytes that are no UTF-8, and a path that no system accepts
        raise RequestError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        tree, values = parse(text, name)
    except ValueError as error:
        raise RequestError(f"{name}: not valid YAML: {error}") from error
    if values is None:
        raise RequestError(
            f"{name} is empty: a scenario has at least one key, such as 'seed: 0' (`lightcl scenarios copy quickstart "
            "FILE` gives a complete one)"
        )
    if not isinstance(values, dict):
        raise RequestError(f"{name}: a scenario is a mapping of keys to values, not {type(values).__name__}")
    return name, tree, values


def scenario_from_json(text: str, name: str = "<message>") -> Scenario:
    """A device's check of what the server sent, or a scenario from the file `name`. Raises RequestError."""
    try:
        return Scenario.model_validate_json(text)
    except ValidationError as error:
        lines = [_explain(problem, Origin(name), _method_in(text)) for problem in error.errors()]
        raise RequestError("\n".join(lines)) from error


def _method_in(text: str) -> object:
    """The name of the method in a scenario as JSON; None where there is none."""
    try:
        return json.loads(text)["method"]["name"]
    except (ValueError, TypeError, LookupError):
        return None


def _reach(change: tuple[str, object]) -> tuple[int, bool]:
    """Sort key: changes of a whole section come before changes of its keys, so that the order given loses none."""
    key, _ = change
    return key.count("."), key != "method.name"


def _parsed(change: str) -> tuple[str, Any]:
    """`KEY=VALUE` as key and value."""
    key, equals, text = change.partition("=")
    if not equals or not all(key.split(".")):
        raise RequestError(f"--set {change}: expected KEY=VALUE, for instance training.epochs=5")
    try:
        _, value = parse(text, f"--set {key}")
    except ValueError as error:
        raise RequestError(f"--set {key}: {text!r} is not a YAML value ({error})") from error
    return key, value


def _apply_(values: dict[str, Any], key: str, value: object, origin: Origin) -> None:
    """Sets a dotted key. Raises RequestError where a part of it is no section."""
    if not isinstance(key, str) or not all(key.split(".")):
        raise RequestError(f"changes: {key!r} is not a key; give one such as 'training.epochs'")
    *path, last = key.split(".")
    section = values
    for name in path:
        inner = section.get(name)
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, dict):
            raise RequestError(f"{origin.change.format(key)}: {name!r} is a value, not a section")
        section = inner
    if key == "method.name" and section.get("name", "lightcl") != value:
        section.clear()  # the other keys of the section belong to the method that was named before
    section[last] = _copy(value)


def _with_absolute_paths(scenario: Scenario) -> Scenario:
    """Workers run in other folders, so relative paths are resolved in the user's folder."""
    data, network = scenario.data, scenario.network
    if data.path is not None:
        data = data.model_copy(update={"path": data.path.expanduser().absolute()})
    if network.weights not in NAMED_WEIGHTS:
        network = network.model_copy(update={"weights": str(Path(network.weights).expanduser().absolute())})
    return scenario.model_copy(update={"data": data, "network": network})


def _explain(problem: Mapping[str, Any], origin: Origin, method: object = None) -> str:
    """One line for one of pydantic's errors: file, line, key, what was given, what is allowed."""
    location = [part for part in problem["loc"] if part != "[key]"] or [*problem["loc"]]  # pydantic's, in a dictionary
    kind, given = problem["type"], problem.get("input")
    if len(location) == 1 and location[0] in MAIN_KEYS and not isinstance(given, Mapping):
        return _not_a_section(location[0], given, origin)
    if kind == "unknown_section":  # its class is registered under the key `name`
        location.append("name")
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "value_error":  # its text begins with the key and may name others, each of which may be the culprit
        named = [found.split(".") for found in re.findall(rf"\b(?:{'|'.join(SECTIONS)})(?:\.\w+)+", message)]
        where, key = _place(named or [location], origin)
        if where == origin.change.format(key) and message.startswith((f"{key} ", f"{key}: ")):
            return where + message.removeprefix(key)  # the key once, as the subject of the sentence
        return f"{where}: {message}"
    where, key = _place([location], origin)
    where += "" if where == origin.change.format(key) else f": {key}"
    if kind == "extra_forbidden":
        known = _keys_of(location[:-1], method)
        return f"{where}: unknown key{nearest(str(location[-1]), known)} (allowed here: {', '.join(known)})"
    if kind in ("unknown_section", "unknown_name"):
        return f"{where}: {message}"
    message = message.replace("Input is not a valid path for <class 'pathlib.Path'>", "Input should be a path")
    return f"{where}: {message[0].lower()}{message[1:]}, not {shown(given)}"


def _not_a_section(section: str, given: object, origin: Origin) -> str:
    """The error for a value in the place of a section, as in `method: sgd`."""
    where, _ = _place([[section]], origin)
    value = given if isinstance(given, str | int | float) else "..."
    return (
        f"{where}: {section} is a section with keys of its own, not {shown(given)}; write {section}: "
        f"{{{MAIN_KEYS[section]}: {value}}}, or --set {section}.{MAIN_KEYS[section]}={value}"
    )


def _place(locations: Sequence[Sequence[Any]], origin: Origin) -> tuple[str, str]:
    """Where one of the keys was given, and that key: by a change, else in a line of the file, else nowhere."""
    keys = [".".join(str(part) for part in location) for location in locations]
    lines = [line_of(origin.tree, location) for location in locations]
    for key, (_, replaced) in zip(keys, lines, strict=True):
        for change in sorted(origin.changed, key=len, reverse=True):  # the most particular first
            if f"{key}.".startswith(f"{change}.") or (not replaced and change.startswith(f"{key}.")):
                return origin.change.format(change), key
    for key, (line, replaced) in zip(keys, lines, strict=True):
        if replaced:
            return f"{origin.file}, line {line}", key
    line = lines[0][0]
    return f"{origin.file}, line {line}" if line else origin.file, keys[0]


def _keys_of(location: Sequence[Any], method: object) -> list[str]:
    """The keys allowed in the section at `location`; those of the section `method` depend on its name."""
    if not location:
        return list(Scenario.model_fields)
    if location[0] == "method":
        section = METHODS.get(method) if isinstance(method, str) else None
        return list((section or MethodParameters).model_fields)
    annotation = Scenario.model_fields[location[0]].annotation
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
