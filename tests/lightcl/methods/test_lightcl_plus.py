"""LightCL-plus: its classifier, on one device and in a fleet."""

import shutil

import numpy as np
import pytest
import torch

from lightcl.data.partition import partition
from lightcl.data.sources import load_source
from lightcl.data.tasks import Batch
from lightcl.device.device import EdgeDevice
from lightcl.errors import RequestError
from lightcl.exchange.tensors import STATISTICS
from lightcl.methods.lightcl_plus import LightCLPlus, LightCLPlusParameters
from lightcl.methods.parts.closed_form import Statistics, discriminant_head
from lightcl.networks.resnet import StagedResNet
from lightcl.preparation import open_run
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.checkpoint import Checkpoint
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent, small
from tests.lightcl import toys

PLUS = {"name": "lightcl-plus"}


def built(network: StagedResNet | None = None, **keys) -> LightCLPlus:
    return LightCLPlusParameters(**keys).build(network or toys.network())


def describe(method: LightCLPlus, maps: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([method.pool(name, maps[name]) for name in method.maps], 1)


def test_features_are_channel_means_and_a_grid_of_the_last_map():
    method = built()  # width 4: every map of the prefix fits
    assert method.grid
    assert method.maps == method.network.prefix.map_names
    maps = {name: torch.rand(2, method.network.map_channels(name), 4, 4) for name in method.maps}
    described = describe(method, maps)
    means = torch.cat([maps[name].mean((2, 3)) for name in method.maps[:-1]], 1)
    assert torch.allclose(described[:, : means.shape[1]], means)
    corner = maps[method.maps[-1]][:, :, :2, :2].mean((2, 3))  # the first of each channel's four cells
    assert torch.allclose(described[:, means.shape[1] :: 4], corner)


def test_the_richest_features_that_fit_are_taken():
    sizes = {mb: built(statistics_mb=mb).statistics_of.total.shape[1] for mb in (2.0, 0.05, 0.02, 0.004)}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert sizes[2.0] == 4 * (4 + 8 + 16) + 3 * 16
    assert sizes[0.004] == 16


@pytest.mark.parametrize("width", [20, 64])
def test_the_statistics_stay_under_two_megabytes(width):
    network = StagedResNet(width=width)
    method = built(network)
    held = [*method.statistics_of.tensors().values(), *method.shared_head(method.statistics_of.tensors()).values()]
    assert 500_000 < sum(t.numel() * t.element_size() for t in held) <= 2_000_000


def test_too_little_memory_is_an_error_that_names_the_minimum():
    with pytest.raises(RequestError, match=r"statistics_mb is 0\.0001, but lightcl-plus needs at least 0\.00"):
        built(statistics_mb=1e-4)


@pytest.mark.parametrize("options", [{"freeze": "none"}, {"freeze": "stem"}, {"frozen_batch_norm": "train"}])
def test_a_prefix_that_changes_is_refused(options):
    with pytest.raises(RequestError, match=r"network\.freeze must be layer1\.0 or deeper"):
        built(toys.network(**options))


def test_the_papers_preset_is_refused():
    with pytest.raises(ValueError, match="drifts"):
        Scenario.model_validate({"method": {**PLUS, "preset": "paper"}})


def test_score_by_hand():
    """LDA's log-posterior and the log-softmax within the task, weighed and added."""
    method = built(suffix_weight=0.5)
    method.task_of = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[0.0, np.log(3.0), 2.0, 2.0]])
    within = method._within_tasks(logits)
    assert within.exp().tolist()[0] == pytest.approx([0.25, 0.75, 0.5, 0.5])
    method.task_of = torch.tensor([0, 0, -1, -1])
    assert method._within_tasks(logits).exp().tolist()[0] == pytest.approx([0.25, 0.75, 0.5, 0.5])


