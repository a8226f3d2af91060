"""What leaves a device, what is taken over, and how devices are averaged."""

import numpy as np
import pytest
import torch

from lightcl.exchange.tensors import (
    ExchangeError,
    adopt_,
    check,
    is_statistic,
    outgoing,
    shared_tensors,
    size_in_bytes,
    weighted_average,
)
from lightcl.methods import Method
from lightcl.methods.parts.closed_form import Statistics
from lightcl.methods.sgd import SGDParameters
from tests.lightcl import toys

BLOCK = ("conv1.weight", *(f"bn1.{n}" for n in ("weight", "bias", "running_mean", "running_var")))
SECOND_HALF = tuple(name.replace("1", "2", 1) for name in BLOCK)
DOWNSAMPLE = (
    "downsample.0.weight", *(f"downsample.1.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
)  # fmt: skip
SUFFIX = {
    *(f"layer4.0.{name}" for name in (*BLOCK, *SECOND_HALF, *DOWNSAMPLE)),
    *(f"layer4.1.{name}" for name in (*BLOCK, *SECOND_HALF)),
}
HEAD = {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("aggregation", "names"), [("none", set()), ("suffix", SUFFIX), ("suffix+head", SUFFIX | HEAD)]
)
def test_exactly_the_named_floating_tensors_are_shared(aggregation, names):
    network = toys.network(freeze="layer3")
    shared = shared_tensors(network, aggregation)
    assert set(shared) == names
    assert all(tensor.is_floating_point() for tensor in shared.values())
    assert set(outgoing(network, aggregation)) == names


@pytest.mark.parametrize("point", ["none", "stem", "layer1.0", "layer2", "layer3", "layer4.0", "layer4"])
def test_the_frozen_prefix_is_never_shared(point):
    network = toys.network(freeze=point)
    shared = set(shared_tensors(network, "suffix+head"))
    assert shared.isdisjoint(network.prefix.state_dict())
    assert shared >= {name for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("aggregation", ["none", "suffix", "suffix+head"])
def test_a_device_in_the_middle_of_a_task_sends_no_memory_and_no_patterns(tmp_path, aggregation):
    device = toys.device(tmp_path, server={"aggregation": aggregation})
    device.train(0, 2)
    device.train(1, 1)
    assert device.method.state_dict().keys() >= {"memory", "logits", "pattern/layer4.0.relu1", "vital/layer4.0.relu1"}
    allowed = {"none": set(), "suffix": SUFFIX, "suffix+head": SUFFIX | HEAD}[aggregation]
    assert set(device.outgoing()) == allowed


def test_outgoing_tensors_are_fp32_copies():
    network = toys.network()
    sent = outgoing(network, "suffix+head")
    before = sent["fc.bias"].copy()
    with torch.no_grad():
        network.fc.bias += 1
    assert np.array_equal(sent["fc.bias"], before)
    assert {array.dtype for array in sent.values()} == {np.dtype(np.float32)}


def test_what_one_device_sends_another_takes_over():
    sender, receiver = toys.network(seed=1), toys.network(seed=2)
    before = toys.copy_of(receiver.state_dict())
    adopt_(Method(receiver, SGDParameters()), outgoing(sender, "suffix"), "suffix")
    assert toys.changed(receiver.state_dict(), before) == SUFFIX
    for name in SUFFIX:
        assert torch.equal(receiver.state_dict()[name], sender.state_dict()[name])


def spoiled(change) -> dict[str, np.ndarray]:
    arrays = outgoing(toys.network(seed=1), "suffix")
    change(arrays)
    return arrays


def put(name, value):
    return lambda arrays: arrays.update({name: value(arrays.get(name))})


def with_value(value):
    def change(array):
        array = array.copy()
        array.flat[3] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("layer4.1.conv2.weight", with_value(np.nan)), r"'layer4.1.conv2.weight' holds values that are not finite"),
        (put("layer4.1.bn1.bias", with_value(-np.inf)), r"'layer4.1.bn1.bias' holds values that are not finite"),
        (put("layer4.0.bn1.bias", lambda a: a[:-1]), r"'layer4.0.bn1.bias' has shape \[31\], expected \[32\]"),
        (put("layer4.0.bn1.bias", lambda a: a[None]), r"'layer4.0.bn1.bias' has shape \[1, 32\], expected \[32\]"),
        (put("layer4.0.bn1.bias", lambda a: a.astype(str)), r"'layer4.0.bn1.bias' holds [<>]U\d+, expected floating"),
        (put("layer4.0.bn1.bias", lambda a: a.astype(np.int64)), r"'layer4.0.bn1.bias' holds int64, expected floating"),
        (
            put("layer4.0.bn1.bias", lambda a: a.astype(np.longdouble)),
            r"'layer4.0.bn1.bias' holds float\d+, expected flo",
        ),
        (put("layer4.0.bn1.bias", lambda a: a.astype(">f4")), r"'layer4.0.bn1.bias' holds >f4, expected floating"),
        (put("layer3.0.conv1.weight", lambda _: np.zeros(1)), r"'layer3.0.conv1.weight' is not part of the exchange"),
        (put("fc.bias", lambda _: np.zeros(4)), r"'fc.bias' is not part of the exchange"),
        (lambda arrays: arrays.pop("layer4.0.downsample.0.weight"), r"'layer4.0.downsample.0.weight' is missing"),
        (lambda arrays: arrays.clear(), r"'layer4.0.bn1.bias' is missing"),
    ],
    ids=[
        "nan",
        "infinite",
        "short",
        "extra axis",
        "text",
        "integer",
        "long",
        "big",
        "prefix",
        "head",
        "missing",
        "empty",
    ],
)
def test_bad_tensors_are_refused_by_name_and_nothing_changes(change, message):
    network = toys.network(seed=2)
    before = toys.copy_of(network.state_dict())
    with pytest.raises(ExchangeError, match=message):
        adopt_(Method(network, SGDParameters()), spoiled(change), "suffix")
    toys.assert_same(network.state_dict(), before)


