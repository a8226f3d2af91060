"""The keys of a stream from the field: what is refused, what has no effect, and what commands say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from client.commands.check import run_checks
from lightcl.data.sources import load_source
from lightcl.errors import RequestError
from lightcl.scenario import Scenario, keys_without_effect
from lightcl.scenario.digest import scenario_digest
from server.app import images_are_here
from server.commands.check import check_scenario
from tests.lightcl.data.field import drop
from tests.simulations.test_command_line import lightcl

DATA = {"source": "field", "classes": ["cup", "bottle"], "image_size": 32}


def scenario(data: dict[str, Any] | None = None, **sections: Any) -> Scenario:
    values = {"data": DATA | (data or {}), "network": {"weights": "none", "width": 4}} | sections
    return Scenario.model_validate(values)


@pytest.mark.parametrize(
    ("data", "sections", "said"),
    [
        ({"classes": None}, {}, "data.source: field needs data.classes"),
        ({"image_size": None}, {}, "data.source: field needs data.image_size"),
        ({"classes": ["cup"]}, {}, "two or more names"),
        ({"classes": ["cup", "Cup"]}, {}, "differ in more than capital letters"),
        ({"classes": ["cup", "unlabeled"]}, {}, 'data.classes has "unlabeled"'),
        ({"classes": ["cup", "a/b"]}, {}, 'data.classes has "a/b"'),
        ({"classes": ["cup", ".."]}, {}, 'data.classes has ".."'),
        ({"classes": ["cup", "bottle "]}, {}, 'data.classes has "bottle "'),
        ({"classes": ["cup", ""]}, {}, 'data.classes has ""'),
        ({"classes": ["cup", 2]}, {}, "valid string"),
        ({"keep": "some"}, {}, "'none', 'buffer' or 'all'"),
        ({"crop_padding": 32}, {}, "data.crop_padding is 32, but data.image_size is 32"),
        ({"source": "digits", "image_size": None}, {}, "data.classes is for data.source: field, not digits"),
        ({"source": "digits", "classes": None, "keep": "none"}, {}, "data.keep is for data.source: field, not digits"),
        ({}, {"stream": {"classes_per_task": 3}}, "stream.classes_per_task is 3, but data.classes has 2"),
        ({}, {"stream": {"ready_images": 1}}, "greater than or equal to 2"),
        ({}, {"stream": {"ready_after": 0.0}}, "greater than 0"),
        ({}, {"server": {"fraction": 0.5}}, "server.fraction is 0.5, but with data.source: field"),
        ({"keep": "buffer"}, {"method": {"name": "joint"}}, "data.keep is 'buffer', but method joint"),
    ],
)
def test_what_is_refused(data: dict[str, Any], sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        scenario(data, **sections)
    assert said in str(refused.value)


def test_keys_without_effect_are_named() -> None:
    given = scenario({"path": "/images"}, stream={"cut": "own"}, fleet={"partition": "iid", "test_data": "whole"})
    lines = "\n".join(keys_without_effect(given))
    assert 'data.path: "/images" has no effect: with data.source: field each board names its folder' in lines
    assert 'stream.cut: "own" has no effect: with data.source: field a task has the classes' in lines
    assert "fleet.test_data" in lines
    digits = Scenario.model_validate({"stream": {"ready_images": 50, "ready_after": 60.0}})
    lines = "\n".join(keys_without_effect(digits))
    assert "stream.ready_images: 50 has no effect: it is for data.source: field, not digits" in lines
    assert "stream.ready_after: 60.0 has no effect" in lines
    assert keys_without_effect(scenario(stream={"ready_images": 50})) == []


def test_the_digests_of_other_scenarios_are_what_they_were() -> None:
    """States and runs of earlier versions have them."""
    assert scenario_digest(Scenario()) == "89fca7dc0edfe5e3"
    renamed = [Scenario.model_validate({"device": {"convolutions": name}}) for name in ("winograd-native", "native")]
    assert [(one.device.convolutions, scenario_digest(one)) for one in renamed] == [("native", "06032353a6651fc4")] * 2
    assert scenario_digest(scenario()) != scenario_digest(scenario({"keep": "none"}))
    assert scenario_digest(scenario()) == scenario_digest(scenario({"path": "/elsewhere"}))


def test_a_server_needs_no_images() -> None:
    assert not images_are_here(scenario())
    assert not images_are_here(scenario({"path": str(Path(__file__).parent)}))
    assert "share no weights" in check_scenario(scenario(), 3)
    assert "with 2 classes" in check_scenario(scenario(server={"aggregation": "suffix+head"}), 3)
    with pytest.raises(RequestError, match="so this command has no images to load; start the run with `lightcl server"):
        load_source(scenario().source_request())


@pytest.mark.parametrize("command", ["simulate", "train", "footprint"])
def test_commands_that_need_images_say_what_to_do(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "field.yaml"
    file.write_text(scenario().to_yaml())
    monkeypatch.chdir(tmp_path)
    assert lightcl(monkeypatch, command, file) == 2
    assert "start the run with `lightcl server run`" in " ".join(capsys.readouterr().err.split())
    assert [place.name for place in tmp_path.iterdir()] == ["field.yaml"]
    assert lightcl(monkeypatch, "validate", file) == 0
    assert "valid for 10 boards that collect images." in capsys.readouterr().out


def test_doctor_looks_into_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    config = {"partition-id": 0, "state-dir": str(tmp_path / "state"), "data-path": str(folder)}
    (data,) = [one for one in run_checks(scenario(), config) if one.name == "data"]
    assert not data.passed
    assert data.text == f"{folder} is not a folder (data of this board); make it, or mount its disk"
    folder.mkdir()
    drop(folder, "Cups", range(2))
    found = {one.name: one for one in run_checks(scenario(), config)}
    assert found["data"].text == f"{folder}: task 0: 0 of 100 labeled images (2 are arriving)"
    assert [name for name, one in found.items() if not one.passed] == []
    assert "frozen up to" in found["network"].text
    assert "a training step takes" in found["memory"].text


def test_doctor_says_what_the_board_has_to_allow(tmp_path: Path) -> None:
    config: dict[str, Any] = {"partition-id": 0, "state-dir": str(tmp_path / "state")}

    def data_of(chosen: Scenario) -> str:
        (found,) = [one.text for one in run_checks(chosen, config, machine=False) if one.name == "data"]
        return found

    assert "set data in device.toml" in data_of(scenario({"path": str(tmp_path)}))
    config["data-path"] = str(tmp_path)
    assert "set delete_learned = true in device.toml" in data_of(scenario({"keep": "buffer"}))
    config["delete-learned"] = True
    assert "0 of 100 labeled images" in data_of(scenario({"keep": "buffer"}))
