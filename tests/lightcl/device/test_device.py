"""A device: its order of requests, kills at any point, and the same numbers however it is run."""

import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from lightcl.data.partition import partition
from lightcl.data.sources import load_source
from lightcl.device import hardware
from lightcl.device.device import EdgeDevice, OutOfStep, Position
from lightcl.device.hardware import choose_accelerator
from lightcl.device.metering import Board, LimitReached, Limits
from lightcl.device.telemetry import Sensors
from lightcl.errors import RequestError
from lightcl.exchange.tensors import ExchangeError
from lightcl.networks.native import NativeConv3x3
from lightcl.networks.weights import save_weights
from lightcl.networks.winograd import WinogradConv2d
from lightcl.scenario import method_names
from lightcl.scenario.digest import scenario_digest
from lightcl.storage import state
from lightcl.storage.state import StateError
from tests.lightcl import toys
from tests.lightcl.storage.killed_device import HANG_IN

ROOT = Path(__file__).parents[3]


class Killed(BaseException):
    """Like SIGKILL: no code of the device runs after it."""


def everything(device: EdgeDevice) -> dict[str, torch.Tensor]:
    """All tensors of a device."""
    momentum = {
        f"momentum/{name}": device.optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in device.network.named_parameters()
        if "momentum_buffer" in device.optimizer.state.get(parameter, {})
    }
    method = {f"method/{name}": tensor for name, tensor in device.method.state_dict().items()}
    return toys.copy_of({**device.network.state_dict(), **method, **momentum})


def learn(device: EdgeDevice) -> EdgeDevice:
    """The entire stream, with a test after each task."""
    for task in range(device.position.task, len(device.stream)):
        device.train(task, device.scenario.training.epochs)
        device.evaluate()
    return device


# -- in step -------------------------------------------------------------------------------------------------------


def test_training_reports_what_it_did(tmp_path):
    device, told = toys.device(tmp_path), []
    report = device.train(0, 2, lambda *epoch: told.append(epoch))
    assert (report.task, report.epochs, report.examples) == (0, 2, 36)  # 2 classes x 20 images, 10 % held out
    assert [(task, epochs) for task, epochs, _ in told] == [(0, 1), (0, 2)]
    assert report.loss == told[-1][2]
    assert report.peak_memory_mib > 1
    assert device.position == Position(0, 2)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak to reset here")
def test_the_reported_memory_is_not_that_of_what_ran_before(tmp_path):
    """A worker of a simulation serves one device after the other."""
    np.ones(2**29, dtype=np.uint8)
    before = hardware.peak()
    assert toys.device(tmp_path).train(0, 1).peak_memory_mib * 2**20 < before - 2**28


@pytest.mark.parametrize("restarted", [False, True])
def test_the_same_request_twice_trains_once(tmp_path, restarted):
    device = toys.device(tmp_path)
    first = device.train(0, 1)
    before = everything(device)
    if restarted:
        device = toys.device(tmp_path)
    told = []
    assert device.train(0, 1, lambda *epoch: told.append(epoch)) == first
    assert told == []
    toys.assert_same(everything(device), before)


def test_a_task_in_parts_is_the_task_in_one_go(tmp_path):
    whole, parts = (toys.device(tmp_path / name, training={"epochs": 3, "momentum": 0.9}) for name in "ab")
    for task in (0, 1):
        whole.train(task, 3)
        for until in (1, 3):
            parts.train(task, until)
    toys.assert_same(everything(parts), everything(whole))


