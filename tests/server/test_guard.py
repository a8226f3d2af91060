"""What accepted replies may do to the shared model: by hand, and in runs with one hostile device of three."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from benchmarks.gauntlet import Change, shifted, wider
from lightcl.assembly import build_network
from lightcl.exchange.section import Guard
from lightcl.preparation import prepare
from lightcl.records import load_run
from lightcl.records.folder import EVENTS, RunFolder
from lightcl.scenario import Scenario, Server
from server.aggregation import Contribution, contribution
from server.aggregation.guard import Directions, UpdateGuard, _products
from server.aggregation.robust import lower_median
from server.aggregation.statistics import ClassSums
from server.ledger import KnownImages
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent, small

WEIGHT = "layer4.0.conv1.weight"
VARIANCE, MEAN = "layer4.0.bn1.running_var", "layer4.0.bn1.running_mean"


# -- weights, by hand ----------------------------------------------------------------------------------------------


@pytest.fixture
def sent(tmp_path: Path) -> Message:
    """The instruction that replies answer."""
    InProcessGrid(tmp_path, 1)
    message = Message(content=RecordDict(), dst_node_id=100, message_type="train")
    message.metadata.__dict__["_message_id"] = "sent"
    return message


def replied(
    sent: Message, *updates: float, examples: tuple[float, ...] = (), model: float = 100.0
) -> list[Contribution]:
    """One device per update, which it adds to a model of one weight."""
    weights = examples or (1.0,) * len(updates)
    return [
        contribution(sent, {WEIGHT: np.array([model + update], np.float32)}, weight, device)
        for device, (update, weight) in enumerate(zip(updates, weights, strict=True))
    ]


def checked(guard: UpdateGuard, given: list[Contribution]) -> tuple[list[float], dict[int, str]]:
    """The updates of the devices that are left, and who is refused."""
    kept, refused = guard.check(given, {WEIGHT: np.array([100], np.float32)}, 7)
    values = [item.reply.content.array_records["arrays"][WEIGHT].numpy() for item in kept if item.reply]
    return [float(value[0]) - 100 for value in values], refused


def test_the_median_of_an_even_number_is_the_smaller_one() -> None:
    assert [lower_median(values) for values in ([5.0], [1.0, 9.0], [9.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0])] == [
        5,
        1,
        2,
        2,
    ]


def test_an_update_of_more_than_twice_the_median_is_cut_to_the_median(sent: Message) -> None:
    warnings: list[str] = []
    guard = UpdateGuard("clip", 8, warnings.append)
    assert checked(guard, replied(sent, 1.0, 2.0, 4.0)) == ([1.0, 2.0, 4.0], {})
    assert warnings == []
    assert checked(guard, replied(sent, 1.0, 2.0, 60.0)) == ([1.0, 2.0, 2.0], {})
    assert checked(guard, replied(sent, 1.0, 2.0, 61.0)) == ([1.0, 2.0], {}), "beyond 30 times it is left out"
    assert checked(guard, replied(sent, 1.0, 2.0, 3e38))[0] == [1.0, 2.0], "squares overflow in fp32"
    assert warnings[0] == "round 7: server.guard: device 2: its update has norm 60, the usual is 2; clipped"
    assert warnings[1] == "round 7: server.guard: device 2: its update has norm 61, the usual is 2; left out"
    assert len(warnings) == 3


def test_a_reply_is_refused_where_the_scenario_says_so(sent: Message) -> None:
    kept, refused = checked(UpdateGuard("refuse", 8, print), replied(sent, 1.0, 5.0, 2.0))
    assert kept == [1.0, 2.0]
    assert refused == {1: "server.guard: its update has norm 5, the usual is 2"}
    assert checked(UpdateGuard("off", 8, print), replied(sent, 1.0, 2.0, 1e6)) == ([1.0, 2.0, 1e6], {})


def test_more_steps_and_a_small_share_allow_a_longer_update(sent: Message) -> None:
    guard = UpdateGuard("clip", 10, print)
    # 1, 1 and 4 steps of 10 images. The median pace is 1 a step, so 4 are usual for device 2.
    assert checked(guard, replied(sent, 1.0, 1.0, 8.0, examples=(10, 10, 40)))[0] == [1.0, 1.0, 8.0]
    assert checked(guard, replied(sent, 1.0, 1.0, 9.0, examples=(10, 10, 40)))[0] == [1.0, 1.0, 4.0]
    # Device 2 has 1 of 15 examples, where an equal share were 5: its update counts for a fifth.
    assert checked(guard, replied(sent, 1.0, 1.0, 10.0, examples=(7, 7, 1)))[0] == [1.0, 1.0, 10.0]
    assert checked(guard, replied(sent, 1.0, 1.0, 11.0, examples=(7, 7, 1)))[0] == [1.0, 1.0, 5.0]


def test_an_update_of_a_thousandth_of_the_model_is_never_too_long(sent: Message) -> None:
    guard = UpdateGuard("clip", 8, print)
    assert checked(guard, replied(sent, 0.0, 0.0, 0.09375))[0] == [0.0, 0.0, 0.09375]
    assert checked(guard, replied(sent, 0.0, 0.0, 2.0))[0] == [0.0, 0.0, 0.0]


def test_two_devices_are_held_against_earlier_rounds(sent: Message) -> None:
    guard = UpdateGuard("clip", 8, print)
    assert checked(guard, replied(sent, 1.0, 5.0))[0] == [1.0, 1.0], "more than four times the smaller one"
    for _ in range(3):
        checked(guard, replied(sent, 2.0, 2.0, 2.0))
    assert checked(guard, replied(sent, 8.0))[0] == [8.0]
    assert checked(guard, replied(sent, 9.0))[0] == [2.0], "one alone: the longest before, where 8 counted as 2"
    again = UpdateGuard("clip", 8, print)
    again.restore_(guard.state())
    assert checked(again, replied(sent, 9.0))[0] == [2.0], "a resumed run remembers"
    assert checked(again, replied(sent, 50.0, 60.0))[0] == [50.0, 60.0], "two that agree, as where a task begins"
    assert checked(again, replied(sent, 1.0, 60.0))[0] == [1.0, 2.0], "one of two"
    assert checked(UpdateGuard("clip", 8, print), replied(sent, 1e3))[0] == [100.0], "nothing but the model"


def directions(sent: Message, *updates: list[float]) -> list[Contribution]:
    """Devices with these updates of a model of zeros."""
    weights = [{WEIGHT: np.array(update, np.float32)} for update in updates]
    return [contribution(sent, arrays, 1.0, device) for device, arrays in enumerate(weights)]


def test_an_update_against_all_others_is_left_out_where_they_agree(sent: Message) -> None:
    model = {WEIGHT: np.zeros(2, np.float32)}
    warnings: list[str] = []
    given = directions(sent, [1.0, 0.2], [-1.0, 0.0], [1.0, -0.2])
    kept, refused = UpdateGuard("clip", 8, warnings.append).check(given, model, 2)
    assert refused == {}
    assert [item.reply is not None for item in kept] == [True, False, True]
    assert warnings == [
        "round 2: server.guard: device 1: its update is against those of all others, which agree; left out"
    ]
    kept, refused = UpdateGuard("refuse", 8, print).check(given, model, 2)
    assert ([item.device for item in kept], set(refused)) == ([0, 2], {1})
    two = directions(sent, [1.0, 0.2], [-1.0, 0.0])
    unlike = directions(sent, [1.0, 0.0], [-1.0, 0.1], [0.1, 1.0])  # different classes
    for honest in (two, unlike, directions(sent, [1.0, 0.2], [0.0, 1.0], [1.0, -0.2])):
        assert UpdateGuard("clip", 8, pytest.fail).check(honest, model, 2) == (honest, {})


def test_what_two_updates_have_in_common() -> None:
    """Two tensors of 8 and 50 values; the products are those of the updates in each."""
    first = [[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]  # cos² = 1/4; the third device has not moved
    second = [[1.0, 0.0, 3.0], [0.0, 9.0, 9.0], [3.0, 9.0, 25.0]]  # cos² = 0, 9/25 and 9/25
    found = Directions.of(np.array([first, second]), np.array([8, 50]))
    assert np.allclose(found.common[[0, 0, 1], [1, 2, 2]], [(8 / 4 + 0) / 2, 50 * 9 / 25, 50 * 9 / 25])
    assert np.allclose(found.cosines[[0, 0, 1], [1, 2, 2]], [1 / 50**0.5, 3 / 125**0.5, 9 / 250**0.5])
    still = Directions.of(np.zeros((1, 3, 3)), np.array([8]))
    assert np.isinf(still.common).all(), "no device has moved"
    assert still.outliers() == {}


def common(*pairs: tuple[int, int, float], devices: int = 3) -> np.ndarray:
    """r, symmetric, 1 between the pairs that are not named."""
    found = np.ones((devices, devices))
    for one, other, value in pairs:
        found[one, other] = found[other, one] = value
    return found


def test_an_update_that_has_nothing_in_common_with_others_is_left_out_where_these_have() -> None:
    def left_out(*pairs: tuple[int, int, float], devices: int = 3) -> set[int]:
        return set(Directions(np.zeros((devices, devices)), common(*pairs, devices=devices)).outliers())

    assert left_out((0, 2, 101.0)) == {1}
    assert left_out((0, 2, 99.0)) == set(), "perhaps everybody is noise"
    assert left_out((0, 2, 1000.0), (0, 1, 2.5)) == set(), "it has something in common with device 0"
    assert left_out((0, 1, 200.0), (2, 3, 200.0), devices=5) == {4}, "each of the others has a relative"
    assert left_out((0, 1, 200.0), devices=5) == set()


def test_noise_is_left_out(sent: Message) -> None:
    """Honest updates here have a tenth of their squared norm in common; their cosines are about 0.1."""
    draw = np.random.default_rng(0)
    names = [f"layer4.0.conv{number}.weight" for number in range(10)]
    model = {name: np.zeros((200, 100), np.float32) for name in names}
    shared = {name: draw.normal(size=(200, 100)) for name in names}

    def update(share: float) -> dict[str, np.ndarray]:
        return {n: (share * shared[n] + draw.normal(size=(200, 100))).astype(np.float32) for n in names}

    given = [contribution(sent, update(share), 20.0, device) for device, share in enumerate([0.33, 0.33, 0.0, 0.33])]
    warnings: list[str] = []
    kept, _ = UpdateGuard("clip", 8, warnings.append).check(given, model, 2)
    assert [item.reply is not None for item in kept] == [True, True, False, True]
    assert warnings == [
        "round 2: server.guard: device 2: its update has nothing in common with any other, as noise has not; left out"
    ]
    honest = [item for item in given if item.device != 2]
    assert UpdateGuard("clip", 8, pytest.fail).check(honest, model, 2) == (honest, {})
    noise = [contribution(sent, update(0.0), 20.0, device) for device in range(3)]
    assert UpdateGuard("clip", 8, pytest.fail).check(noise, model, 2) == (noise, {}), "no device knows better"
    alone = [given[0], *noise[:2]]
    assert UpdateGuard("clip", 8, pytest.fail).check(alone, model, 2) == (alone, {})


def test_products_of_updates_are_those_of_whole_arrays(sent: Message) -> None:
    """Against NumPy on entire tensors: tensors beyond one block, of Fortran's order, and beyond fp32's squares."""
    draw = np.random.default_rng(0)
    shapes = {"layer4.0.conv1.weight": (200, 300), "layer4.0.conv2.weight": (3, 2), "linear.bias": (7,)}
    model = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    sizes = [1.0, 1e-3, 1e25]
    replies = [
        {n: np.asfortranarray(w + size * draw.normal(size=w.shape).astype(np.float32)) for n, w in model.items()}
        for size in sizes
    ]
    assert all(array.dtype == np.float32 for reply in replies for array in reply.values())
    found = _products([contribution(sent, reply, 1.0, device) for device, reply in enumerate(replies)], model)
    for product, name in zip(found, sorted(shapes), strict=True):
        updates = np.stack([(reply[name] - model[name]).ravel() for reply in replies]).astype(np.float64)
        lengths = np.sqrt((updates**2).sum(axis=1))
        assert np.allclose(
            product / np.outer(lengths, lengths), updates @ updates.T / np.outer(lengths, lengths), atol=1e-5
        )


def batch_norm(sent: Message, *statistics: tuple[float, float]) -> tuple[list[Contribution], dict[str, np.ndarray]]:
    """Devices with these (mean, variance), after a model of mean 0 and variance 1."""

    def arrays(mean: float, variance: float) -> dict[str, np.ndarray]:
        values = {WEIGHT: 1.0, MEAN: mean, VARIANCE: variance}
        return {name: np.full(4, value, np.float32) for name, value in values.items()}

    given = [contribution(sent, arrays(*item), 1.0, device) for device, item in enumerate(statistics)]
    return given, arrays(0.0, 1.0)


@pytest.mark.parametrize("strange", [(0.0, 1e30), (0.0, 12.0), (1e30, 1.0), (-20.0, 1.0)])
def test_strange_batch_norm_statistics_are_left_out(sent: Message, strange: tuple[float, float]) -> None:
    warnings: list[str] = []
    given, model = batch_norm(sent, (0.5, 0.9), strange, (0.4, 1.1))
    kept, refused = UpdateGuard("clip", 8, warnings.append).check(given, model, 1)
    assert refused == {}
    assert [sorted(item.batch_norm) for item in kept] == [[MEAN, VARIANCE], [], [MEAN, VARIANCE]]
    assert "device 1: layer4.0.bn1.running_" in warnings[0]
    kept, refused = UpdateGuard("refuse", 8, print).check(given, model, 1)
    assert [item.device for item in kept] == [0, 2]
    assert set(refused) == {1}


def statistics(items: list[Contribution]) -> list[tuple[float, float]]:
    """Mean and variance of the devices' first channel."""
    return [(float(item.batch_norm[MEAN][0]), float(item.batch_norm[VARIANCE][0])) for item in items]


