"""All keys of a scenario: as a JSON schema for editors, as tables for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from lightcl.scenario.model import SECTIONS, Scenario, method_types

_KEY_TABLE = ("", "| key | allowed | default | |", "|---|---|---|---|")


def scenario_schema() -> dict[str, Any]:
    """JSON schema of a scenario file, for editors; every registered method has a definition of its own."""
    schema = Scenario.model_json_schema()
    method = schema["properties"]["method"]
    for member in method["oneOf"]:
        schema["$defs"] |= member.pop("$defs", {}) | {member["title"]: member}
    method["oneOf"] = [{"$ref": f"#/$defs/{member['title']}"} for member in method["oneOf"]]
    return schema


def scenario_keys() -> str:
    """All keys of a scenario with what they may be, as Markdown tables (docs/reference/scenario-keys.md)."""
    fields = Scenario.model_fields
    lines = ["# Scenario keys", "", "Made by `lightcl schema --markdown`; every key may be left out.", *_KEY_TABLE]
    lines += _key_rows(Scenario, "", [name for name in fields if name not in SECTIONS])
    for name in sorted(SECTIONS - {"method"}, key=list(fields).index):
        section = fields[name].annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        lines += ["", f"## {name}", *_KEY_TABLE, *_key_rows(section, f"{name}.", list(section.model_fields))]
    default = fields["method"].default.name
    methods = method_types()
    by_row: dict[str, list[str]] = {}
    for method in sorted(methods, key=lambda method: method != default):
        keys = [key for key in methods[method].model_fields if key != "name"]
        for row in _key_rows(methods[method], "method.", keys):
            by_row.setdefault(row, []).append(method)
    rows: dict[str, list[str]] = {}  # a key that several methods share is listed once
    for row, having in by_row.items():
        rows.setdefault(", ".join(having), []).append(row)
    names = ", ".join(f"`{name}`" for name in methods)
    lines += [
        "",
        "## method",
        "",
        "The other keys depend on the method: they are below, under the methods that have them.",
    ]
    lines += [*_KEY_TABLE, f"| `method.name` | {names} | `{json.dumps(default)}` | See docs/reference/methods.md. |"]
    for names, lines_of_keys in rows.items():
        lines += ["", f"## method: {names}", *_KEY_TABLE, *lines_of_keys]
    return "\n".join(lines) + "\n"


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
