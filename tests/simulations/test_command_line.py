"""The command line: wrong requests get an error and leave nothing on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import ServerApp

from lightcl.device.telemetry import Sensors
from lightcl.scenario import Scenario, scenario_keys
from simulations import main as command_line
from tests.inprocess import InProcessGrid
from tests.lightcl.device.boards import orin

SCENARIO = """\
name: tiny
network: {weights: none, width: 4}
stream: {tasks: 2}
fleet: {devices: 2, test_data: whole}
training: {epochs: 1, batch_size: 16}
"""


def lightcl(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Runs the command line in this process and gives its exit code."""
    monkeypatch.setattr(sys, "argv", ["lightcl", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    code = ended.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tiny.yaml"
    file.write_text(SCENARIO)
    return file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.epoch=3", "unknown key, did you mean 'epochs'?"),
        ("training.epochs=many", "valid integer"),
        ("stream.tasks=6", "6 tasks x 2 classes need 12 classes, but data.source has 10"),
        ("network.freeze=layer5", "network.freeze 'layer5' is not a block of this network"),
        ("fleet.devices=5000", "no device can learn a task"),
        (
            "fleet={devices: 2, partition: pathological, classes_per_device: 3}",
            "need 4 classes, but a device holds fleet.classes_per_device = 3",
        ),
        ("data.source=parquet", "needs data.path"),
        ("network.weights=nothing.safetensors", "no such file"),
        ("method.name=lightcll", 'unknown method "lightcll"'),
        ("server.strategy_options={momentum: 1}", "has no such option"),
        (
            "server={strategy: FedTrimmedAvg, strategy_options: {beta: 0.7}}",
            "options.beta is 0.7; input should",
        ),
        ("network={weights: none, width: 4, freeze: layer4}", "has nothing to share"),
        ("training.learning_rate=.inf", "finite number"),
        ("name=2024-13-45", "not a YAML value"),
        ("device.accelerator=tpu", "'auto', 'cpu' or 'cuda'"),
        ("training", "expected KEY=VALUE"),
    ],
)
def test_a_wrong_request_ends_with_2_and_writes_nothing(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    more = ["--set", "server.aggregation=suffix"] if "freeze: layer4" in change else []
    assert lightcl(monkeypatch, "simulate", scenario, "--set", change, *more, "--out", "run") == 2
    assert said in capfd.readouterr().err
    assert not Path("run").exists()


def test_missing_and_broken_scenario_files(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lightcl(monkeypatch, "validate", "nowhere.yaml") == 2
    assert "nowhere.yaml: cannot be read (No such file or directory)" in capfd.readouterr().err
    scenario.write_text("name: x\nstream: [1, 2\n")
    assert lightcl(monkeypatch, "validate", scenario) == 2
    assert "not valid YAML" in capfd.readouterr().err
    scenario.write_text(SCENARIO + "name: again\n")
    assert lightcl(monkeypatch, "validate", scenario) == 2
    assert "line 6: key 'name' stands in line 1 already" in capfd.readouterr().err
    scenario.write_text(SCENARIO + "typo:\n  a: 1\n")
    assert lightcl(monkeypatch, "validate", scenario) == 2
    assert "tiny.yaml, line 6: typo: unknown key" in capfd.readouterr().err


def test_a_path_that_looks_like_markup_is_printed_unchanged(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = scenario.rename(scenario.with_name("[bold]tiny :key: .yaml"))
    assert lightcl(monkeypatch, "validate", file.name) == 0
    assert capsys.readouterr().out.startswith(f"{file.name}: valid.")
    assert lightcl(monkeypatch, "plan", file.name, "--budget-mb", "64", "--out", "[bold]plan.yaml") == 0
    assert "scenario: [bold]plan.yaml" in capsys.readouterr().out


def test_one_device_from_the_command_line_to_the_report(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lightcl(monkeypatch, "train", scenario, "--device", 1, "--out", "run") == 0
    printed = capfd.readouterr().out
    assert "TIL (task known)" in printed
    assert "report: run/report.html" in printed
    about = json.loads(Path("run/run.json").read_text())
    assert about["scenario"]["name"] == "tiny"
    assert about["libraries"]["torch"]
    partition = json.loads(Path("run/partition.json").read_text())
    assert not set(partition[0]["train"]) & set(partition[1]["train"])

    assert lightcl(monkeypatch, "train", scenario, "--device", 1, "--out", "run") == 2
    assert "--resume" in capfd.readouterr().err
    assert lightcl(monkeypatch, "train", scenario, "--out", "run", "--resume", "--set", "seed=1") == 2
    assert "seed was 0, now 1" in capfd.readouterr().err
    assert lightcl(monkeypatch, "train", scenario, "--device", 0, "--out", "run", "--resume") == 2
    assert "kind was 'device 1', now 'device 0'" in capfd.readouterr().err
    assert lightcl(monkeypatch, "train", scenario, "--out", "run", "--resume", "--overwrite") == 2
    assert lightcl(monkeypatch, "train", scenario, "--out", "tiny.yaml/run") == 2
    assert "tiny.yaml/run cannot be written to" in capfd.readouterr().err
    assert lightcl(monkeypatch, "train", scenario, "--out", f"o/{'n' * 300}") == 2
    assert "cannot be written to (File name too long)" in capfd.readouterr().err
    files = [Path("run") / name for name in ("devices.jsonl", "rounds.jsonl", "results.json")]
    before = [(file.read_text(), file.stat().st_mtime_ns) for file in files]
    assert lightcl(monkeypatch, "train", scenario, "--device", 1, "--out", "run", "--resume") == 0
    assert "the run is already complete" in capfd.readouterr().out
    assert [(file.read_text(), file.stat().st_mtime_ns) for file in files] == before


def test_an_existing_folder_of_other_files_is_left_alone(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    for option in ([], ["--overwrite"], ["--resume"]):
        assert lightcl(monkeypatch, "train", scenario, "--out", "mine", *option) == 2
    assert [f.name for f in Path("mine").iterdir()] == ["notes.txt"]


def test_a_run_killed_at_its_start_is_started_again(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run/plots").mkdir(parents=True)
    Path("run/scenario.yaml").write_text("half")
    assert lightcl(monkeypatch, "train", scenario, "--out", "run") == 2  # without our marker it may be the user's
    assert Path("run/scenario.yaml").read_text() == "half"
    Path("run/.lock").touch()
    assert lightcl(monkeypatch, "train", scenario, "--out", "run") == 0


def test_a_row_that_a_kill_cut_off_is_written_again(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lightcl(monkeypatch, "train", scenario, "--out", "run") == 0
    whole = Path("run/rounds.jsonl").read_text().splitlines()
    Path("run/rounds.jsonl").write_text(whole[0] + "\n" + whole[1][:20])
    Path("run/results.json").unlink()
    assert lightcl(monkeypatch, "train", scenario, "--out", "run", "--resume") == 0
    assert [json.loads(line)["til"] for line in Path("run/rounds.jsonl").read_text().splitlines()] == [
        json.loads(line)["til"] for line in whole
    ]
    assert len(Path("run/devices.jsonl").read_text().splitlines()) == 2


def test_resume_gives_dropped_devices_another_chance(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = {1}

    def lose(message: Message, reply: Message) -> Message | None:
        training = message.metadata.message_type == "train"
        return None if training and message.content["instruction"]["device"] in broken else reply

    def in_process(server: ServerApp, state: Path, scenario: Scenario) -> None:
        server(InProcessGrid(state, scenario.fleet.devices, lose), Context(1, 0, {}, RecordDict(), {}))

    monkeypatch.setattr("simulations.fleet.simulate", in_process)
    words = ("simulate", scenario, "--out", "run", "--set", "server={max_failures: 1, round_timeout: 0.2}")
    assert lightcl(monkeypatch, *words) == 0
    assert "dropped from the run: 1 device" in capfd.readouterr().out
    broken.clear()
    assert lightcl(monkeypatch, *words, "--resume") == 0
    assert "already complete" not in capfd.readouterr().out
    assert json.loads(Path("run/results.json").read_text())["devices_finished"] == 2
    before = Path("run/results.json").read_bytes()
    assert lightcl(monkeypatch, *words, "--resume") == 0
    assert "the run is already complete" in capfd.readouterr().out
    assert Path("run/results.json").read_bytes() == before


def test_a_device_alone_whose_state_is_gone_keeps_its_rows(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lightcl(monkeypatch, "train", scenario, "--out", "run") == 0
    Path("run/results.json").unlink()
    shutil.rmtree("run/devices")
    before = Path("run/rounds.jsonl").read_text()
    assert lightcl(monkeypatch, "train", scenario, "--out", "run", "--resume") == 2
    assert "has rows of 2 tasks, but the device's state only of 0" in capfd.readouterr().err
    assert Path("run/rounds.jsonl").read_text() == before


@pytest.mark.parametrize("measured", [False, True])
def test_a_device_alone_reads_sensors_where_it_is_told_to(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    root = Path("root").absolute()
    orin(root)
    monkeypatch.setattr("simulations.alone.Sensors", lambda: Sensors(root))
    if measured:
        monkeypatch.setenv("LIGHTCL_TELEMETRY", "1")
    assert lightcl(monkeypatch, "train", scenario, "--out", "run") == 0
    for line in Path("run/devices.jsonl").read_text().splitlines():
        assert json.loads(line)["timing"].get("power_source") == ("VDD_IN" if measured else None)
    assert Path("run/plots/board-energy.png").exists() == measured


def test_a_damaged_run_folder_is_named_and_not_changed(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lightcl(monkeypatch, "train", scenario, "--out", "run") == 0
    Path("run/results.json").rename("results.json")
    whole = {name: Path("run", name).read_text() for name in ("rounds.jsonl", "devices.jsonl")}
    damages = [
        ({"rounds.jsonl": ""}, "rows are missing"),
        ({"rounds.jsonl": "garbage\n" + whole["rounds.jsonl"]}, "rounds.jsonl, line 1"),
        ({"devices.jsonl": "{}\n"}, "devices.jsonl, line 1"),
        (dict.fromkeys(whole, ""), "has rows of 0 tasks, but the device has learned 2"),
    ]
    for damage, said in damages:
        for name, text in (whole | damage).items():
            Path("run", name).write_text(text)
        assert lightcl(monkeypatch, "train", scenario, "--out", "run", "--resume") == 2
        assert said in capfd.readouterr().err
        assert {name: Path("run", name).read_text() for name in whole} == whole | damage
    Path("run/results.json").write_text("{")
    assert lightcl(monkeypatch, "report", "run") == 2
    assert "results.json cannot be read" in capfd.readouterr().err
    Path("results.json").rename("run/results.json")
    Path("run/devices.jsonl").write_text("{}\n")
    assert lightcl(monkeypatch, "report", "run") == 2
    assert "devices.jsonl, line 1: not a row of a run" in capfd.readouterr().err


def test_a_device_that_the_fleet_does_not_have(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lightcl(monkeypatch, "train", scenario, "--device", 2) == 2
    assert "allowed: 0 to 1" in capfd.readouterr().err


def test_pretrained_weights_can_be_used_as_a_prefix(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("pretrain", "--source", "digits", "--width", 4, "--epochs", 1, "--no-flip", "--fp32", "--threads", 1)
    assert lightcl(monkeypatch, *words, "--out", "w.safetensors") == 0
    assert "lightcl pretrain --source digits" in Path("w.md").read_text()
    assert lightcl(monkeypatch, *words, "--out", "w.safetensors") == 2
    capfd.readouterr()
    assert lightcl(monkeypatch, *words, "--out", "w.md/w.safetensors") == 2
    assert "--out: w.md/w.safetensors cannot be written to" in capfd.readouterr().err
    changes = ("--set", "network.weights=w.safetensors", "--set", "network.width=null")
    assert lightcl(monkeypatch, "validate", scenario, *changes) == 0
    assert lightcl(monkeypatch, "validate", scenario, *changes, "--set", "network.width=8") == 2
    assert "shape [4, 1, 3, 3], this network (width 8, stem 'cifar') needs [8, 1, 3, 3]" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning-rate", "nan"], "--learning-rate nan: expected a number above 0"),
        (["--learning-rate", "-1"], "--learning-rate -1: expected a number above 0"),
        (["--out", "README.safetensors"], "README.md exists; replace it with --overwrite"),
        (["--out", "folder.safetensors", "--overwrite"], "folder.safetensors is a folder"),
        (["--out", "junk.safetensors"], "junk.checkpoint: not the checkpoint of a killed run"),
    ],
)
def test_pretraining_refuses_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.safetensors").mkdir()
    Path("README.md").write_text("mine")
    Path("junk.checkpoint").write_text("junk")
    before = sorted(Path().iterdir())
    fixed = ["--source", "digits", "--width", 4, "--epochs", 1, "--threads", 1]
    assert lightcl(monkeypatch, "pretrain", "--out", "w.safetensors", *fixed, *words) == 2
    captured = capfd.readouterr()
    assert said in captured.err
    assert "epoch" not in captured.out
    assert sorted(Path().iterdir()) == before


def test_the_table_of_keys_leaves_nothing_open_and_says_nothing_twice() -> None:
    rows = [row for row in scenario_keys().splitlines() if row.startswith("| `")]
    assert len(set(rows)) == len(rows)
    assert all(cell.strip() for row in rows for cell in row.strip("|").split("|"))
    assert "| `data.image_size` | 8 ≤ integer ≤ 1024 or `null` | `null` |" in scenario_keys()
    assert '| `data.augmentation` | `auto`, `none`, `crop` or `crop-flip` | `"auto"` |' in scenario_keys()
    assert "\n## method: lightcl, lightcl-sparse, lightcl-plus\n" in scenario_keys()


def test_the_bundled_scenarios_are_valid_files() -> None:
    from lightcl.scenario import load_scenario

    files = sorted((Path(__file__).parents[2] / "lightcl" / "scenario" / "bundled").glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        assert load_scenario(file).name == file.stem


@pytest.mark.parametrize("command", ["simulate", "train", "analyze", "validate", "footprint", "plan", "sweep"])
def test_help_explains_scenario(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    assert lightcl(monkeypatch, *command.split(), "--help") == 0
    assert "A YAML file, or the name" in capfd.readouterr().out


def test_help_and_version_import_nothing_heavy(tmp_path: Path) -> None:
    """In a fresh process, for the program and each command: PyTorch alone takes seconds on a board."""
    script = (
        "import sys\n"
        "from simulations.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "heavy = {'torch', 'flwr', 'ray', 'matplotlib', 'pydantic', 'numpy', 'pandas', 'lightcl.scenario'}\n"
        "print('imported:', sorted(heavy & set(sys.modules)))\n"
    )
    for words in (["--help"], ["--version"], *([name, "--help"] for name in command_line.COMMANDS)):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "imported: []", words


def test_each_command_has_the_help_of_the_table() -> None:
    for name in command_line.COMMANDS:
        command = command_line.load_command(name)
        assert command.name == name
        assert command.help


def test_an_unknown_command_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lightcl(monkeypatch, "analyse") == 2
    assert "'analyze'" in capfd.readouterr().err


def test_a_missing_library_names_the_extra(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import then fails as if the library were not installed
    assert lightcl(monkeypatch, "simulate", scenario, "--out", "run") == 2
    assert "ray is needed to simulate a fleet" in (said := capfd.readouterr().err)
    assert "pip install 'lightcl-fleet[simulation]'" in said
    assert not Path("run").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert lightcl(monkeypatch, "train", scenario, "--out", "run") == 0, "a run without its report is complete"
    assert "report: not written, matplotlib is needed" in capfd.readouterr().out
    assert Path("run/results.json").exists()
    assert lightcl(monkeypatch, "report", "run") == 2
    assert "lightcl-fleet[simulation]" in capfd.readouterr().err


def test_version_and_the_help_of_a_run_folder(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lightcl(monkeypatch, "--version") == 0
    assert capfd.readouterr().out.startswith("lightcl ")
    assert lightcl(monkeypatch, "report", "--help") == 0
    assert "A run folder" in capfd.readouterr().out


def test_one_is_not_written_as_many(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", "fleet.devices=1", "--set", "stream.tasks=1"]
    assert lightcl(monkeypatch, "validate", scenario, *changes) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "1 device, 1 task x 2 classes" in said