@pytest.mark.parametrize(
    ("done", "task", "until"),
    [
        ([], 1, 1),
        ([], 0, 3),
        ([], 0, 0),
        ([], -1, 1),
        ([], 2, 1),
        ([(0, 1)], 1, 1),
        ([(0, 2)], 0, 1),
        ([(0, 2), (1, 1)], 0, 2),
        ([(0, 2), (1, 2)], 2, 1),
    ],
    ids=["skips a task", "too many epochs", "no epoch", "negative task", "no such task", "unfinished task",
         "back an epoch", "back a task", "beyond the stream"],
)  # fmt: skip
def test_requests_out_of_step_are_refused_and_change_nothing(tmp_path, done, task, until):
    device = toys.device(tmp_path)
    for step in done:
        device.train(*step)
    before, position = everything(device), device.position
    with pytest.raises(OutOfStep, match=rf"task {task}, epoch {until}"):
        device.train(task, until)
    toys.assert_same(everything(device), before)
    assert device.position == position


def test_out_of_step_says_where_the_device_is(tmp_path):
    device = toys.device(tmp_path, number=7)
    device.train(0, 1)
    with pytest.raises(OutOfStep, match=r"device 7 has done 1 of 2 epochs of task 0 and cannot go to task 1, epoch 2"):
        device.train(1, 2)


def test_a_stream_is_finished_after_its_last_epoch(tmp_path):
    device = toys.device(tmp_path)
    for task, until in ((0, 2), (1, 1)):
        device.train(task, until)
        assert not device.finished
    device.train(1, 2)
    assert device.finished
    assert toys.device(tmp_path).finished


# -- evaluation ----------------------------------------------------------------------------------------------------


def test_tests_fill_the_accuracy_matrix(tmp_path):
    device = toys.device(tmp_path)
    device.train(0, 2)
    first = device.evaluate()
    device.train(1, 2)
    second = device.evaluate()
    assert (first.task, len(first.til), len(first.cil), first.images) == (0, 1, 1, [10])
    assert (second.task, len(second.til), second.images) == (1, 2, [10, 10])
    for setting in ("til", "cil"):
        values = device.matrix(setting).values
        assert values[0, :1].tolist() == getattr(first, setting)
        assert values[1].tolist() == getattr(second, setting)
        assert np.isnan(values[0, 1])
    assert np.array_equal(toys.device(tmp_path).matrix("til").values, device.matrix("til").values, equal_nan=True)


def test_a_device_may_be_tested_before_it_has_learned_and_restarted_after(tmp_path):
    device = toys.device(tmp_path)
    report = device.evaluate()
    assert report.epochs == 0
    restarted = toys.device(tmp_path)
    toys.assert_same(everything(restarted), everything(device))
    assert restarted.rows == device.rows


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("name", method_names())
def test_the_network_is_released_with_its_device(tmp_path, name, restarted):
    """Without help of the garbage collector: a worker opens a device for every message."""
    sections = {"method": {"name": name}, "training": {"epochs": 1}, "network": {"freeze": "layer2"}}
    device = learn(toys.device(tmp_path, **sections))
    if restarted:
        device = toys.device(tmp_path, **sections)
        device.evaluate()
    gc.disable()
    try:
        networks = [weakref.ref(device.network), *map(weakref.ref, getattr(device.method, "frozen", []))]
        del device
        assert [network() for network in networks] == [None] * len(networks)
    finally:
        gc.enable()


# -- killed --------------------------------------------------------------------------------------------------------

KINDS = [
    {"training": {"momentum": 0.0}},
    {"training": {"momentum": 0.9}, "method": {"reduction": "relative"}},
    {"training": {"momentum": 0.9}, "method": {"preset": "paper"}},
    {"training": {"momentum": 0.9, "weight_decay": 1e-3}, "network": {"freeze": "none"}, "method": {"beta": 1e-5}},
    {"method": {"name": "sgd"}},
]
NAMES = ["sum", "momentum, relative", "paper preset", "nothing frozen", "sgd"]


def with_checkpoints(kind: dict) -> dict:
    return kind | {"training": kind.get("training", {}) | {"epochs": 4, "checkpoint_seconds": 0.0}}