def test_statistics_of_more_than_twice_the_usual_shift_are_left_out(sent: Message) -> None:
    """The last model has mean 0 and variance 1, so that a mean is its shift and so is a standard deviation, less 1."""
    warnings: list[str] = []
    guard = UpdateGuard("clip", 8, warnings.append)
    given, model = batch_norm(sent, (0.3, 1.0), (-0.4, 1.0), (0.8, 1.0))
    assert guard.check(given, model, 1) == (given, {}), "0.8 is twice the median"
    assert warnings == []
    given, model = batch_norm(sent, (0.3, 1.0), (-0.4, 1.0), (3.0, 1.0))
    kept, refused = guard.check(given, model, 1)
    assert refused == {}
    assert [item.device for item in kept if item.reply] == [0, 1, 2], "its weights count as they are"
    assert [bool(item.batch_norm) for item in kept] == [True, True, False]
    assert warnings == [
        "round 1: server.guard: device 2: statistics of layer4.0.bn1 are 3 standard deviations from the last model's, "
        "the usual is 0.4; left out"
    ]
    given, model = batch_norm(sent, (0.3, 1.0), (-0.4, 1.0), (0.0, 9.0))  # the standard deviation is 3: a shift of 2
    kept, _ = guard.check(given, model, 1)
    assert [bool(item.batch_norm) for item in kept] == [True, True, False]
    kept, refused = UpdateGuard("refuse", 8, print).check(given, model, 1)
    assert ([item.device for item in kept], set(refused)) == ([0, 1], {2})
    assert UpdateGuard("off", 8, print).check(given, model, 1) == (given, {})


