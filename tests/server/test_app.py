"""`flwr run`: from the run configuration to the run folder, with real devices in this process."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from PIL import Image

from lightcl.errors import RequestError
from lightcl.records import load_run
from server.app import app
from tests.inprocess import InProcessGrid

SCENARIO = """\
data: {source: image-folder}
network: {weights: none, width: 4}
stream: {tasks: 2, held_out: 0}
fleet: {devices: 2, test_data: whole}
training: {epochs: 1, batch_size: 8}
server: {connect_timeout: 0.2}
"""


def flwr_run(grid: InProcessGrid, out: Path, **config: bool | str) -> None:
    """`flwr run` with SCENARIO."""
    file = out.parent / "scenario.yaml"
    file.write_text(SCENARIO)
    app(grid, Context(1, 0, {}, RecordDict(), {"scenario": str(file), "out": str(out)} | config))


def boards(folder: Path) -> InProcessGrid:
    """Two boards, each with images of its own: four classes, ten images a class."""
    grid = InProcessGrid(folder / "state", 2)
    for node, context in grid.nodes.items():
        generator = np.random.default_rng(node)
        for label in range(4):
            images = folder / str(node) / f"class-{label}"
            images.mkdir(parents=True)
            for i in range(10):
                Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(images / f"{i}.png")
        context.node_config.update({"data-path": str(folder / str(node)), "own-data": True})
    return grid


def test_images_may_be_on_the_boards_alone_and_what_is_whole_is_not_run_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, grid = tmp_path / "run", boards(tmp_path)
    flwr_run(grid, out)
    results = (out / "results.json").read_text()
    assert json.loads(results)["devices_finished"] == 2
    own = "all images of the board"
    told = json.loads((out / "partition.json").read_text())
    assert told == [{"device": device, "train": own, "test": own} for device in (0, 1)]
    sent = len(grid.sent)
    with caplog.at_level(logging.INFO, logger="flwr"):
        flwr_run(grid, out, resume=True)
    assert "already complete" in caplog.text
    assert len(grid.sent) == sent
    assert (out / "results.json").read_text() == results


def test_who_holds_what_is_told_for_boards_with_and_without_images_of_their_own(tmp_path: Path) -> None:
    out, grid = tmp_path / "run", boards(tmp_path)
    path = grid.nodes[100].node_config["data-path"]
    grid.nodes[100].node_config["own-data"] = False
    flwr_run(grid, out, set=f"data.path={path}")
    share, own = json.loads((out / "partition.json").read_text())
    assert len(share["train"]) == 16, "half of four fifths of forty images"
    assert own == {"device": 1, "train": "all images of the board", "test": "all images of the board"}
    assert len(load_run(out).partition[0]["train"]) == 16


def test_a_freeze_point_is_not_chosen_from_images_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"network\.freeze is 'auto', .*\(data\.path is not set\)"):
        flwr_run(InProcessGrid(tmp_path / "s", 2), tmp_path / "run", set="network.freeze=auto")


def test_a_run_is_not_continued_where_the_images_have_gone_or_come(tmp_path: Path) -> None:
    """Refused before anything is sent or written."""
    grid = boards(tmp_path)
    path = str(grid.nodes[100].node_config["data-path"])
    here = f"data.path={path}"
    for name, before, now, said in (
        ("moved", here, f"data.path={tmp_path}/gone", f"began with images on the server (data.path was '{path}')"),
        ("gone", here, "", "data.path is None now, where there are none; set data.path"),
        ("come", "", here, "began without images on the server, but now there are some at"),
    ):
        out = tmp_path / name
        flwr_run(grid, out, set=before)
        (out / "results.json").unlink()
        files = {file: file.read_bytes() for file in out.rglob("*.json*")}
        sent = len(grid.sent)
        with pytest.raises(RequestError, match=re.escape(said)):
            flwr_run(grid, out, set=now, resume=True)
        assert len(grid.sent) == sent
        assert {file: file.read_bytes() for file in out.rglob("*.json*")} == files


def test_boards_with_more_classes_than_the_stream_share_a_head_of_its_size(tmp_path: Path) -> None:
    """One task of two of the boards' four classes: messages and answers are about these two."""
    out, grid = tmp_path / "run", boards(tmp_path)
    flwr_run(grid, out, set="'stream.tasks=1' 'stream.class_order=[1, 3]' 'server.aggregation=suffix+head'")
    run = load_run(out)
    assert run.results is not None
    assert run.results.devices_finished == 2
    heads = [record["fc.weight"].numpy() for m in grid.received for record in m.content.array_records.values()]
    assert {head.shape[0] for head in heads} == {2}
    assert len(heads) == 2
    assert run.results.til == run.results.cil, "with one task the head has that task's classes alone"


def test_boards_that_cut_tasks_from_their_own_classes_have_all_classes_in_the_head(tmp_path: Path) -> None:
    out, grid = tmp_path / "run", boards(tmp_path)
    flwr_run(grid, out, set="stream.tasks=1 stream.cut=own server.aggregation=suffix+head")
    heads = [record["fc.weight"].numpy() for m in grid.received for record in m.content.array_records.values()]
    assert {head.shape[0] for head in heads} == {4}


def test_a_key_without_effect_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="flwr"):
        flwr_run(boards(tmp_path), tmp_path / "run", set="fleet.alpha=0.1")
    assert "fleet.alpha: 0.1 has no effect" in caplog.text