def test_the_sums_are_those_of_all_tasks_and_survive_a_restart(tmp_path):
    settings = {"method": PLUS, "training": {"epochs": 1}}
    device = toys.device(tmp_path, **settings)
    for task in range(2):
        device.train(task, 1)
    expected = Statistics.zeros(*device.method.statistics_of.total.shape)
    for task in device.stream:
        batch = task.train.load()
        maps = {}
        device.network.prefix(batch.images, maps.__setitem__)
        expected.add_(describe(device.method, maps), batch.labels)
    again = toys.device(tmp_path, **settings)
    for name, tensor in expected.tensors().items():
        assert torch.equal(again.method.statistics_of.tensors()[name], device.method.statistics_of.tensors()[name])
        torch.testing.assert_close(device.method.statistics_of.tensors()[name], tensor, rtol=1e-6, atol=1e-6)
    assert again.evaluate().cil == device.evaluate().cil


def test_the_suffix_may_move_and_the_statistics_stay_valid(tmp_path):
    device = toys.device(tmp_path, method={**PLUS, "suffix_weight": 0.0}, training={"epochs": 1})
    device.train(0, 1)
    images = device.stream[0].test.load()
    device.network.eval()
    before = device.method.predict(images)
    with torch.no_grad():
        for parameter in [*device.network.suffix.parameters(), *device.network.head.parameters()]:
            parameter.add_(1.0)
    assert torch.equal(device.method.predict(images), before)


def test_before_the_first_task_the_networks_head_predicts():
    method = built(toys.network().eval())
    images = toys.images(3)
    assert torch.equal(method.predict(Batch(images, torch.zeros(3))), method.network(images))


def test_its_cil_accuracy_exceeds_lightcls(tmp_path):
    """Digits, 5 tasks: the purpose of the classifier is accuracy with the task not known."""
    held = load_source(Scenario().source_request())
    accuracies = {}
    for name in ("lightcl", "lightcl-plus"):
        scenario = toys.scenario(
            method={"name": name}, stream={"tasks": 5}, training={"epochs": 2, "learning_rate": 0.05},
            network={"width": 8}, data={"augmentation": "none"},
        )  # fmt: skip
        device = EdgeDevice(scenario, 0, tmp_path / name, source=held, share=toys.whole(held))
        for task in range(5):
            device.train(task, 2)
        accuracies[name] = device.evaluate()
    assert np.mean(accuracies["lightcl-plus"].cil) > np.mean(accuracies["lightcl"].cil) + 0.25
    assert np.mean(accuracies["lightcl-plus"].til) >= np.mean(accuracies["lightcl"].til)


def test_a_fleet_shares_the_head_that_all_data_together_give(tmp_path):
    """Server and devices are real; each device sends the sums of its finished task and gets the fleet's head."""
    scenario = small(
        method={**PLUS, "share_statistics": True}, server={"rounds_per_task": 2, "aggregation": "suffix"},
    )  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    open_run(folder, scenario, "test", "fleet", resume=False, overwrite=False)
    grid = InProcessGrid(tmp_path / "state", nodes=3)
    listener = Silent()
    results = Coordinator(scenario, folder, "run1", listener).run(grid)
    assert listener.refusals == []
    assert results.devices_finished == 3
    source = load_source(scenario.source_request())
    shares = partition(source, scenario.fleet, scenario.seed)
    devices = [
        EdgeDevice(scenario, n, tmp_path / "state" / "run1" / f"device-{n:05d}", source=source, share=shares[n])
        for n in range(3)
    ]
    method = devices[0].method
    central = Statistics.zeros(*method.statistics_of.total.shape)
    for device in devices:
        for task in device.stream:
            batch = task.train.load()
            maps = {}
            device.network.eval()
            device.network.prefix(batch.images, maps.__setitem__)
            central.add_(describe(method, maps), batch.labels)
    expected = discriminant_head(central, method.parameters.shrinkage)
    for device in devices:
        for name, tensor in expected.tensors().items():
            given = device.method.fleet_head.tensors()[name]
            torch.testing.assert_close(given, tensor, rtol=1e-6, atol=1e-6 * float(tensor.abs().max()))
    rows = folder.devices()
    assert (tmp_path / "run" / "devices.jsonl").read_text().count("statistics") == 0
    # Statistics go up with the answer that finishes a task alone: every other round.
    up = [row.bytes_up for row in rows if row.device == 0]
    assert up[1] - up[0] == sum(t.numel() * 8 for t in central.tensors().values())