def test_a_shift_of_statistics_is_judged_as_an_update_is(sent: Message) -> None:
    """A device with more steps may move further; few devices are held against earlier rounds; tiny shifts are right."""
    still, model = batch_norm(sent, (0.0, 1.0), (0.0, 1.0), (0.09, 1.0))
    assert UpdateGuard("clip", 8, pytest.fail).check(still, model, 1) == (still, {}), "where most do not move"
    given, model = batch_norm(sent, (0.2, 1.0), (0.2, 1.0), (1.5, 1.0))
    more = [replace(item, examples=80.0 if item.device == 2 else 20.0) for item in given]
    guard = UpdateGuard("clip", 20, pytest.fail)
    assert guard.check(more, model, 1) == (more, {}), "four steps: 4 x 0.2 is usual"
    guard = UpdateGuard("clip", 8, print)
    two, model = batch_norm(sent, (0.2, 1.0), (2.0, 1.0))
    assert np.allclose(statistics(guard.check(two, model, 1)[0]), [(0.2, 1.0), (0.2, 1.0)]), "the smaller one of two"
    wide, model = batch_norm(sent, (0.2, 1.0), (0.0, 9.0))  # a standard deviation of 3, which is a shift of 2
    assert np.allclose(statistics(guard.check(wide, model, 1)[0]), [(0.2, 1.0), (0.0, 1.2**2)])
    again = UpdateGuard("clip", 8, print)
    again.restore_(guard.state())
    alone, model = batch_norm(sent, (3.0, 1.0))
    assert np.allclose(statistics(again.check(alone, model, 2)[0]), [(0.2, 1.0)]), "a resumed run remembers"
    assert UpdateGuard("clip", 8, pytest.fail).check(alone, model, 1) == (alone, {}), "nothing to compare with"


