"""What a new user meets: keys without effect, an unwritable cache, Ctrl-C, closed pipes, narrow terminals."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from lightcl.records.folder import INTERRUPTED, RunFolder
from lightcl.scenario import keys_without_effect, load_scenario
from simulations.tables import print_table
from tests.simulations.test_command_line import lightcl, scenario

__all__ = ["scenario"]

ROOT = Path(__file__).parents[2]


def start(*words: object, cwd: Path, module: str = "simulations.entry", **more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | more
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


# -- keys without effect -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"fleet": {"alpha": 0.1}}, "fleet.alpha: 0.1 has no effect: it is for fleet.partition: dirichlet or"),
        ({"fleet": {"alpha": 0.5}}, "fleet.alpha: 0.5 has no effect"),  # the default, but no partition is named
        ({"fleet": {"sigma": 1.0, "partition": "dirichlet"}}, "fleet.sigma: 1.0 has no effect"),
        ({"data": {"crop_padding": 2}}, "data.crop_padding: 2 has no effect: images are not cropped"),
        ({"data": {"source": "cifar10", "test_fraction": 0.5}}, "data.test_fraction: 0.5 has no effect"),
        ({"data": {"download": False}}, "data.download: false has no effect: data.source: digits is never downloaded"),
        ({"network": {"freeze_threshold": 0.5}}, "network.freeze_threshold: 0.5 has no effect"),
        ({"network": {"analysis_epochs": 2, "freeze": "layer2"}}, "network.analysis_epochs: 2 has no effect"),
        ({"network": {"frozen_batch_norm": "train", "freeze": "none"}}, "network.frozen_batch_norm: \"train\" has no"),
        ({"server": {"strategy": "FedAdam"}}, "server.strategy: \"FedAdam\" has no effect: server.aggregation is none"),
        ({"server": {"compression": "fp16"}}, "server.compression: \"fp16\" has no effect"),
        ({"device": {"prefix_cache_gb": 2}}, "device.prefix_cache_gb: 2.0 has no effect: the prefix cache is not used"),
        ({"device": {"prefix_cache_dtype": "fp16", "prefix_cache": "off"}, "data": {"views": 2}},
         "device.prefix_cache_dtype: \"fp16\" has no effect"),
        ({"method": {"beta": 0, "ratio": 0.2}}, "method.ratio: 0.2 has no effect: method.beta is 0"),
        ({"method": {"name": "ewc", "strength": 0, "gamma": 0.5}}, "method.gamma: 0.5 has no effect"),
        ({"method": {"name": "sparcl-er", "removed_data": 0.5}, "training": {"epochs": 5}},
         "method.removed_data: 0.5 has no effect: method.interval is 5 and training.epochs only 5"),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_named_with_the_key_that_decides(sections, line) -> None:
    (found,) = keys_without_effect(load_scenario(sections))
    assert found.startswith(line)


@pytest.mark.parametrize(
    "sections",
    [
        {"fleet": {"alpha": 0.1, "partition": "dirichlet"}},
        {"fleet": {"sigma": 1.0, "partition": "distribution"}},
        {"data": {"crop_padding": 2, "augmentation": "crop"}},
        {"network": {"freeze_threshold": 0.5, "freeze": "auto"}},
        {"server": {"strategy": "FedAdam", "aggregation": "suffix"}},
        {"device": {"prefix_cache_gb": 2}, "data": {"views": 2}},
        {"method": {"beta": 1, "ratio": 0.2}},
        {"method": {"name": "derpp", "beta": 0}},
        {"method": {"name": "sparcl-er", "removed_data": 0.5}, "training": {"epochs": 6}},
    ],
)
def test_a_key_with_an_effect_is_not_named(sections) -> None:
    assert keys_without_effect(load_scenario(sections)) == []


def test_a_complete_scenario_names_all_keys_and_is_not_warned_of(tmp_path) -> None:
    for name in ("quickstart", "fleet-1000"):
        file = tmp_path / "all.yaml"
        file.write_text(load_scenario(name).to_yaml())
        assert keys_without_effect(load_scenario(file)) == []


def test_two_keys_are_for_the_analysis_alone() -> None:
    loaded = load_scenario({"network": {"freeze_threshold": 0.5}})
    assert keys_without_effect(loaded)
    assert keys_without_effect(loaded, analyzed=True) == []


def test_commands_warn_on_the_standard_error(scenario, monkeypatch, capfd) -> None:
    assert lightcl(monkeypatch, "validate", scenario, "--set", "fleet.alpha=0.1") == 0
    said = capfd.readouterr()
    assert "warning: fleet.alpha: 0.1 has no effect" in said.err
    assert "no effect" not in said.out


def test_a_grid_over_a_key_without_effect_is_warned_of(scenario, monkeypatch, capfd) -> None:
    grid = ["--grid", "fleet.alpha=0.1,0.3", "--out", "sweep", "--only-table"]
    assert lightcl(monkeypatch, "sweep", scenario, *grid) == 2  # nothing has run that a table could be made of
    said = capfd.readouterr().err
    assert "fleet.alpha: 0.1 has no effect" in said
    assert "fleet.alpha: 0.3 has no effect" in said
    assert lightcl(monkeypatch, "sweep", "-", *grid) == 2
    assert "give a file, not - (the standard input)" in capfd.readouterr().err


# -- the scenario --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_file_is_refused(scenario, monkeypatch, capfd, text) -> None:
    scenario.write_text(text)
    assert lightcl(monkeypatch, "validate", scenario) == 2
    assert "tiny.yaml is empty: a scenario has at least one key" in capfd.readouterr().err


def test_a_scenario_from_the_standard_input(scenario, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(scenario.read_text()))
    assert lightcl(monkeypatch, "validate", "-") == 0
    assert capfd.readouterr().out.startswith("the standard input: valid. 2 devices, 2 tasks x 2 classes")
    monkeypatch.setattr(sys, "stdin", io.StringIO("stream: {taskz: 1}"))
    assert lightcl(monkeypatch, "validate", "-") == 2
    assert "the standard input, line 1: stream.taskz: unknown key" in capfd.readouterr().err


@pytest.mark.parametrize("name", [".", "..", "...", ".hidden", "a/b", "/", "", "a b", "n" * 81])
def test_names_that_are_no_folder_of_their_own_are_refused(scenario, monkeypatch, capfd, name) -> None:
    assert lightcl(monkeypatch, "validate", scenario, "--set", f"name={json.dumps(name)}") == 2
    assert "(allowed: 1 to 80 letters, digits, dots, dashes and underscores" in capfd.readouterr().err


@pytest.mark.parametrize("words", [("scenarios", "lst"), ("cache", "cler"), ("device", "chek"), ("validat",)])
def test_an_unknown_command_gets_one_suggestion(monkeypatch, capfd, words: Sequence[str]) -> None:
    assert lightcl(monkeypatch, *words) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert said.lower().count("did you mean") == 1
    assert "(commands:" in said


# -- images --------------------------------------------------------------------------------------------------------


def test_validate_counts_the_images_of_the_stream_alone_and_warns_of_few_tests(scenario, monkeypatch, capfd) -> None:
    """Of 1,797 digits about 1,437 are for training; classes 0 to 3 have about 576 of them, less a tenth held out."""
    assert lightcl(monkeypatch, "validate", scenario, "--set", "fleet={devices: 1}") == 0
    lines = dict(line.split(": ", 1) for line in capfd.readouterr().out.splitlines() if ": " in line)
    assert 500 < int(lines["training images per device"].split()[0]) < 540
    assert 130 < int(lines["test images per device"].split()[0]) < 150
    assert "warning" not in lines
    assert lightcl(monkeypatch, "validate", scenario, "--set", "fleet={devices: 12}") == 0
    said = capfd.readouterr().out
    assert "test images per device: 1" in said  # 12 of them
    assert "warning: 12 devices tested on fewer than 50 images; fleet.test_data=matched gives a device more" in said


@pytest.mark.parametrize("place", ["missing", "file"])
def test_a_cache_that_cannot_be_written_to_is_one_line(scenario, monkeypatch, capfd, place) -> None:
    Path("file").write_text("")
    where = "/proc/no-such-folder/cache" if place == "missing" else str(Path("file").absolute())
    monkeypatch.setenv("LIGHTCL_CACHE", where)
    assert lightcl(monkeypatch, "validate", scenario) == 2
    said = capfd.readouterr().err
    assert f"the cache {where} cannot be written to (" in said
    assert "set LIGHTCL_CACHE to a folder" in said


def test_no_home_folder_is_one_line(scenario, monkeypatch, capfd) -> None:
    monkeypatch.delenv("LIGHTCL_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/proc/no-such-home")
    assert lightcl(monkeypatch, "validate", scenario) == 2
    assert "the cache /proc/no-such-home/.cache/lightcl cannot be written to" in capfd.readouterr().err


# -- the terminal --------------------------------------------------------------------------------------------------


def test_headings_and_cells_are_whole_at_60_columns() -> None:
    headings = ("method", *(f"{kind} {unit}" for unit in ("MiB", "FLOPs") for kind in ("paper", "theory", "ratio")))
    rows = [["lightcl-sparse", *["1234.5"] * 6], ["sgd", *["0.1"] * 6]]
    console = Console(width=60, file=io.StringIO())
    print_table(console, headings, rows)
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 60
    words = text.split()
    for word in ("method", "paper", "theory", "ratio", "MiB", "FLOPs", "lightcl-sparse"):
        assert word in words
    assert words.count("1234.5") == 6
    assert words.count("method") == 2  # two tables, each with the names


@pytest.mark.parametrize("words", [("footprint", "--table1"), ("plan", "tiny.yaml", "--budget-mb", "64")])
def test_commands_print_whole_tables_at_60_columns(scenario, monkeypatch, capfd, words) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert lightcl(monkeypatch, *words) == 0
    assert "…" not in capfd.readouterr().out


# -- the process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [("footprint", "--table1"), ("--help",), ("validate", "tiny.yaml"), ("schema",), ("--version",)],
    ids=lambda words: words[0],
)
def test_a_closed_pipe_ends_quietly(scenario, words) -> None:
    """The reader is gone before the first line is printed."""
    child = start(*words, cwd=scenario.parent)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    said = child.stderr.read()
    child.stderr.close()
    assert (child.wait(timeout=120), said) == (141, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["typer", "torch", "torch._C", "ray", "matplotlib"])
def test_a_signal_while_a_library_is_loaded_ends_with_130(scenario, tmp_path, number, module) -> None:
    """The signal comes when the import of the library begins; a library that the command does not load never stops."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    child = start("simulate", "tiny.yaml", "--out", "run", cwd=scenario.parent, **environment)
    out, said = child.communicate(timeout=300)
    assert child.returncode == 130
    assert "Traceback" not in out + said
    assert said.splitlines()[-1].startswith("interrupted")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so(scenario, number) -> None:
    """The signal goes to all processes of the group, as Ctrl-C in a terminal does."""
    changes = ["--set", "training.epochs=2000", "--set", "fleet.devices=4", "--set", "simulation.workers=1"]
    child = start("simulate", "tiny.yaml", *changes, "--out", "run", cwd=scenario.parent)
    events = scenario.parent / "run" / "events.jsonl"
    while child.poll() is None and not (events.exists() and "phase" in events.read_text()):
        time.sleep(0.1)
    os.killpg(child.pid, number)
    out, said = child.communicate(timeout=120)
    assert child.returncode == 130, said
    assert said == "interrupted; progress is saved, continue with --resume\n"
    assert "Traceback" not in out
    failure = RunFolder(scenario.parent / "run").failure()
    assert failure is not None
    assert failure.reason == INTERRUPTED


def test_training_one_device_does_not_speak_of_flower(scenario, monkeypatch, capfd) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal: the live line is drawn
    assert lightcl(monkeypatch, "train", scenario, "--out", "run", "--no-report") == 0
    said = capfd.readouterr().out
    assert "opening the device" in said
    assert "Flower" not in said
