"""Checks a request as a whole, before the first write and the first training step, and opens its run folder."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lightcl.analysis.generalizability import OnStep, analyze, analyzed_scenario, first_analyzable
from lightcl.assembly import build_network, count_fleet
from lightcl.data.partition import Shares, partition
from lightcl.data.sources import Source, comes_to_boards, load_source
from lightcl.data.streams import TaskCounts
from lightcl.device.arithmetic import with_arithmetic
from lightcl.device.hardware import choose_accelerator
from lightcl.device.prefix import check_cache_limit
from lightcl.errors import RequestError
from lightcl.exchange.tensors import outgoing
from lightcl.networks.weights import digest
from lightcl.records.folder import RunFolder
from lightcl.records.old_runs import is_old
from lightcl.records.provenance import describe_run
from lightcl.scenario import Scenario, scenario_from_json
from lightcl.scenario.digest import scenario_digest

TEST_NOTES = {
    "whole": "all test images of its classes",
    "matched": "test images in the proportions of its training images, drawn by the seed",
}
"""What partition.json says instead of test images that devices share: ten thousand lists of them would fill a disk."""


@dataclass(frozen=True)
class Prepared:
    """A scenario that can be run, with its images and the share of each device."""

    scenario: Scenario
    source: Source
    shares: Shares
    counts: TaskCounts
    """Images of each device for each task."""
    prefix: str
    """Digest of the frozen prefix."""
    analysis: dict[str, Any] | None = None
    """With `network.freeze: auto`: the figures that the freeze point was chosen from."""

    @property
    def tasks(self) -> Sequence[tuple[int, ...]]:
        """The numbers of the tasks that each device learns, ascending; empty for a device that learns nothing."""
        return self.counts.tasks

    @property
    def images(self) -> str:
        """Digest of all images and labels."""
        total = hashlib.sha256()
        for split in (self.source.train, self.source.test):
            for block in split.blocks():
                total.update(block)
            total.update(np.ascontiguousarray(split.labels).data)
        return total.hexdigest()[:16]

    def partition_rows(self) -> Iterator[dict[str, object]]:
        """For partition.json: the indices into the source's training and test split that each device holds.

        A device that skips tasks has two more keys: `tasks`, the numbers of those that it learns, and `skipped`.
        """
        note = TEST_NOTES.get(self.scenario.fleet.test_data)
        for device, tasks in enumerate(self.tasks):
            row: dict[str, object] = {"device": device, "train": self.shares.train_of(device).tolist()}
            row["test"] = note or self.shares[device].test.tolist()
            if len(tasks) < self.scenario.stream.tasks:
                row["tasks"] = list(tasks)
                row["skipped"] = [asdict(skipped) for skipped in self.counts.skipped(device)]
            yield row


def prepare(scenario: Scenario) -> Prepared:
    """Loads the images and the weights, and cuts every device's stream. Raises RequestError for an impossible request.

    `network.freeze: auto` stays as it is, since choosing needs a training (`choose_freeze_point`); the rest is checked.
    """
    choose_accelerator(scenario.device.accelerator)
    source = load_source(scenario.source_request())
    shares = partition(source, scenario.fleet, scenario.seed)
    counts = count_fleet(scenario, source, shares)
    buildable = analyzed_scenario(scenario) if scenario.network.freeze == "auto" else scenario
    network = build_network(buildable, in_channels=source.channels, classes=len(counts.head))
    buildable.method.build(network)  # a method may refuse a network
    if scenario.server.aggregation != "none" and not outgoing(network, scenario.server.aggregation):
        raise RequestError(
            f"server.aggregation {scenario.server.aggregation!r} has nothing to share: every block is frozen"
        )
    if scenario.network.freeze != "auto":
        check_cache_limit(scenario, network, source.train.images.shape[1:])
    return Prepared(scenario, source, shares, counts, digest(network.prefix))


def _check_learns(prepared: Prepared, device: int) -> None:
    """Raises RequestError for a device that skips every task, where it is to be trained alone."""
    if prepared.tasks[device]:
        return
    skipped = prepared.counts.skipped(device)[0]
    first = next(number for number, tasks in enumerate(prepared.tasks) if tasks)
    raise RequestError(
        f"device {device} learns no task: it has {skipped.train} training and {skipped.test} test images for task "
        f"{skipped.task} ({skipped.reason}), and too few for the others; name another --device (the first that learns "
        f"a task is {first})"
    )


def choose_freeze_point(prepared: Prepared, on_step: OnStep | None = None) -> Prepared:
    """Replaces `network.freeze: auto` by a block, from an analysis of one device's stream; any other value is kept.

    The first device that learns at least two tasks stands for the fleet, also when another device is trained alone: all
    have the same prefix. Raises RequestError where no device learns two tasks, TrainingFailure if the analysis
    diverges.
    """
    scenario, source = prepared.scenario, prepared.source
    if scenario.network.freeze != "auto":
        return prepared
    device = first_analyzable(prepared.tasks)
    found = analyze(scenario, device, source, prepared.shares[device], on_step)
    analysis = found.record(scenario.network.freeze_threshold)
    scenario = _with_freeze(scenario, analysis["freeze"])
    network = build_network(scenario, in_channels=source.channels, classes=len(prepared.counts.head))
    scenario.method.build(network)  # raises RequestError if the method does not accept this point
    check_cache_limit(scenario, network, source.train.images.shape[1:])
    return replace(prepared, scenario=scenario, prefix=digest(network.prefix), analysis=analysis)


def open_run(
    folder: RunFolder,
    scenario: Scenario,
    command: str,
    kind: str,
    *,
    resume: bool,
    overwrite: bool,
    here: bool = True,
    on_step: OnStep | None = None,
) -> Prepared:
    """Checks the request as a whole, and only then writes; `kind` is "fleet" or "device N". Raises RequestError.

    The scenario that it returns has a freeze point, never "auto"; `on_step` watches the analysis that chooses it.
    `here`: the devices compute on this machine, so that it decides what is "auto" in `device`; otherwise each board
    does.
    """
    if resume and folder.exists:
        about = folder.read()
        if about.get("kind") == kind and "images" not in about and not is_old(about["scenario"]):
            raise RequestError(
                f"--resume: the run in {folder.path} began without images on the server, but now there are some at "
                f"{scenario.data.path or scenario.data.source!r} (data.path, data.source); name the scenario that it "
                "began with, or another --out"
            )
        scenario = _as_chosen(folder, scenario, about["scenario"])
        _check_same(folder, scenario, {"kind": kind})
    elif not (overwrite and folder.exists):
        folder.prepare(resume=resume, overwrite=overwrite)
    if here:
        scenario = with_arithmetic(scenario)
    prepared = prepare(scenario)
    if kind.startswith("device "):
        _check_learns(prepared, int(kind.removeprefix("device ")))
    prepared = choose_freeze_point(prepared, on_step)
    facts: dict[str, str | int] = {"kind": kind, "images": prepared.images, "prefix": prepared.prefix}
    facts["classes"] = len(prepared.counts.head)
    if resume:
        _check_same(folder, scenario, facts, {"classes": len(prepared.source.classes)})
    folder.prepare(resume=resume, overwrite=overwrite)
    if not folder.exists:
        about = describe_run(command, uuid.uuid4().hex[:12]) | facts
        folder.begin(prepared.scenario, about, prepared.partition_rows(), prepared.analysis)
    return prepared


def open_remote_run(folder: RunFolder, scenario: Scenario, command: str, *, resume: bool) -> None:
    """For boards whose images the server does not have: the boards check the rest of the scenario themselves.

    Raises RequestError for `network.freeze: auto`, which needs images to choose from.
    """
    if scenario.network.freeze == "auto":
        path = scenario.data.path
        missing = f"data.path {path} is not there" if path else "data.path is not set"
        if comes_to_boards(scenario.data.source):
            missing = f"data.source: {scenario.data.source}"
        raise RequestError(
            f"network.freeze is 'auto', but the server has no images to choose a freeze point from ({missing}); run "
            "`lightcl analyze` on a machine that has images, and write the block that it names into network.freeze"
        )
    if resume and folder.exists:
        about = folder.read()
        if "images" in about:
            before = about["scenario"].get("data", {}).get("path")
            raise RequestError(
                f"--resume: the run in {folder.path} began with images on the server (data.path was {before!r}), and "
                f"data.path is {str(scenario.data.path) if scenario.data.path else None!r} now, where there are none; "
                "set data.path to where they are"
            )
        _check_same(folder, scenario, {"kind": "fleet"})
    folder.prepare(resume=resume, overwrite=False)
    if not folder.exists:
        folder.begin(scenario, describe_run(command, uuid.uuid4().hex[:12]) | {"kind": "fleet"}, [])


def _with_freeze(scenario: Scenario, point: str) -> Scenario:
    return scenario.model_copy(update={"network": scenario.network.model_copy(update={"freeze": point})})


def _as_chosen(folder: RunFolder, scenario: Scenario, before: Mapping[str, Any]) -> Scenario:
    """What is "auto" in the scenario as it was resolved when the run in the folder began, `before`: another machine may
    continue it, and nothing is analyzed again."""
    if not is_old(before):
        device = scenario_from_json(json.dumps(before), str(folder.path / "run.json")).device
        if "auto" not in (device.precision, device.convolutions):  # else it is the run of a fleet of boards
            scenario = with_arithmetic(scenario, device)
    analysis = folder.analysis()
    if scenario.network.freeze != "auto" or analysis is None:
        return scenario
    return _with_freeze(scenario, str(analysis["freeze"]))


def _check_same(
    folder: RunFolder, scenario: Scenario, facts: Mapping[str, str | int], earlier: Mapping[str, int] | None = None
) -> None:
    """Raises RequestError if the run in the folder is not the one that is to be continued.

    `earlier` are facts that earlier versions did not record, as they were then: a head had all classes of the source.
    """
    about: dict[str, Any] = {**(earlier or {}), **folder.read()}
    if is_old(about["scenario"]):
        raise RequestError(
            f"--resume: the run in {folder.path} was made by an earlier version; it can be read and reported, but not "
            "continued. Name another --out"
        )
    before = scenario_from_json(json.dumps(about["scenario"]), str(folder.path / "run.json"))
    differences = [
        f"{key} was {about.get(key)!r}, now {value!r}" for key, value in facts.items() if about.get(key) != value
    ]
    if scenario_digest(before) != scenario_digest(scenario):
        differences.insert(0, _difference(before, scenario))
    if differences:
        raise RequestError(f"--resume: the run in {folder.path} is another one ({differences[0]}); name another --out")


def _difference(before: Scenario, after: Scenario) -> str:
    """The first key in which two scenarios differ."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    for section in old:
        if old[section] == new[section]:
            continue
        if not isinstance(old[section], dict):
            return f"{section} was {old[section]!r}, now {new[section]!r}"
        for key in sorted(old[section].keys() | new[section].keys()):
            was, now = old[section].get(key), new[section].get(key)
            if was != now:
                return f"{section}.{key} was {was!r}, now {now!r}"
    return "no key differs"