def test_one_layer_that_is_far_is_cut_and_no_other(sent: Message) -> None:
    names = [f"layer4.{block}.bn1.running_{kind}" for block in (0, 1) for kind in ("mean", "var")]

    def arrays(*values: float) -> dict[str, np.ndarray]:
        return {name: np.full(4, v, np.float32) for name, v in zip([WEIGHT, *names], (1.0, *values), strict=True)}

    rows = [(0.3, 4.0, 0.3, 1.0), (0.3, 4.0, 3.0, 1.0)]
    given = [contribution(sent, arrays(*row), 1.0, device) for device, row in enumerate(rows)]
    kept, _ = UpdateGuard("clip", 8, print).check(given, arrays(0.0, 4.0, 0.0, 1.0), 1)
    found = [[float(item.batch_norm[name][0]) for name in names] for item in kept]
    assert np.allclose(found, [rows[0]] * 2)


def test_other_statistics_of_all_devices_are_the_data(sent: Message) -> None:
    """A network that is not trained yet: all devices are far from its first statistics."""
    given, model = batch_norm(sent, (50.0, 90.0), (60.0, 120.0), (40.0, 70.0))
    assert UpdateGuard("clip", 8, pytest.fail).check(given, model, 1) == (given, {})


def test_no_device_weighs_more_than_its_images(sent: Message) -> None:
    warnings: list[str] = []
    guard = UpdateGuard("clip", 8, warnings.append)
    known = [contribution(sent, {}, 1e12 if device == 1 else 20.0, device, 20 + device) for device in range(3)]
    assert [item.examples for item in guard.bound_examples(known, 3)] == [20, 21, 20]
    assert warnings == ["round 3: server.guard: device 1: 1e+12 examples count as 21"]
    boards = [contribution(sent, {}, examples, device) for device, examples in enumerate([30.0, 1e12, 299.0])]
    assert [item.examples for item in guard.bound_examples(boards, 3)] == [30, 598, 299], "twice the median"
    assert [item.examples for item in UpdateGuard("off", 8, print).bound_examples(known, 3)] == [20, 1e12, 20]