def test_check_accepts_what_fits():
    check({"a": np.zeros((2, 3), dtype=np.float32)}, {"a": (2, 3)})


def test_average_by_hand():
    devices = [
        {"a": np.array([1.0, 2.0], dtype=np.float32), "b": np.array(4.0, dtype=np.float32)},
        {"b": np.array(8.0, dtype=np.float32), "a": np.array([5.0, -2.0], dtype=np.float32)},  # in another order
    ]
    # weights 1 and 3: a = (1·1 + 3·5)/4 = 4 and (1·2 - 3·2)/4 = -1; b = (4 + 24)/4 = 7
    average = weighted_average(devices, [1, 3])
    assert average["a"].tolist() == [4.0, -1.0]
    assert average["b"].item() == 7.0
    assert average["b"].shape == ()
    assert {array.dtype for array in average.values()} == {np.dtype(np.float32)}


def test_average_of_equal_devices_is_that_device():
    arrays = outgoing(toys.network(), "suffix")
    average = weighted_average([arrays, arrays, arrays], [10, 20, 5])
    for name, array in arrays.items():
        np.testing.assert_allclose(average[name], array, rtol=1e-6)


def test_average_is_summed_in_double_precision():
    # In fp32, 1e8 + 1 is 1e8, and the ones would be lost.
    devices = [{"a": np.array([value], dtype=np.float32)} for value in (1e8, 1.0, 1.0, -1e8)]
    assert weighted_average(devices, [1, 1, 1, 1])["a"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("name", "statistic"),
    [
        ("layer4.0.bn1.running_mean", True),
        ("layer4.0.downsample.1.running_var", True),
        ("layer4.0.bn1.weight", False),
        ("fc.bias", False),
    ],
)
def test_batch_norm_statistics_are_told_from_parameters(name, statistic):
    assert is_statistic(name) is statistic


def test_size_counts_every_byte():
    # (2 * 3 + 4) fp32 values
    assert size_in_bytes({"a": np.zeros((2, 3), dtype=np.float32), "b": np.zeros(4, dtype=np.float32)}) == 40


def fleet_sums() -> dict[str, np.ndarray]:
    statistics = Statistics.zeros(3, 4)
    statistics.add_(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 4 + [0]))
    return {f"statistics/{name}": tensor.numpy() for name, tensor in statistics.tensors().items()}


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("count", 0, -5.0, "negative number of samples"),
        ("count", 1, 0.0, "are inconsistent"),
        ("total", (0, 2), 1e3, "are inconsistent"),
        ("gram", 4, -1.0, "are inconsistent"),  # the second entry of the diagonal
        ("gram", 9, 0.0, "are inconsistent"),  # the last one
        ("gram", 1, 1e3, "are inconsistent"),  # beside the diagonal: more than any correlation
    ],
)
def test_sums_that_no_samples_have_are_refused(name, place, value, message):
    arrays = fleet_sums()
    shapes = {key: array.shape for key, array in arrays.items()}
    check(arrays, shapes)
    arrays[f"statistics/{name}"][place] = value
    with pytest.raises(ExchangeError, match=message):
        check(arrays, shapes)
