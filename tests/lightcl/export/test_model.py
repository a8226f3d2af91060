"""Models are found in every kind of folder, and read while a device saves."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightcl.data.sources import load_source
from lightcl.device.device import EdgeDevice
from lightcl.errors import RequestError
from lightcl.export.folders import find_model
from lightcl.export.model import DESCRIPTION, Description, read_model
from lightcl.preparation import open_run
from lightcl.records.folder import RunFolder
from lightcl.storage.shared import SharedVersions
from lightcl.storage.state import MANIFEST, StateError, StateFolder
from tests.lightcl.export.trained import describe, scenario, train
from tests.lightcl.toys import edit_manifest_


def test_the_model_answers_as_the_device(tmp_path: Path) -> None:
    device = train(scenario(), tmp_path / "state")
    place = find_model(tmp_path / "state")
    model = read_model(*place)
    assert model.label == "task 1, epoch 1 of 1"
    assert model.version_values == {"device": 0, "task": 1, "epochs": 1, "shared": 0, "finished": True}
    test = load_source(scenario().source_request()).test
    images = np.asarray(test.images[:70])  # more than one batch
    device.network.eval()
    with torch.no_grad():
        expected = device.network(torch.from_numpy(images.copy()).permute(0, 3, 1, 2)).softmax(1).numpy()
    assert np.allclose(model.scores(images), expected, atol=1e-6)
    assert model.scores(images[:0]).shape == (0, 10)


def test_an_image_file_becomes_what_the_source_would_have_made_of_it(tmp_path: Path) -> None:
    train(scenario(data={"image_size": 16}), tmp_path / "state", tasks=1)
    model = read_model(*find_model(tmp_path / "state"))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    expected = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR).convert("L")
    found = model.read_image(str(tmp_path / "photo.png"), "photo.png")
    assert np.array_equal(found[..., 0], np.asarray(expected))
    assert np.array_equal(model.read_image((tmp_path / "photo.png").read_bytes(), "body"), found)
    with pytest.raises(RequestError, match="the body: the image does not decode"):
        model.read_image(b"text", "the body")
    with pytest.raises(RequestError, match=r"^nosuch\.png: there is no such file$"):
        model.read_image(str(tmp_path / "nosuch.png"), "nosuch.png")
    with pytest.raises(RequestError, match=r"^folder: cannot be read \(Is a directory\)$"):
        model.read_image(str(tmp_path), "folder")


def test_a_board_with_several_runs_gives_the_newest_and_a_device_by_its_number(tmp_path: Path) -> None:
    for run, tasks in (("old", 1), ("new", 2)):
        train(scenario(), tmp_path / run / "device-00000", tasks)
    assert find_model(tmp_path).folder == tmp_path / "new" / "device-00000"
    assert find_model(tmp_path, 0).about.device == 0
    with pytest.raises(RequestError, match="no model of device 3 is here"):
        find_model(tmp_path, 3)
    with pytest.raises(RequestError, match="no model is here; name a run folder, or the state folder of a board"):
        find_model(tmp_path / "nowhere")


def test_what_a_run_folder_without_a_state_says(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    wanted = scenario(simulation={"keep_states": "none"}, fleet={"devices": 3, "test_data": "whole"})
    open_run(run, wanted, "lightcl simulate", "fleet", resume=False, overwrite=False)
    with pytest.raises(RequestError, match=r"no state of device 1: the scenario has simulation.keep_states: none"):
        find_model(run.path, 1)
    with pytest.raises(RequestError, match=r"--device 3: the run .* has no such device .allowed: 0 to 2."):
        find_model(run.path, 3)
    kept = RunFolder(tmp_path / "kept")
    open_run(kept, scenario(), "lightcl train", "device 0", resume=False, overwrite=False)
    with pytest.raises(RequestError, match="keep their states themselves; use `lightcl export` on the board"):
        find_model(kept.path)
    train(scenario(), kept.path / "devices" / "device-00000", tasks=1)
    assert read_model(*find_model(kept.path)).position.task == 0
    with pytest.raises(RequestError, match=r"--device 1: .*allowed: 0, which this run trained alone"):
        find_model(kept.path, 1)


def test_a_device_that_has_trained_nothing_has_no_model(tmp_path: Path) -> None:
    train(scenario(), tmp_path, tasks=0)
    with pytest.raises(RequestError, match="device 0 has trained nothing yet"):
        read_model(*find_model(tmp_path))


def test_a_method_that_must_know_the_task_has_no_model(tmp_path: Path) -> None:
    train(scenario("pnn"), tmp_path, tasks=1)
    with pytest.raises(RequestError, match="method pnn answers only where the task of an image is known"):
        read_model(*find_model(tmp_path))


def test_a_state_of_another_scenario_is_refused(tmp_path: Path) -> None:
    train(scenario(), tmp_path, tasks=1)
    (tmp_path / DESCRIPTION).unlink()
    source = load_source(scenario().source_request())
    other = scenario(training={"epochs": 1, "batch_size": 32, "learning_rate": 0.1})
    Description.of(other, 0, source, range(10)).write(tmp_path)
    with pytest.raises(StateError, match=r"the state's scenario is .* it belongs to another run"):
        read_model(*find_model(tmp_path))
    (tmp_path / DESCRIPTION).write_text("{}")
    with pytest.raises(RequestError, match="not the description of a model"):
        find_model(tmp_path)


def test_a_state_whose_shared_tensors_are_replaced_has_no_model(tmp_path: Path) -> None:
    """A device of a simulation that did not take part in the last rounds."""
    shared = scenario(server={"aggregation": "suffix"})
    device = EdgeDevice(shared, 0, tmp_path / "state", shared=SharedVersions(tmp_path / "shared"), durable=False)
    device.train(0, 1)
    device.receive(device.outgoing(), version=1)
    device.save_received()
    describe(device)
    assert read_model(*find_model(tmp_path / "state")).version == 1
    (tmp_path / "shared" / "version-1.safetensors").unlink()
    with pytest.raises(StateError, match=r"version-1.safetensors\), and a newer version has replaced them"):
        read_model(*find_model(tmp_path / "state"))


def test_a_checkpoint_in_the_middle_of_a_task_gives_way_to_the_finished_state_before_it(tmp_path: Path) -> None:
    device = train(scenario(), tmp_path, tasks=1)
    device._save()  # both generations are at the end of task 0
    edit_manifest_(tmp_path, position={"task": 1, "epochs": 0})
    assert read_model(*find_model(tmp_path)).position.task == 0
    (tmp_path / "state.previous.json").unlink()
    model = read_model(*find_model(tmp_path))  # nothing better is there
    assert model.label == "task 1, epoch 0 of 1, in training"
    assert not model.version_values["finished"]


def test_every_model_that_is_read_while_a_device_saves_is_whole(tmp_path: Path) -> None:
    """Save number k writes k into the head's bias and into the version: a mixture of two saves would show."""
    device = train(scenario(), tmp_path, tasks=1)
    describe(device)
    place = find_model(tmp_path)

    def save() -> None:
        for number in range(1, 41):
            with torch.no_grad():
                device.network.fc.bias.fill_(number)
            device.version = number
            device._save()

    writer = threading.Thread(target=save)
    with torch.no_grad():
        device.network.fc.bias.zero_()
    device._save()
    writer.start()
    seen = set()
    while writer.is_alive():
        try:
            model = read_model(*place)
        except StateError:  # two saves passed between reading the manifest and its file: nothing wrong was read
            continue
        assert (model.network.fc.bias == model.version).all()
        seen.add(model.version)
    writer.join()
    assert read_model(*place).version == 40
    assert len(seen) > 1


def test_reading_changes_nothing(tmp_path: Path) -> None:
    train(scenario(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    read_model(*find_model(tmp_path))
    assert StateFolder(tmp_path).load_previous() is not None
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert MANIFEST in before