# -- class sums, by hand -------------------------------------------------------------------------------------------

PLUS = {"name": "lightcl-plus", "share_statistics": True}


@pytest.fixture
def sums() -> ClassSums:
    scenario = small(method=PLUS)
    return ClassSums(scenario.method.build(build_network(scenario, in_channels=1, classes=10)), "clip", pytest.fail)


def reported(
    sums: ClassSums, seed: int, centers: dict[int, int], scale: float = 1.0, n: int = 40
) -> dict[str, np.ndarray]:
    """The sums of a device whose class `label` has features around the unit vector `centers[label]`."""
    generator = np.random.default_rng(seed)
    given = {name: np.zeros_like(array) for name, array in sums.sums.items()}
    width = given["statistics/total"].shape[1]
    for label, center in centers.items():
        x = scale * (generator.normal(size=(n, width)) * 0.05 + 4 * np.eye(width)[center])
        given["statistics/count"][label], given["statistics/total"][label] = n, x.sum(axis=0)
        given["statistics/gram"] += (x.T @ x)[np.triu_indices(width)]
    return given


HONEST = {0: 0, 1: 1}


def test_features_on_another_scale_are_refused(sums: ClassSums) -> None:
    fleet = {device: reported(sums, device, HONEST) for device in range(2)}
    assert sums.unlike_the_fleet(fleet) == {}
    huge = sums.unlike_the_fleet(fleet | {2: reported(sums, 2, HONEST, 1e6)})
    assert set(huge) == {2}
    assert "mean squared norm of" in huge[2]
    assert set(sums.unlike_the_fleet(fleet | {2: reported(sums, 2, HONEST, 1e-3)})) == {2}
    assert set(sums.unlike_the_fleet({0: fleet[0], 2: reported(sums, 2, HONEST, 1e6)})) == {2}, "the larger one of two"
    assert sums.update_(fleet, 1) == ({0, 1}, {})
    assert set(sums.unlike_the_fleet({2: reported(sums, 2, {2: 2, 3: 3}, 3.0)})) == {2}, "unlike the sums so far"


def test_permuted_labels_are_refused_where_a_majority_knows_the_classes(sums: ClassSums) -> None:
    fleet = {device: reported(sums, device, HONEST) for device in range(2)}
    swapped = {2: reported(sums, 2, {0: 1, 1: 0})}
    assert "looks like the fleet's class" in sums.unlike_the_fleet(fleet | {2: reported(sums, 2, {0: 1, 1: 0}, 1.3)})[2]
    assert "looks like the fleet's class" in sums.unlike_the_fleet(fleet | swapped)[2]
    assert sums.unlike_the_fleet(swapped) == {}, "nobody else has these classes"
    assert sums.unlike_the_fleet({0: fleet[0]} | swapped) == {}, "one word against another"
    assert sums.update_(fleet, 1) == ({0, 1}, {})
    assert set(sums.unlike_the_fleet(swapped)) == {2}, "against the sums so far"
    assert sums.unlike_the_fleet({2: reported(sums, 2, {2: 2, 3: 3})}) == {}, "new classes are no mistake"
    assert sums.unlike_the_fleet({2: reported(sums, 2, {0: 1, 1: 0}, n=4)}) == {}, "too few samples to tell"


