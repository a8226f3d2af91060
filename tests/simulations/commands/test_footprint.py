"""`lightcl footprint` and `lightcl plan` from the command line."""

import json
from pathlib import Path

import pytest

from lightcl.analysis.footprint import measured
from lightcl.analysis.footprint.measured import measure, measure_here
from lightcl.scenario import load_scenario, method_names
from lightcl.scenario.variants import as_method, resets
from simulations.reports.plots import DARK, LIGHT, footprint_bars, png
from simulations.reports.plots.methods import PART_COLORS
from tests.lightcl import toys
from tests.simulations.test_command_line import lightcl, scenario  # noqa: F401


@pytest.fixture
def file(scenario: Path) -> Path:  # noqa: F811
    return scenario


def test_all_methods_as_table_json_and_picture(file, monkeypatch, capfd):
    chosen = ["--all-methods", "--json", "a.json", "--picture", "a.png"]
    assert lightcl(monkeypatch, "footprint", file, *chosen) == 0
    text = capfd.readouterr().out
    assert "kept activations" in text
    assert "theory / sgd's" in text
    values = json.loads(Path("a.json").read_text())
    assert [m["method"] for m in values["methods"]] == method_names()
    assert values["image"] == [1, 8, 8]
    by_name = {m["method"]: m["theory"] for m in values["methods"]}
    assert by_name["lightcl"]["peak"] == sum(by_name["lightcl"]["memory"].values())
    assert by_name["lightcl"]["training_flops"] > 0
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_only_json_is_written_to_standard_output(file, monkeypatch, capfd):
    assert lightcl(monkeypatch, "footprint", file, "--json", "-") == 0
    (method,) = json.loads(capfd.readouterr().out)["methods"]
    assert (method["method"], method["freeze"]) == ("lightcl", "layer3.1")


@pytest.mark.slow
def test_a_fresh_process_measures_what_this_one_does(file):
    loaded = load_scenario(file)
    fresh = measure(loaded, (1, 8, 8), 10)
    here = measure_here(loaded, (1, 8, 8), 10, "tensors")
    assert fresh.training == pytest.approx(here["training"], rel=0.02)
    assert fresh.resident is None or fresh.resident > fresh.training


def test_measured_stands_beside_theory(file, monkeypatch, capfd):
    # In this process: a fresh one takes ten seconds to import everything (the slow test above).
    monkeypatch.setattr(measured, "_in_fresh_process", measured.measure_here)
    assert lightcl(monkeypatch, "footprint", file, "--methods", "sgd", "--measure", "--json", "m.json") == 0
    assert "measured / theory" in capfd.readouterr().out
    (method,) = json.loads(Path("m.json").read_text())["methods"]
    assert method["measured"]["training"] > 0
    assert method["measured_over_theory"] == method["measured"]["training"] / method["theory_second_task"]["peak"]


def test_table1_has_all_cells(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert lightcl(monkeypatch, "footprint", "--table1", "--json", "t.json") == 0
    text = capfd.readouterr().out
    assert "153.4" in text
    assert "153.3" in text
    assert "PNN: FLOPs" in text
    cells = json.loads(Path("t.json").read_text())
    assert len(cells) == 22
    assert all(cell["memory"]["ratio"] == cell["memory"]["theory"] / cell["memory"]["paper"] for cell in cells)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["footprint"], "name a SCENARIO, or --table1"),
        (["footprint", "FILE", "--table1"], "--table1 reproduces the paper's setting"),
        (["footprint", "FILE", "--methods", "sdg"], "unknown method 'sdg', did you mean 'sgd'?"),
        (["footprint", "FILE", "--methods", "sgd", "--all-methods"], "choose one"),
        (["footprint", "FILE", "--picture", "a.jpg"], "ends in .png"),
        (["footprint", "FILE", "--device", "9"], "the fleet has 2 devices"),
        (["plan", "FILE", "--budget-mb", "0.01"], "nothing fits; the smallest setting needs"),
        (["plan", "FILE", "--budget-mb", "9", "--set", "method.name=sgd"], "has no freeze point"),
        (["plan", "FILE", "--budget-mb", "1e-9"], "--budget-mb 1e-09: nothing fits"),
        (["plan", "FILE", "--budget-mb", "9", "--out", "mine.txt"], "--out: mine.txt exists; replace it with --ov"),
        (["plan", "FILE", "--budget-mb", "9", "--json", "mine.txt"], "--json: mine.txt exists; replace it with --ov"),
        (["plan", "FILE", "--budget-mb", "9", "--json", "FILE", "--overwrite"], "is the scenario itself"),
        (["plan", "FILE", "--budget-mb", "9", "--out", "FILE", "--overwrite"], "is the scenario itself"),
        (["plan", "FILE", "--budget-mb", "9", "--json", "new", "--out", "new"], "is also the file of --out"),
        (["plan", "FILE", "--budget-mb", "9", "--json", "/dev/full"], "/dev/full cannot be written to (No space left"),
        (["plan", "FILE", "--budget-mb", "9", "--json", "new", "--out", "/dev/full"], "/dev/full cannot be written to"),
        (["footprint", "FILE", "--json", "/dev/full"], "/dev/full cannot be written to (No space left"),
        (["footprint", "FILE", "--json", "mine.txt"], "--json: mine.txt exists; replace it with --overwrite"),
        (["footprint", "FILE", "--json", "FILE", "--overwrite"], "is the scenario itself"),
        (["footprint", "FILE", "--json", "a.png", "--picture", "a.png"], "a.png is also the file of --json"),
        (["footprint", "FILE", "--json", f"{'n' * 300}"], "cannot be written to (File name too long)"),
        (["footprint", "FILE", "--methods", ""], "--methods: unknown method ''"),
        (["footprint", "--table1", "--device", "3"], "--table1 reproduces the paper's setting"),
        (["footprint", "--table1", "--json", "nowhere/t.json"], "there is no folder nowhere"),
    ],
)
def test_a_wrong_request_ends_with_2_and_writes_nothing(file, monkeypatch, capfd, words, said):
    Path("mine.txt").write_text("mine")
    before = {path: path.read_text() for path in Path().iterdir()}
    assert lightcl(monkeypatch, *(file if word == "FILE" else word for word in words)) == 2
    assert said in " ".join(capfd.readouterr().err.split())
    assert {path: path.read_text() for path in Path().iterdir()} == before


