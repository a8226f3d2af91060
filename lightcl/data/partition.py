"""Which device holds which samples, by flwr-datasets' partitioners. Every sample belongs to at most one device."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightcl.data.section import Fleet
from lightcl.data.sources import Source, cache_folder
from lightcl.errors import RequestError, required
from lightcl.seeds import derive, numpy_generator


@dataclass(frozen=True)
class Share:
    """One device's samples: sorted indices into the source's training and test split."""

    train: np.ndarray
    test: np.ndarray


def partition(source: Source, fleet: Fleet, seed: int) -> list[Share]:
    """One share a device; a function of the labels, the fleet section and the seed alone.

    Raises RequestError where the partition cannot be made or leaves a device empty.
    """
    return _shares(source, fleet, seed, range(fleet.devices))


def share_of(source: Source, fleet: Fleet, seed: int, device: int) -> Share:
    """One device's share alone: in a fleet of thousands the others' would take longer to read than to train on."""
    return _shares(source, fleet, seed, [device])[0]


def _shares(source: Source, fleet: Fleet, seed: int, devices: Sequence[int]) -> list[Share]:
    labels = [_digest(source.train.labels), _digest(source.test.labels)]
    key = json.dumps([fleet.model_dump(mode="json"), seed, labels, 3])
    file = cache_folder() / "partitions" / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
    if not file.exists():
        with warnings.catch_warnings():  # what they warn of is what the scenario asks for, or an error of ours
            warnings.filterwarnings("ignore", module="flwr_datasets")
            train = _split_train(source.train.labels, fleet, seed)
        arrays = {f"train{i}": a for i, a in enumerate(train)}
        if fleet.test_data == "share":
            test = _split_test(source.test.labels, source.train.labels, train, seed)
            arrays |= {f"test{i}": a for i, a in enumerate(test)}
        _remember(file, arrays)
    with np.load(file) as stored:  # reads only the arrays that are asked for
        if fleet.test_data == "share":
            return [Share(stored[f"train{i}"], stored[f"test{i}"]) for i in devices]
        mine = [stored[f"train{i}"] for i in devices]
    return [Share(train, _tests_of(source.train.labels[train], source.test.labels)) for train in mine]


def _tests_of(train_labels: np.ndarray, test_labels: np.ndarray) -> np.ndarray:
    """All test images of the classes that a device holds."""
    return np.flatnonzero(np.isin(test_labels, np.unique(train_labels)))


def _split_train(labels: np.ndarray, fleet: Fleet, seed: int) -> list[np.ndarray]:
    if fleet.devices > len(labels):
        raise RequestError(f"fleet.devices: {fleet.devices} devices cannot share {len(labels)} training images")
    derived = derive(seed, "partition") % 2**31
    # The partitioners cut or assign in the order given; the order is ours, seeded.
    order = numpy_generator(seed, "partition", "order").permutation(len(labels))
    if fleet.devices == 1 and fleet.partition != "pathological":  # which may leave classes to nobody
        return [np.sort(order)]
    if fleet.partition == "iid":  # what IidPartitioner does, without the library: a board may lack it
        return [np.sort(part) for part in np.array_split(order, fleet.devices)]
    purpose = f"for fleet.partition {fleet.partition!r}"
    partitioners = required("flwr_datasets.partitioner", "data", purpose)
    if fleet.partition == "dirichlet":
        chosen = partitioners.DirichletPartitioner(
            num_partitions=fleet.devices, partition_by="label", alpha=fleet.alpha, min_partition_size=1, seed=derived
        )
    else:
        chosen = partitioners.PathologicalPartitioner(
            num_partitions=fleet.devices,
            partition_by="label",
            num_classes_per_partition=fleet.classes_per_device,
            class_assignment_mode="deterministic",
            seed=derived,
        )
    chosen.dataset = required("datasets", "data", purpose).Dataset.from_dict({"label": labels[order], "index": order})
    try:
        shares = [np.sort(np.asarray(chosen.load_partition(i)["index"])) for i in range(fleet.devices)]
    except ValueError as error:
        raise RequestError(f"fleet.partition {fleet.partition!r} with {fleet.devices} devices: {error}") from error
    for device, share in enumerate(shares):
        if len(share) == 0:
            raise RequestError(
                f"fleet.partition {fleet.partition!r} leaves device {device} of {fleet.devices} without an image; "
                "use fewer devices or a larger fleet.alpha"
            )
    return shares


def _split_test(labels: np.ndarray, train_labels: np.ndarray, train: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Every class's test images, dealt out among the devices that train on the class."""
    held = [np.unique(train_labels[indices]) for indices in train]
    shares: list[list[np.ndarray]] = [[] for _ in train]
    for label in np.unique(labels):
        holders = [device for device, classes in enumerate(held) if label in classes]
        members = numpy_generator(seed, "partition", "test", int(label)).permutation(np.flatnonzero(labels == label))
        for device, part in zip(holders, np.array_split(members, max(1, len(holders))), strict=False):
            shares[device].append(part)
    return [np.sort(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64) for parts in shares]


def _remember(file: Path, arrays: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npz", delete=False) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
        temporary.flush()
        os.fsync(temporary.fileno())
    Path(temporary.name).replace(file)


def _digest(labels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest()