def test_one_wrong_class_of_several_is_enough(sums: ClassSums) -> None:
    right = {label: label for label in range(5)}
    fleet = {device: reported(sums, device, right) for device in range(2)}
    assert sums.unlike_the_fleet(fleet | {2: reported(sums, 2, right)}) == {}
    wrong = reported(sums, 2, right | {3: 1})
    said = {2: "its class 3 looks like the fleet's class 1: mislabeled class sums"}
    assert sums.unlike_the_fleet(fleet | {2: wrong}) == said
    sums.update_(fleet, 1)
    assert sums.unlike_the_fleet({2: wrong}) == said, "against the sums so far"


def test_class_sums_over_too_many_samples_are_scaled_down(sent: Message, sums: ClassSums) -> None:
    """Sums over 2 x 40 samples, of which 60 count: three quarters of everything."""
    warnings: list[str] = []
    guard = UpdateGuard("clip", 8, warnings.append)
    given = [contribution(sent, reported(sums, d, HONEST, n=n), 2.0 * n, d) for d, n in enumerate((15, 15, 40))]
    kept = guard.bound_examples(given, 4)
    assert warnings == ["round 4: server.guard: device 2: 80 examples count as 60"]
    assert [item.examples for item in kept] == [30, 30, 60]
    assert all(kept[device] == given[device] for device in (0, 1))
    for name, array in given[2].sums.items():
        assert np.allclose(kept[2].sums[name], 0.75 * array)
    guard.check(kept, {}, 4)
    alone = contribution(sent, reported(sums, 3, HONEST, n=5000), 1e4, 3)
    assert guard.bound_examples([alone], 5)[0].sums["statistics/count"].sum() == 60, (
        "twice the median of earlier rounds"
    )
    known = replace(given[2], images=20)
    assert guard.bound_examples([known], 6)[0].sums["statistics/count"].sum() == 20


def test_a_head_that_is_worse_for_the_fleet_is_not_adopted(sums: ClassSums) -> None:
    warnings: list[str] = []
    sums._warned = warnings.append
    assert sums.update_({0: reported(sums, 0, HONEST)}, 1) == ({0}, {})
    before, head = sums.sums, sums.head
    assert sums.update_({1: reported(sums, 1, {0: 1, 1: 0}, n=400)}, 2) == (set(), {})
    assert (sums.sums, sums.head) == (before, head)
    assert "round 2: its class sums are left out: the new head places 0% of the fleet's class means" in warnings[0]
    assert sums.update_({1: reported(sums, 1, {0: 0, 2: 2})}, 3) == ({1}, {})


# -- in runs -------------------------------------------------------------------------------------------------------

Spoil = Callable[[Message, Coordinator], None]