def test_a_plan_writes_a_scenario_that_loads(file, monkeypatch, capfd):
    assert lightcl(monkeypatch, "plan", file, "--budget-mb", "1", "--all", "--json", "p.json") == 0
    text = capfd.readouterr().out
    assert "tiny-1mb.yaml" in text
    settings = json.loads(Path("p.json").read_text())
    (chosen,) = [s for s in settings if s["chosen"]]
    assert chosen["footprint"]["peak"] <= 2**20
    planned = load_scenario(Path("tiny-1mb.yaml"))
    assert planned.network.freeze == chosen["keys"]["network.freeze"]
    assert planned.training.batch_size == chosen["keys"]["training.batch_size"]
    assert planned.method.memory_size == chosen["keys"]["method.memory_size"]
    assert planned.stream == load_scenario(file).stream
    assert lightcl(monkeypatch, "plan", file, "--budget-mb", "1", "--json", "p.json", "--overwrite") == 0
    assert load_scenario(Path("tiny-1mb.yaml")) == planned


def test_another_method_comes_with_its_own_defaults():
    network = {"weights": "none", "width": 4, "freeze": "layer1"}
    given = toys.scenario(network=network, server={"aggregation": "suffix"}, stream={"tasks": 2, "settings": "til+cil"})
    assert as_method(given, "lightcl") is given
    other = as_method(given, "sgd")
    assert (other.method.name, other.network.freeze) == ("sgd", None)
    assert (other.network.width, other.training, other.data) == (4, given.training, given.data)


def test_another_method_keeps_the_keys_it_supports_and_resets_the_others():
    network = {"weights": "none", "width": 4, "freeze": "layer1"}
    given = toys.scenario(network=network, server={"aggregation": "suffix"}, stream={"tasks": 2, "settings": "til+cil"})
    found = {name: as_method(given, name) for name in method_names()}
    assert (found["sgd"].server.aggregation, found["pnn"].server.aggregation) == ("suffix", "none")
    assert (found["sgd"].stream.settings, found["pnn"].stream.settings) == ("til+cil", "auto")
    assert (found["sgd"].network.freeze, found["lightcl-plus"].network.freeze) == (None, "layer1")
    assert resets(given, ["lightcl", "lightcl-plus", "sgd", "pnn", "sparcl-er"]) == [
        "network.freeze is the method's own, not layer1, for sgd, pnn, sparcl-er",
        "server.aggregation is none, not suffix, for pnn, sparcl-er",
        "stream.settings is auto, not til+cil, for pnn",
    ]
    assert resets(toys.scenario(), method_names()) == []


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_bars_are_as_long_as_the_parts(theme):
    parts = {"one": {"parameters": 3 * 2**20, "masks": 1}, "two": {"gradients": 2 * 2**20, "parameters": 2**20}}
    figure = footprint_bars(parts, {"one": 4 * 2**20}, theme)
    (axes,) = figure.axes
    ends = sorted(patch.get_x() + patch.get_width() for patch in axes.patches)
    assert ends[-1] == 3
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["parameters", "gradients", "measured"]
    assert set(labels[:2]) <= set(PART_COLORS)
    assert png(figure).startswith(b"\x89PNG")