@pytest.mark.parametrize("kind", KINDS[:2], ids=NAMES[:2])
def test_sigkill_in_the_middle_of_a_task_changes_nothing_in_the_end(tmp_path, kind):
    sections = with_checkpoints(kind)
    arguments = [str(tmp_path / "killed"), json.dumps(sections)]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.lightcl.storage.killed_device", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            reported = []
            for line in process.stdout:  # ends also where the process ends too early
                if line == "hanging\n":
                    break
                reported.append(line.strip())
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert reported == ["0 1", "0 2", "0 3", "0 4", "1 1", "1 2"]

    resumed = toys.device(tmp_path / "killed", **sections)
    assert resumed.position == Position(*HANG_IN)
    report = resumed.train(1, 4)
    straight = toys.device(tmp_path / "straight", **sections)
    straight.train(0, 4)
    expected = straight.train(1, 4)
    toys.assert_same(everything(resumed), everything(straight))
    assert report.loss == expected.loss


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_death_after_any_epoch_changes_nothing_in_the_end(tmp_path, kind):
    """Like SIGKILL, but within this process, so that every epoch's end can be tried."""
    sections = with_checkpoints(kind)

    def die(*_: object, **__: object) -> None:
        raise Killed

    lives = 0
    while True:
        device = toys.device(tmp_path / "mortal", **sections)
        if device.finished:
            break
        lives += 1
        here = device.position
        with pytest.raises(Killed):
            device.train(here.task + (here.epochs == 4), 4, die if here.epochs % 4 < 3 else save_then_die(device))
    assert lives == 8
    straight = learn(toys.device(tmp_path / "straight", **sections))
    toys.assert_same(everything(device), everything(straight))


def save_then_die(device: EdgeDevice):
    """The last epoch of a task is saved only with the report, so death comes right after that save."""

    def after(*_: object) -> None:
        save = device._save

        def last_words() -> None:
            save()
            raise Killed

        device._save = last_words

    return after


def test_death_in_the_middle_of_a_save_loses_that_save_only(tmp_path, monkeypatch):
    device = toys.device(tmp_path)
    device.train(0, 1)
    before = everything(device)

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_atomically", die)
        with pytest.raises(Killed):
            device.train(0, 2)
    restarted = toys.device(tmp_path)
    assert restarted.position == Position(0, 1)
    toys.assert_same(everything(restarted), before)


def test_death_before_the_report_leaves_a_device_that_can_be_asked_again(tmp_path):
    sections = with_checkpoints({})

    def die_at_the_goal(_: int, epochs: int, __: float) -> None:
        if epochs == 2:
            raise Killed

    with pytest.raises(Killed):
        toys.device(tmp_path / "killed", **sections).train(0, 2, die_at_the_goal)
    again, straight = toys.device(tmp_path / "killed", **sections), toys.device(tmp_path / "straight", **sections)
    assert again.train(0, 2).loss == straight.train(0, 2).loss
    toys.assert_same(everything(again), everything(straight))


def test_a_long_task_is_saved_on_the_way_and_a_short_one_is_not(tmp_path):
    for seconds, saved in ((0.0, 3), (3600.0, 0)):
        folder, positions = tmp_path / str(seconds), []

        def look(*_: object, folder: Path = folder, positions: list = positions) -> None:
            positions.append(
                json.loads((folder / "state.json").read_text()) if (folder / "state.json").exists() else None
            )

        toys.device(folder, training={"epochs": 4, "checkpoint_seconds": seconds}).train(0, 4, look)
        epochs = [p["position"]["epochs"] for p in positions if p]
        assert epochs == ([1, 2, 3, 3] if saved else [])


# -- the same numbers ----------------------------------------------------------------------------------------------


def test_same_seeds_give_the_same_numbers(tmp_path):
    first = learn(toys.device(tmp_path / "a"))
    torch.manual_seed(12345)
    torch.rand(7)
    second = learn(toys.device(tmp_path / "b"))
    toys.assert_same(everything(second), everything(first))
    assert second.rows == first.rows
    assert second.last_report.loss == first.last_report.loss