def test_sums_are_added_once_when_an_answer_is_lost_and_a_server_killed(tmp_path):
    scenario = small(method={**PLUS, "share_statistics": True})
    lost = {"count": 0}

    def drop_first(message, reply):
        lost["count"] += 1
        return None if lost["count"] == 5 else reply  # greetings are the first three

    totals = []
    for name, tamper in (("whole", None), ("lossy", drop_first)):
        folder = RunFolder(tmp_path / name)
        limited = scenario.model_copy(update={"server": scenario.server.model_copy(update={"round_timeout": 1.0})})
        open_run(folder, limited, "test", "fleet", resume=False, overwrite=False)
        listener = Silent()
        Coordinator(limited, folder, name, listener).run(InProcessGrid(tmp_path / "state", nodes=3, tamper=tamper))
        assert len(listener.refusals) == (tamper is not None)
        saved = Checkpoint(folder.path / "server").load()  # as after a kill: all comes from disk
        totals.append({name: tensor for name, tensor in saved.tensors.items() if name.startswith(STATISTICS)})
    assert totals[0]["statistics/count"].sum() > 0
    for key, total in totals[0].items():
        np.testing.assert_allclose(totals[1][key], total, rtol=1e-12)


def test_a_device_that_lost_its_state_is_not_summed_twice(tmp_path):
    """After its first task a device's disk is wiped: it learns both tasks again, and the sums are still right."""
    scenario = small(method={**PLUS, "share_statistics": True})
    totals = []
    for name, wiped in (("whole", False), ("wiped", True)):
        folder = RunFolder(tmp_path / name)
        open_run(folder, scenario, "test", "fleet", resume=False, overwrite=False)
        tested = []

        def wipe(message, reply, name=name, wiped=wiped, tested=tested):
            if message.metadata.message_type == "evaluate":
                tested.append(message)
                if wiped and len(tested) == 3:  # all three have been tested on their first task
                    shutil.rmtree(tmp_path / f"state-{name}" / name / "device-00001")
            return reply

        listener = Silent()
        coordinator = Coordinator(scenario, folder, name, listener)
        coordinator.run(InProcessGrid(tmp_path / f"state-{name}", nodes=3, tamper=wipe))
        assert any(device == 1 and "has version 0" in reason for device, reason in listener.refusals) == wiped
        totals.append(coordinator.aggregator.sums)
    for key, total in totals[0].items():
        np.testing.assert_allclose(totals[1][key], total, rtol=1e-12)


def test_devices_that_finish_early_get_the_last_head_too(tmp_path):
    """One device per round: the first to finish has a head without the others' last sums, until it is tested again."""
    scenario = small(method={**PLUS, "share_statistics": True}, server={"fraction": 0.34})
    folder = RunFolder(tmp_path / "run")
    open_run(folder, scenario, "test", "fleet", resume=False, overwrite=False)
    coordinator = Coordinator(scenario, folder, "run1", Silent())
    coordinator.run(InProcessGrid(tmp_path / "state", nodes=3))
    assert {entry.version for entry in coordinator.ledger.entries} == {coordinator.aggregator.version}
    weights = []
    for n in range(3):
        device = EdgeDevice(scenario, n, tmp_path / "state" / "run1" / f"device-{n:05d}")
        weights.append(device.method.fleet_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    last = folder.rounds()[-1]
    assert (last.round, last.devices, last.loss) == (7, 2, None)
