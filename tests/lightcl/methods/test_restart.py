"""A method that is restored after any epoch, or between any two steps, continues with the same numbers."""

import pytest

from lightcl.device.device import EdgeDevice
from lightcl.device.metering import Board, LimitReached
from lightcl.device.telemetry import Sensors
from tests.lightcl import toys
from tests.lightcl.device.test_device import everything

SPARSE = {"sparsity": 0.8, "interval": 1, "intra_task": 0.05, "inter_task": 0.05, "buffer_size": 5}
METHODS = [
    {"name": "er", "buffer_size": 5, "minibatch_size": 3},
    {"name": "er", "buffer_size": 5, "loss_classes": "task"},
    {"name": "derpp", "buffer_size": 5, "minibatch_size": 3},
    {"name": "fdr", "buffer_size": 5, "minibatch_size": 3},
    {"name": "ewc", "fisher_samples": 3},
    {"name": "pnn"},
    {"name": "sparcl-er", **SPARSE},
    {"name": "sparcl-derpp", **SPARSE},
    {"name": "lightcl", "memory_size": 5},
    {"name": "lightcl-sparse", "memory_size": 5},
    {"name": "lightcl-plus", "memory_size": 5},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(str(v) for v in m.values() if isinstance(v, str)))
def test_restored_after_every_epoch(tmp_path, method):
    sections = {"method": method, "training": {"epochs": 3, "momentum": 0.9}, "network": {"freeze": "layer2"}}
    straight = toys.device(tmp_path / "straight", **sections)
    for task in (0, 1):
        straight.train(task, 3)
        straight.evaluate()
        for epochs in (1, 2, 3):
            killed = toys.device(tmp_path / "killed", **sections)  # nothing but the state on disk is left
            report = killed.train(task, epochs)
        killed.evaluate()
        assert report.loss == straight.last_report.loss
    toys.assert_same(everything(killed), everything(straight))
    assert killed.rows == straight.rows
    assert killed.method.state_dict()


class Hot:
    """Limits that end a training at every fourth question, which comes before its fourth step."""

    temperature_c = free_disk_mb = battery_percent = None

    def __init__(self):
        self.asked = 0

    def crossed(self, condition, *, again=False):
        self.asked += 1
        return LimitReached("it is hot", 1.0) if self.asked % 4 == 0 else None


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(str(v) for v in m.values() if isinstance(v, str)))
def test_restored_between_steps(tmp_path, method):
    """A board that backs off in the middle of an epoch continues there, whatever its method."""
    sections = {"method": method, "training": {"epochs": 3, "momentum": 0.9}, "network": {"freeze": "layer2"}}
    straight = toys.device(tmp_path / "straight", **sections)
    paused = 0
    for task in (0, 1):
        straight.train(task, 3)
        straight.evaluate()
        while True:
            board = Board(tmp_path, Sensors(tmp_path), Hot())
            device = toys.device(tmp_path / "hot", board=board, **sections)
            try:
                report = device.train(task, 3)
                break
            except LimitReached:
                paused += 1
        device.evaluate()
        assert report.loss == straight.last_report.loss
    assert paused >= 6
    toys.assert_same(everything(device), everything(straight))
    assert device.rows == straight.rows


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("name", ["lightcl", "pnn"])  # pnn trains adapters that are no part of the network
def test_restored_with_another_optimizer(tmp_path, name, optimizer):
    training = {"epochs": 3, "optimizer": optimizer, "learning_rate": 0.002, "weight_decay": 0.1}
    sections = {"method": {"name": name}, "training": training, "network": {"freeze": "layer3"}}
    straight = toys.device(tmp_path / "straight", **sections)
    for task in (0, 1):
        straight.train(task, 3)
        for epochs in (1, 2, 3):
            killed = toys.device(tmp_path / "killed", **sections)
            killed.evaluate()  # saves values without tensors
            report = killed.train(task, epochs)
        assert report.loss == straight.last_report.loss
    toys.assert_same(everything(killed), everything(straight))
    given, expected = (device.optimizer.state_dict() for device in (killed, straight))
    assert given["param_groups"] == expected["param_groups"]
    for index, entries in expected["state"].items():
        assert int(entries["step"]) == 3 * -(-36 // 8)  # of one task: an optimizer starts anew with every task
        toys.assert_same(given["state"][index], entries)


def test_restored_where_the_head_alone_is_trained(tmp_path):
    """The stored prefix outputs are then averaged directly; smaller maps would hide their memory format."""
    held = toys.source(size=32)
    scenario = toys.scenario(
        network={"freeze": "layer4", "width": 16},
        method={"name": "lightcl", "reduction": "relative", "beta": 1.0},
        training={"epochs": 3, "momentum": 0.9},
    )

    def opened(name):
        return EdgeDevice(scenario, 0, tmp_path / name, source=held, share=toys.whole(held))

    straight = opened("straight")
    for task in (0, 1):
        straight.train(task, 3)
        for epochs in (1, 2, 3):
            killed = opened("killed")
            report = killed.train(task, epochs)
    assert report.loss == straight.last_report.loss
    toys.assert_same(everything(killed), everything(straight))