@pytest.mark.parametrize("other", [{"number": 1}, {"seed": 1}])
def test_other_devices_and_other_seeds_differ(tmp_path, other):
    first, second = toys.device(tmp_path / "a"), toys.device(tmp_path / "b", **other)
    first.train(0, 1)
    second.train(0, 1)
    assert "fc.weight" in toys.changed(second.network.state_dict(), first.network.state_dict())


def test_devices_share_their_prefix(tmp_path):
    first, second = toys.device(tmp_path / "a"), toys.device(tmp_path / "b", number=1)
    first.train(0, 1)
    second.train(0, 2)
    assert first.prefix_digest == second.prefix_digest
    toys.assert_same(second.network.prefix.state_dict(), first.network.prefix.state_dict())


def test_a_device_finds_its_own_share(tmp_path):
    scenario = toys.scenario(
        fleet={"devices": 3}, data={"source": "digits", "augmentation": "auto"}, stream={"tasks": 5}
    )  # fmt: skip
    source = load_source(scenario.source_request())
    share = partition(source, scenario.fleet, scenario.seed)[2]
    device = EdgeDevice(scenario, 2, tmp_path)
    held = np.sort(np.concatenate([np.concatenate([t.train.indices, t.held_out.indices]) for t in device.stream]))
    assert np.array_equal(held, share.train)
    assert device.network.classes == 10


# -- exchange ------------------------------------------------------------------------------------------------------


def test_shared_tensors_are_taken_over_once_a_version(tmp_path):
    sections = {"server": {"aggregation": "suffix"}}
    sender, receiver = toys.device(tmp_path / "a", **sections), toys.device(tmp_path / "b", number=1, **sections)
    sender.train(0, 2)
    receiver.train(0, 2)
    head = toys.copy_of(receiver.network.head.state_dict())
    receiver.receive(sender.outgoing(), 1)
    toys.assert_same(
        {n: torch.from_numpy(a) for n, a in receiver.outgoing().items()},
        {n: torch.from_numpy(a) for n, a in sender.outgoing().items()},
    )
    toys.assert_same(receiver.network.head.state_dict(), head)

    after = everything(receiver)
    receiver.receive({name: array + 1 for name, array in sender.outgoing().items()}, 1)  # a version it already has
    toys.assert_same(everything(receiver), after)
    restarted = toys.device(tmp_path / "b", number=1, **sections)
    assert restarted.version == receiver.saved_version == 0  # they are saved with what follows
    receiver.evaluate()
    restarted = toys.device(tmp_path / "b", number=1, **sections)
    assert restarted.version == receiver.saved_version == 1
    toys.assert_same(everything(restarted), after)


def test_a_board_beyond_its_limits_keeps_what_it_received(tmp_path):
    """It backs off before it trains, and need not get the tensors again."""
    board = Board(tmp_path, Sensors(tmp_path), Limits(free_disk_mb=1e12))
    sections = {"server": {"aggregation": "suffix"}}
    arrays = toys.device(tmp_path / "a", **sections).outgoing()
    held = toys.source(size=16)
    device = EdgeDevice(
        toys.scenario(**sections), 0, tmp_path / "b", source=held, share=toys.whole(held), board=board
    )  # fmt: skip
    device.receive(arrays, 1)
    with pytest.raises(LimitReached):
        device.train(0, 2)
    assert toys.device(tmp_path / "b", **sections).version == 1


def test_bad_tensors_are_not_taken_over(tmp_path):
    device = toys.device(tmp_path, server={"aggregation": "suffix"})
    before = everything(device)
    arrays = device.outgoing() | {"layer4.0.bn1.bias": np.full(32, np.nan, dtype=np.float32)}
    with pytest.raises(ExchangeError, match=r"layer4.0.bn1.bias"):
        device.receive(arrays, 1)
    assert device.version == 0
    toys.assert_same(everything(device), before)


# -- whose state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"number": 1}, {"seed": 9}, {"training": {"learning_rate": 0.02}}])
def test_state_of_another_device_or_scenario_is_refused(tmp_path, other):
    toys.device(tmp_path).train(0, 1)
    with pytest.raises(StateError, match=r"holds the state of device 0 under another scenario; use another folder"):
        toys.device(tmp_path, **other)


