"""Any text is a valid scenario, or is refused with one clear error: thousands of damaged files and changes."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lightcl.errors import RequestError
from lightcl.scenario import (
    Scenario,
    bundled_scenarios,
    keys_without_effect,
    load_scenario,
    method_types,
    scenario_from_json,
)
from lightcl.scenario.model import SECTIONS

SEEDED = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
MANY, MORE = settings(SEEDED, max_examples=350), settings(SEEDED, max_examples=700)

JARGON = re.compile(r"Traceback|pydantic|type=|input_type|further information|<class|Error\(|\bNoneType\b")
"""What belongs into no error for people."""


@cache
def all_keys() -> tuple[str, ...]:
    """Dotted keys of every section and every method."""
    keys = [name for name in Scenario.model_fields if name not in SECTIONS]
    for section in SECTIONS - {"method"}:
        keys += [f"{section}.{key}" for key in Scenario.model_fields[section].annotation.model_fields]
    for method in method_types().values():
        keys += [f"method.{key}" for key in method.model_fields]
    return tuple(sorted(set(keys)))


@cache
def bundled_values() -> tuple[dict[str, Any], ...]:
    return tuple(yaml.safe_load(file.read_text(encoding="utf-8")) for file in bundled_scenarios().values())


@cache
def bundled_lines() -> tuple[tuple[str, ...], ...]:
    """The bundled scenarios line by line, without comments."""
    texts = [file.read_text(encoding="utf-8").splitlines() for file in bundled_scenarios().values()]
    return tuple(tuple(line for line in text if line.strip() and not line.startswith("#")) for text in texts)


def check(file: Path, changes: list[str]) -> None:
    """Loads a file with changes: a scenario that survives the wire, or one clear error."""
    try:
        scenario = load_scenario(file, changes)
    except RequestError as error:
        text = str(error)
        assert text.strip()
        assert len(text) < 4000
        assert not JARGON.search(text), text
        assert len(text.splitlines()) <= 40  # one line for each wrong key
        return
    assert scenario_from_json(scenario.model_dump_json()) == scenario
    assert all("has no effect" in line for line in keys_without_effect(scenario))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scenario") / "scenario.yaml"


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 12), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from([
        "auto", "none", "iid", "dirichlet", "natural", "own", "shuffled", "cifar10", "digits", "lightcl", "er", "derpp",
        "layer3", "ray", "suffix", "FedAdam", "2", "1e400", "..", "2024-13-45", 10**30, -1, 0.0, 1e-320, 0.1,
    ]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@MANY
@given(data=st.data())
def test_values_of_any_type_in_any_key(file: Path, data: st.DataObject) -> None:
    values = {
        key: dict(section) if isinstance(section, dict) else section
        for key, section in data.draw(st.sampled_from(bundled_values())).items()
    }
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(all_keys()) | st.sampled_from(sorted(Scenario.model_fields)))
        section, _, inner = key.partition(".")
        value = data.draw(VALUES)
        if inner and isinstance(values.setdefault(section, {}), dict):
            values[section][inner] = value
        else:
            values[section] = value
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    check(file, [])


@MANY
@given(data=st.data())
def test_lines_that_are_damaged(file: Path, data: st.DataObject) -> None:
    lines = list(data.draw(st.sampled_from(bundled_lines())))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(lines) - 1))
        line = lines[place]
        cut = data.draw(st.integers(0, len(line)))
        kind = data.draw(st.sampled_from(["cut", "insert", "double", "drop", "indent", "swap", "value"]))
        if kind == "cut":
            lines[place] = line[:cut]
        elif kind == "insert":
            lines[place] = line[:cut] + data.draw(st.text(max_size=4)) + line[cut:]
        elif kind == "double":
            lines.insert(place, line)
        elif kind == "drop" and len(lines) > 1:
            del lines[place]
        elif kind == "indent":
            lines[place] = data.draw(st.sampled_from(["  ", "\t", " "])) + line
        elif kind == "swap":
            other = data.draw(st.integers(0, len(lines) - 1))
            lines[place], lines[other] = lines[other], line
        elif kind == "value":
            lines[place] = f"{line.partition(':')[0]}: {data.draw(st.sampled_from(YAML_TEXTS))}"
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    check(file, [])


YAML_TEXTS = (
    "", "~", "[]", "{}", "[1, 2", "{a: 1", "&x [*x]", "*nothing", "!!python/object:os.system x", "!!binary ???", "1:30",
    "0x1F", "010", "1_000", ".inf", ".nan", "-.inf", "1e400", "'", '"', "- 1", "|", ">", "? a", "<<: 1", "2024-02-30",
    "2024-01-01 25:00", "yes", "on", "null", "\\", "%", "@", "`", "!!set {a}", "!!int x", "!!float x", "!!timestamp x",
    "999999999999999999999999999", "-0", "0.1", "2", "true", "auto", "..",
)  # fmt: skip


@MORE
@given(
    st.lists(
        st.tuples(
            st.sampled_from(all_keys()) | st.text(max_size=20) | st.sampled_from(sorted(Scenario.model_fields)),
            st.sampled_from(YAML_TEXTS) | st.text(max_size=15) | st.integers().map(str) | st.floats().map(str),
            st.sampled_from(["=", "=", "=", "=", "==", "", " = ", ": "]),
        ),
        min_size=1, max_size=3,
    )
)  # fmt: skip
@example([("method.name", "sgd", "="), ("method.beta", "1", "=")])
@example([("training", "3", "="), ("training.epochs", "2", "=")])
@example([("stream.class_order", "&x [*x]", "=")])
def test_changes_of_any_text(file: Path, changes: list[tuple[str, str, str]]) -> None:
    file.write_text("seed: 1\nmethod: {name: lightcl}\n")
    check(file, [f"{key}{sign}{value}" for key, value, sign in changes])


@MORE
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"\xff\xfe")
@example(b"\x00")
@example(b"[" * 5000)
@example(b"a: &a [" + b"*a, " * 50 + b"*a]")
def test_bytes_of_any_kind(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    check(file, [])
