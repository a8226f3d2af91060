"""Pre-training: it learns, a killed run continues with the same numbers, and the card is correct."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lightcl.data.sources import ImageSet, Source
from lightcl.device.training import TrainingFailure
from lightcl.errors import RequestError
from lightcl.networks.resnet import StagedResNet
from lightcl.networks.weights import load_weights, read_weights
from lightcl.pretraining import EpochReport, Recipe, pretrain, top1
from tests.lightcl import toys

RECIPE = Recipe(width=4, epochs=3, batch_size=16, bf16=False, flip=False)


class Killed(BaseException):
    """Like SIGKILL."""


def run(file: Path, recipe: Recipe = RECIPE, report=lambda _: None) -> float:
    return pretrain(toys.source(), recipe, file, data="toy pictures", command="lightcl pretrain ...", report=report)


def colored(labels: list[int], seed: int) -> ImageSet:
    """Noisy red, green, blue and gray pictures: cropping and flipping do not change their class."""
    colors = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [120, 120, 120]])
    noise = np.random.default_rng(seed).integers(-40, 41, (len(labels), 8, 8, 3))
    images = (colors[labels][:, None, None] + noise).astype(np.uint8)
    return ImageSet(images, np.asarray(labels), ("red", "green", "blue", "gray"))


def test_every_epoch_is_reported_and_colors_are_learned(tmp_path):
    told: list[EpochReport] = []
    recipe = Recipe(width=4, epochs=8, batch_size=16, bf16=False)
    source = Source(colored([0, 1, 2, 3] * 20, 0), colored([0, 1, 2, 3] * 5, 1))
    accuracy = pretrain(source, recipe, tmp_path / "w.safetensors", data="", command="", report=told.append)
    assert [(r.epoch, r.epochs) for r in told] == [(n, 8) for n in range(1, 9)]
    assert told[-1].loss < 0.7 * told[0].loss
    assert accuracy > 0.6  # four classes: chance is 0.25


def test_the_reported_accuracy_is_that_of_the_network_in_the_file(tmp_path):
    file = tmp_path / "sub" / "w.safetensors"
    accuracy = run(file)
    network = StagedResNet(width=4, classes=4)
    load_weights(network, file, head=True)
    assert top1(network, toys.source().test, bf16=False) == accuracy
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    assert (metadata["data"], metadata["classes"], metadata["width"]) == ("toy pictures", "4", "4")


def test_the_card_is_written_beside_the_file(tmp_path):
    accuracy = run(tmp_path / "w.safetensors")
    card = (tmp_path / "w.md").read_text()
    assert f"accuracy on the test split, with the stored fp16 weights: **{accuracy:.2%}**" in card
    for fact in ("toy pictures", "`lightcl pretrain ...`", "ResNet-18 of width 4", "80 training and 20 test", "8x8"):
        assert fact in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.md", "w.safetensors"]


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_killed_run_continues_to_the_same_weights(tmp_path, finished):
    def die(report: EpochReport) -> None:
        if report.epoch == finished:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed.safetensors", report=die)
    assert not (tmp_path / "killed.safetensors").exists()
    told: list[EpochReport] = []
    resumed = run(tmp_path / "killed.safetensors", report=told.append)
    assert [r.epoch for r in told] == list(range(finished + 1, 4))
    assert resumed == run(tmp_path / "straight.safetensors")
    toys.assert_same(read_weights(tmp_path / "killed.safetensors"), read_weights(tmp_path / "straight.safetensors"))


def test_weights_are_a_function_of_the_seed(tmp_path):
    run(tmp_path / "a.safetensors")
    torch.rand(3)
    run(tmp_path / "b.safetensors")
    run(tmp_path / "c.safetensors", Recipe(width=4, epochs=3, batch_size=16, bf16=False, flip=False, seed=1))
    first, second, other = (read_weights(tmp_path / f"{name}.safetensors") for name in "abc")
    toys.assert_same(second, first)
    assert "conv1.weight" in toys.changed(other, first)


def test_bf16_trains_too(tmp_path):
    told: list[EpochReport] = []
    run(tmp_path / "w.safetensors", Recipe(width=4, epochs=1, batch_size=16), told.append)
    assert np.isfinite(told[0].loss)
    assert all(torch.isfinite(tensor).all() for tensor in read_weights(tmp_path / "w.safetensors").values())


def test_requests_that_cannot_be_carried_out_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"--out: .*w.pt should end in .safetensors"):
        run(tmp_path / "w.pt")
    with pytest.raises(RequestError, match=r"80 training images are fewer than one batch of 81"):
        run(tmp_path / "w.safetensors", Recipe(width=4, batch_size=81))


@pytest.mark.parametrize(
    ("place", "message"),
    [("file/w.safetensors", "cannot be written to"), ("sub.safetensors", "is a folder, not a file")],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_learned(tmp_path, place, message):
    (tmp_path / "file").touch()
    (tmp_path / "sub.safetensors").mkdir()
    told: list[EpochReport] = []
    with pytest.raises(RequestError, match=rf"--out: {tmp_path / place} {message}"):
        run(tmp_path / place, report=told.append)
    assert told == []


def test_a_loss_that_is_no_longer_finite_ends_it_without_weights(tmp_path):
    with pytest.raises(TrainingFailure, match="epoch 1: the loss is no longer finite"):
        run(tmp_path / "w.safetensors", Recipe(width=4, epochs=2, batch_size=16, bf16=False, peak_learning_rate=1e30))
    assert list(tmp_path.iterdir()) == []


def test_top1_by_hand():
    network = toys.network(classes=3)
    with torch.no_grad():
        network.fc.weight.zero_()
        network.fc.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))  # always says 1
    labels = np.array([1, 0, 1, 2])
    images = ImageSet(np.zeros((4, 8, 8, 3), np.uint8), labels, ("a", "b", "c"))
    assert top1(network, images, bf16=False) == 0.5