class Watch(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def run(path: Path, scenario: Scenario, spoil: Spoil | None = None, *, known: bool = True) -> tuple[Coordinator, Watch]:
    """A run in which device 2 spoils every training that it replies with."""
    prepared = prepare(scenario)
    folder, watch = RunFolder(path / "run"), Watch()
    folder.begin(scenario, {"run": "r"}, [])
    images = KnownImages.of(prepared) if known else None
    coordinator = Coordinator(scenario, folder, "r", watch, prepared.tasks, images=images)

    def tamper(message: Message, reply: Message) -> Message:
        if spoil and message.metadata.message_type == "train" and message.content["instruction"]["device"] == 2:
            spoil(reply, coordinator)
        return reply

    coordinator.run(InProcessGrid(path / "states", scenario.fleet.devices, tamper))
    return coordinator, watch


def changed(change: Callable[[str, np.ndarray, np.ndarray], np.ndarray]) -> Spoil:
    """Changes the weights: `change(name, weights, model)`."""

    def spoil(reply: Message, coordinator: Coordinator) -> None:
        assert coordinator.aggregator is not None
        arrays = {name: array.numpy() for name, array in reply.content.array_records["arrays"].items()}
        model = coordinator.aggregator.arrays
        reply.content["arrays"] = ArrayRecord({n: Array(change(n, a, model[n])) for n, a in arrays.items()})

    return spoil


def field(**values: Any) -> Spoil:
    def spoil(reply: Message, coordinator: Coordinator) -> None:
        reply.content["reply"] = ConfigRecord(dict(reply.content["reply"]) | values)

    return spoil


def far(name: str, weights: np.ndarray, model: np.ndarray) -> np.ndarray:
    return weights if "running" in name else (model + 1e6 * (weights - model)).astype(np.float32)


def test_a_huge_update_is_left_out_and_everybody_finishes(tmp_path: Path) -> None:
    scenario = small(server={"aggregation": "suffix+head"}, stream={"tasks": 1})
    coordinator, watch = run(tmp_path, scenario, changed(far))
    assert len(coordinator.ledger.finished) == 3
    assert watch.refusals == []
    (warning,) = watch.warnings
    assert warning.startswith("round 1: server.guard: device 2: its update has norm ")
    events = [json.loads(line) for line in (tmp_path / "run" / EVENTS).read_text().splitlines()]
    assert [event["text"] for event in events if event["event"] == "warned"] == [warning]
    assert coordinator.aggregator is not None
    assert max(np.abs(array).max() for array in coordinator.aggregator.arrays.values()) < 100


def test_under_refuse_the_device_is_dropped_and_the_others_finish(tmp_path: Path) -> None:
    scenario = small(server={"aggregation": "suffix", "guard": "refuse"})
    coordinator, watch = run(tmp_path, scenario, changed(far))
    assert [entry.number for entry in coordinator.ledger.finished] == [0, 1]
    assert "server.guard: its update has norm" in coordinator.ledger.dropped[2]
    assert [device for device, _ in watch.refusals] == [2, 2, 2]
    results = load_run(tmp_path / "run").results
    assert results is not None
    assert (results.devices, results.devices_finished) == (3, 2)


@pytest.mark.parametrize("known", [True, False])
def test_a_million_million_examples(tmp_path: Path, known: bool) -> None:
    """The average is that of the images that the device has, or of twice the median."""
    scenario = small(server={"aggregation": "suffix"}, stream={"tasks": 1})
    replies: list[Message] = []

    def spoil(reply: Message, coordinator: Coordinator) -> None:
        field(examples=10**12)(reply, coordinator)
        replies.append(reply)

    coordinator, watch = run(tmp_path, scenario, spoil, known=known)
    weights = [80.0, 94.0, 85.0 if known else 188.0]
    assert watch.warnings == [f"round 1: server.guard: device 2: 1e+12 examples count as {weights[2]:g}"]
    assert coordinator.aggregator is not None
    own = replies[0].content.array_records["arrays"][WEIGHT].numpy()
    assert np.abs(coordinator.aggregator.arrays[WEIGHT] - own).max() > 1e-4, "the model is not the attacker's"


@pytest.mark.parametrize("change", [shifted(3), shifted(9), wider(9)])
@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_statistics_of_one_device_do_not_decide_the_fleets(tmp_path: Path, strategy: str, change: Change) -> None:
    """Means that are far away and variances that are too large: the model's are nearly those of others."""

    def spoil(reply: Message, coordinator: Coordinator) -> None:
        assert coordinator.aggregator is not None
        arrays = {name: array.numpy().copy() for name, array in reply.content.array_records["arrays"].items()}
        changed = change(arrays, coordinator.aggregator.arrays, np.random.default_rng(0))
        reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in changed.items()})

    scenario = small(server={"aggregation": "suffix", "strategy": strategy}, stream={"tasks": 1}, training=STEADY)
    honest = run(tmp_path / "honest", scenario)[0].aggregator
    coordinator, watch = run(tmp_path / "hostile", scenario, spoil)
    assert watch.refusals == []
    assert any("device 2: statistics of layer4." in warning for warning in watch.warnings)
    assert all("device 2" in warning for warning in watch.warnings)
    assert honest is not None
    assert coordinator.aggregator is not None
    for name in honest.arrays:
        if name.endswith("running_mean"):
            deviation = float(np.sqrt(honest.arrays[name.removesuffix("mean") + "var"].mean()))
            moved = coordinator.aggregator.arrays[name] - honest.arrays[name]
            assert np.sqrt((moved**2).mean()) < 0.3 * deviation


STEADY = {"learning_rate": 0.01, "batch_size": 32}
"""Tiny untrained networks diverge on single devices with more and longer steps; the guard then clips honest updates."""


def test_the_guard_changes_no_number_of_an_honest_run(tmp_path: Path) -> None:
    def rows(guard: Guard) -> list[dict[str, Any]]:
        section = {"aggregation": "suffix+head", "guard": guard, "rounds_per_task": 2}
        _, watch = run(tmp_path / guard, small(server=section, method=PLUS, training=STEADY))
        assert (watch.warnings, watch.refusals) == ([], [])
        lines = (tmp_path / guard / "run" / "devices.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "timing"} for line in lines]

    assert rows("clip") == rows("refuse") == rows("off")


def with_sums(change: Callable[[dict[str, np.ndarray]], None]) -> Spoil:
    def spoil(reply: Message, coordinator: Coordinator) -> None:
        arrays = {name: array.numpy().copy() for name, array in reply.content.array_records["arrays"].items()}
        change(arrays)
        reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})

    return spoil