def test_what_has_no_influence_on_the_numbers_may_change_between_runs(tmp_path):
    toys.device(tmp_path, data={"source": "parquet"}).train(0, 1)
    moved = toys.device(
        tmp_path,
        name="renamed",
        data={"source": "parquet", "path": tmp_path, "download": False},
        simulation={"workers": 8},
    )
    assert moved.position == Position(0, 1)


def test_state_from_another_kind_of_accelerator_is_refused(tmp_path):
    toys.device(tmp_path).train(0, 1)
    toys.edit_manifest_(tmp_path, accelerator="tpu")
    with pytest.raises(StateError, match=r"was saved on tpu .* on cpu; set device.accelerator"):
        toys.device(tmp_path, device={"accelerator": "cpu"})


def test_a_weights_file_may_move_but_not_change(tmp_path):
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    save_weights(toys.network(), here, {})
    straight = toys.device(tmp_path / "straight", network={"weights": str(here)})
    toys.device(tmp_path / "moved", network={"weights": str(here)}).train(0, 1)
    here.rename(there)
    moved = toys.device(tmp_path / "moved", network={"weights": str(there)})
    straight.train(0, 2)
    moved.train(0, 2)
    toys.assert_same(everything(moved), everything(straight))
    save_weights(toys.network(seed=1), there, {})
    with pytest.raises(StateError, match=r"was saved with another frozen prefix .* use those of the first run"):
        toys.device(tmp_path / "moved", network={"weights": str(there)})
    with pytest.raises(StateError, match="under another scenario"):
        toys.device(tmp_path / "moved")


def test_digest_changes_with_what_decides_the_numbers():
    plain = toys.scenario()
    assert scenario_digest(plain) == scenario_digest(toys.scenario())
    for change in ({"seed": 1}, {"method": {"beta": 0.02}}, {"device": {"threads": 2}}, {"data": {"crop_padding": 2}}):
        assert scenario_digest(toys.scenario(**change)) != scenario_digest(plain)


def test_damaged_state_is_an_error(tmp_path):
    toys.device(tmp_path).train(0, 1)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(StateError, match="cannot be read"):
        toys.device(tmp_path)


# -- accelerator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "there", "chosen"), [
    ("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda"),
])  # fmt: skip
def test_choice_of_accelerator(monkeypatch, wanted, there, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_accelerator(wanted).type == chosen


def test_missing_cuda_is_an_error_only_if_requested(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match=r"device.accelerator is 'cuda', but .* \(allowed: auto, cpu\)"):
        choose_accelerator("cuda")


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"memory_pass": "joint"}},
        {"device": {"convolutions": "winograd"}},
        pytest.param({"device": {"convolutions": "native"}}, marks=toys.needs_compiler),
    ],
)
def test_faster_arithmetic_learns_the_same_up_to_rounding(tmp_path, changes, monkeypatch):
    """32x32 images, for 4x4 maps in layer4."""
    for kind in (WinogradConv2d, NativeConv3x3):
        monkeypatch.setattr(kind, "fewest_channels", dict.fromkeys(kind.fewest_channels, 1))
    losses, tensors = [], []
    for number, sections in enumerate(({}, changes)):
        device = changed_device(tmp_path / str(number), sections)
        losses.append([device.train(task, 1).loss for task in (0, 1)])
        tensors.append(everything(device))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert any(not torch.equal(tensors[1][name], tensor) for name, tensor in tensors[0].items())  # it was used


def changed_device(folder, changes):
    held = toys.source(size=32)
    sections = {"method": {"name": "lightcl"}, "training": {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}}
    sections["device"] = {"accelerator": "cpu"}
    merged = {key: sections.get(key, {}) | changes.get(key, {}) for key in sections}
    return EdgeDevice(toys.scenario(**merged), 0, folder, source=held, share=toys.whole(held))
