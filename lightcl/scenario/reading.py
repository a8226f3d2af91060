"""A scenario from a YAML file and `--set` changes, and errors that say where a wrong value was given."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lightcl.errors import RequestError, nearest, shown
from lightcl.methods.base import METHODS, MethodParameters
from lightcl.networks.section import NAMED_WEIGHTS
from lightcl.scenario.model import SECTIONS, Scenario
from lightcl.scenario.yaml_text import line_of, parse


def bundled_scenarios() -> dict[str, Path]:
    """The scenarios that ship with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "bundled").glob("*.yaml"))}


def find_scenario(wanted: Path) -> Path:
    """A scenario file, or the bundled scenario of that name where there is no such file.

    Raises RequestError for a name without suffix and folder that is neither.
    """
    name = str(wanted)
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


def load_scenario(file: Path, changes: Sequence[str] = ()) -> Scenario:
    """Reads a YAML file and applies `KEY=VALUE` changes (dotted keys, YAML values); of a key given twice the last wins.

    Relative paths in it are relative to the current folder. Raises RequestError naming file, line and key.
    """
    file = find_scenario(file)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        tree, values = parse(text, str(file))
    except ValueError as error:
        raise RequestError(f"{file}: not valid YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RequestError(f"{file}: a scenario is a mapping of keys to values, not {type(values).__name__}")
    values = {key: {} if value is None and key in SECTIONS else value for key, value in values.items()}
    changed = {_apply(values, change) for change in sorted(changes, key=_reach)}
    if isinstance(values.get("method"), dict):
        values["method"] = {"name": "lightcl"} | values["method"]
    try:
        return _with_absolute_paths(Scenario.model_validate(values))
    except ValidationError as error:
        method = values.get("method")
        name = method.get("name") if isinstance(method, dict) else None
        lines = [_explain(problem, file, tree, changed, name) for problem in error.errors()]
        raise RequestError("\n".join(dict.fromkeys(lines))) from error


def scenario_from_json(text: str) -> Scenario:
    """A device's check of what the server sent. Raises RequestError."""
    try:
        return Scenario.model_validate_json(text)
    except ValidationError as error:
        raise RequestError(
            "\n".join(_explain(problem, Path("<message>"), None, set(), _method_in(text)) for problem in error.errors())
        ) from error


def _method_in(text: str) -> object:
    """The name of the method in a scenario as JSON; None where there is none."""
    try:
        return json.loads(text)["method"]["name"]
    except (ValueError, TypeError, LookupError):
        return None


def _reach(change: str) -> tuple[int, bool]:
    """Sorts replacements of a section before settings of its keys, so that no key is lost in either order of typing."""
    key = change.partition("=")[0]
    return key.count("."), key != "method.name"


def _apply(values: dict[str, Any], change: str) -> str:
    key, equals, text = change.partition("=")
    if not equals or not all(key.split(".")):
        raise RequestError(f"--set {change}: expected KEY=VALUE, for instance training.epochs=5")
    try:
        _, value = parse(text, f"--set {key}")
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


def _explain(
    problem: Mapping[str, Any], file: Path, tree: yaml.Node | None, changed: set[str], method: object = None
) -> str:
    """One line for one of pydantic's errors: file, line, key, what was given, what is allowed."""
    location = [part for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]  # a dictionary's [key]
    kind, given = problem["type"], problem.get("input")
    if kind == "unknown_section":  # its class is registered under the key `name`
        location.append("name")
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":  # its text begins with the key and may name others, each of which may be the culprit
        named = [found.split(".") for found in re.findall(rf"\b(?:{'|'.join(SECTIONS)})(?:\.\w+)+", message)]
        where, key = _place(named or [location], file, tree, changed)
        return f"{where}: {message.removeprefix(f'{key} ') if where == f'--set {key}' else message}"
    where, key = _place([location], file, tree, changed)
    where += "" if where == f"--set {key}" else f": {key}"
    if kind == "extra_forbidden":
        known = _keys_of(location[:-1], method)
        return f"{where}: unknown key{nearest(str(location[-1]), known)} (allowed here: {', '.join(known)})"
    if kind in ("unknown_section", "unknown_name"):
        return f"{where}: {message}"
    return f"{where}: {message[0].lower()}{message[1:]}, not {shown(given)}"


def _place(
    locations: Sequence[Sequence[Any]], file: Path, tree: yaml.Node | None, changed: set[str]
) -> tuple[str, str]:
    """Where one of the keys was given, and that key: by --set, else in a line of the file, else nowhere."""
    keys = [".".join(str(part) for part in location) for location in locations]
    lines = [line_of(tree, location) for location in locations]
    for key, (_, replaced) in zip(keys, lines, strict=True):
        for change in sorted(changed, key=len, reverse=True):  # the most particular first
            if f"{key}.".startswith(f"{change}.") or (not replaced and change.startswith(f"{key}.")):
                return f"--set {change}", key
    for key, (line, replaced) in zip(keys, lines, strict=True):
        if replaced:
            return f"{file}, line {line}", key
    line = lines[0][0]
    return f"{file}, line {line}" if line else str(file), keys[0]


def _keys_of(location: Sequence[Any], method: object) -> list[str]:
    """The keys allowed in the section at `location`; those of the section `method` depend on its name."""
    if not location:
        return list(Scenario.model_fields)
    if location[0] == "method":
        section = METHODS.get(method) if isinstance(method, str) else None
        return list((section or MethodParameters).model_fields)
    annotation = Scenario.model_fields[location[0]].annotation
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