def permuted(arrays: dict[str, np.ndarray]) -> None:
    for name in ("count", "total"):
        arrays[f"statistics/{name}"][[0, 1]] = arrays[f"statistics/{name}"][[1, 0]]


def scaled(factor: float, *names: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        for name in names:
            arrays[f"statistics/{name}"] *= factor ** (2 if name == "gram" and "count" not in names else 1)

    return change


def elsewhere(arrays: dict[str, np.ndarray]) -> None:
    for name in ("count", "total"):
        arrays[f"statistics/{name}"] = np.roll(arrays[f"statistics/{name}"], 5, axis=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(scaled(1e6, "count", "total", "gram"), "but it has trained on 85 images", id="a million times"),
        pytest.param(scaled(1e6, "total", "gram"), "mean squared norm", id="features a million times too large"),
        pytest.param(elsewhere, "samples of class", id="labels of classes that it has not"),
        pytest.param(permuted, "looks like the fleet's class", id="permuted labels"),
    ],
)
def test_sums_that_the_device_cannot_have_are_refused(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], said: str
) -> None:
    scenario = small(stream={"tasks": 1}, method=PLUS)
    coordinator, watch = run(tmp_path, scenario, with_sums(change), known=change is not permuted)
    assert [device for device, _ in watch.refusals] == [2, 2, 2]
    assert said in watch.refusals[0][1]
    assert [entry.number for entry in coordinator.ledger.finished] == [0, 1]
    assert [entry.summed for entry in coordinator.ledger.entries] == [(0,), (0,), ()]
    assert coordinator.aggregator is not None
    assert coordinator.aggregator.sums["statistics/count"].sum() == 80 + 94


def test_sums_that_were_refused_once_are_in_when_they_are_right(tmp_path: Path) -> None:
    times: list[int] = []

    def once(reply: Message, coordinator: Coordinator) -> None:
        times.append(coordinator.round)
        if len(times) == 1:
            with_sums(scaled(1e6, "total", "gram"))(reply, coordinator)

    coordinator, watch = run(tmp_path, small(stream={"tasks": 1}, method=PLUS), once)
    assert (times, [device for device, _ in watch.refusals]) == ([1, 2], [2])
    assert coordinator.aggregator is not None
    assert coordinator.aggregator.sums["statistics/count"].sum() == 80 + 94 + 85
    assert all(entry.summed == (0,) for entry in coordinator.ledger.entries)


def test_off_is_off_in_yaml() -> None:
    assert Server.model_validate({"guard": False}).guard == "off"
    with pytest.raises(ValueError, match="guard"):
        Server.model_validate({"guard": True})


@pytest.mark.parametrize("factor", [1, 1000])
def test_a_device_that_claims_images_of_its_own_is_bounded_as_an_unknown_one(tmp_path: Path, factor: int) -> None:
    """The server knows all images; device 2 says that it has others, and reports a thousand times as many."""
    scenario = small(stream={"tasks": 1}, method=PLUS)
    prepared, watch, folder = prepare(scenario), Watch(), RunFolder(tmp_path / "run")
    folder.begin(scenario, {"run": "r"}, [])
    coordinator = Coordinator(scenario, folder, "r", watch, prepared.tasks, images=KnownImages.of(prepared))

    def tamper(message: Message, reply: Message) -> Message:
        record = dict(reply.content["reply"])
        if record.get("partition") == 2:
            reply.content["reply"] = ConfigRecord(record | {"own_data": True, "tasks": [0]})
        elif message.metadata.message_type == "train" and message.content["instruction"]["device"] == 2:
            reply.content["reply"] = ConfigRecord(record | {"examples": factor * record["examples"]})
            with_sums(scaled(factor, "count", "total", "gram"))(reply, coordinator)
        return reply

    coordinator.run(InProcessGrid(tmp_path / "states", 3, tamper))
    claimed = [text for text in watch.warnings if "own-data" in text]
    assert len(claimed) == 1
    assert (
        "devices with images of their own (own-data): [2]. What the server knows of their images is not" in claimed[0]
    )
    events = [json.loads(line) for line in (tmp_path / "run" / EVENTS).read_text().splitlines()]
    assert claimed == [event["text"] for event in events if event["event"] == "warned" and "own-data" in event["text"]]
    assert watch.refusals == []
    assert coordinator.aggregator is not None
    assert coordinator.aggregator.sums["statistics/count"].sum() == 80 + 94 + (85 if factor == 1 else 2 * 94)
