"""Keys of a scenario that were given and have no effect, because another key has another value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel

from lightcl.data.sources.field import FIELD
from lightcl.errors import shown
from lightcl.scenario.model import Scenario

_DOWNLOADED = ("cifar10", "cifar100", "fashion-mnist")
_ARRANGED = ("iid", "pathological", "linear", "square", "exponential", "natural")
"""Built-in partitions with neither `alpha` nor `sigma`; a plugin's may read any key."""


@dataclass(frozen=True)
class Condition:
    """`keys` of a section work only where `met`; `reason` says why they do not, `decider` is the key that decides."""

    section: str
    keys: tuple[str, ...]
    decider: str
    met: Callable[[Scenario], bool]
    reason: Callable[[Scenario], str]


def _regularized(scenario: Scenario) -> bool:
    return getattr(scenario.method, "beta", 1) != 0 or not scenario.method.name.startswith("lightcl")


def _adjusted(scenario: Scenario) -> bool:
    """Whether SparCL's masks are adjusted within a task."""
    interval = getattr(scenario.method, "interval", None)
    return interval is None or scenario.training.epochs > interval


CONDITIONS = (
    Condition(
        "fleet", ("alpha",), "partition",
        lambda s: s.fleet.partition not in (*_ARRANGED, "distribution"),
        lambda s: f"it is for fleet.partition: dirichlet or inner-dirichlet, not {s.fleet.partition}",
    ),
    Condition(
        "fleet", ("sigma",), "partition",
        lambda s: s.fleet.partition not in (*_ARRANGED, "dirichlet", "inner-dirichlet"),
        lambda s: f"it is for fleet.partition: distribution, not {s.fleet.partition}",
    ),
    Condition(
        "data", ("crop_padding",), "augmentation",
        lambda s: s.augmentation != "none",
        lambda s: f"images are not cropped with data.augmentation: {s.data.augmentation} on {s.data.source}",
    ),
    Condition(
        "data", ("test_fraction",), "source",
        lambda s: s.data.source not in _DOWNLOADED,
        lambda s: f"data.source: {s.data.source} has a test split of its own",
    ),
    Condition(
        "data", ("download",), "source",
        lambda s: s.data.source not in ("digits", "parquet", "image-folder", FIELD),
        lambda s: f"data.source: {s.data.source} is never downloaded",
    ),
    Condition(
        "data", ("path",), "source",
        lambda s: s.data.source != FIELD,
        lambda s: "with data.source: field each board names its folder (data in its configuration)",
    ),
    Condition(
        "stream", ("ready_images", "ready_after"), "tasks",
        lambda s: s.data.source == FIELD,
        lambda s: f"it is for data.source: field, not {s.data.source}",
    ),
    Condition(
        "stream", ("class_order", "per_device_order", "cut"), "tasks",
        lambda s: s.data.source != FIELD,
        lambda s: "with data.source: field a task has the classes of the images that came",
    ),
    Condition(
        "fleet", ("partition", "alpha", "sigma", "test_data"), "devices",
        lambda s: s.data.source != FIELD,
        lambda s: "with data.source: field each board has images of its own",
    ),
    Condition(
        "network", ("freeze_threshold", "analysis_epochs"), "freeze",
        lambda s: s.network.freeze == "auto",
        lambda s: "it is for network.freeze: auto, and for lightcl analyze",
    ),
    Condition(
        "network", ("frozen_batch_norm",), "freeze",
        lambda s: s.freeze != "none",
        lambda s: f"nothing is frozen (network.freeze is {s.network.freeze or 'not given'}, method {s.method.name})",
    ),
    Condition(
        "server", ("strategy", "strategy_options"), "aggregation",
        lambda s: s.server.aggregation != "none",
        lambda s: "server.aggregation is none, so no weights are shared",
    ),
    Condition(
        "server", ("compression",), "aggregation",
        lambda s: s.server.aggregation != "none" or s.method.sums_statistics,
        lambda s: "server.aggregation is none, so no weights are shared",
    ),
    Condition(
        "device", ("prefix_cache_dtype", "prefix_cache_gb"), "prefix_cache",
        lambda s: s.caches_prefix,
        lambda s: "the prefix cache is not used (it needs data.views above 0 or device.prefix_cache: on, a frozen "
        "prefix, and network.frozen_batch_norm: eval)",
    ),
    Condition(
        "method", ("reduction", "held_logits", "ratio", "memory_size", "vital_selection", "memory_batch_norm"), "beta",
        _regularized,
        lambda s: "method.beta is 0, so nothing is regularized",
    ),
    Condition(
        "method", ("gamma", "fisher_samples"), "strength",
        lambda s: getattr(s.method, "strength", 1) != 0,
        lambda s: "method.strength is 0, so nothing is regularized",
    ),
    Condition(
        "method", ("intra_task", "removed_data", "removal_until"), "interval",
        _adjusted,
        lambda s: f"method.interval is {getattr(s.method, 'interval', 0)} and training.epochs only "
        f"{s.training.epochs}, so masks and data are never adjusted within a task",
    ),
    Condition(
        "method", ("removal_until",), "removed_data",
        lambda s: getattr(s.method, "removed_data", 1) != 0,
        lambda s: "method.removed_data is 0, so no sample is removed",
    ),
)  # fmt: skip


def keys_without_effect(scenario: Scenario, *, analyzed: bool = False) -> list[str]:
    """One line for each key that was given and changes nothing.

    A default that is spelled out counts only where the key that decides is left to its default: a complete scenario,
    as every run folder has one, names all keys. `analyzed`: for `lightcl analyze`, which reads two keys of its own.
    """
    lines: dict[str, str] = {}
    for condition in CONDITIONS:
        if condition.met(scenario):
            continue
        section: BaseModel = getattr(scenario, condition.section)
        given = section.model_fields_set
        for key in condition.keys:
            if key not in given or (analyzed and key in ("freeze_threshold", "analysis_epochs")):
                continue
            value, default = (
                getattr(section, key),
                type(section).model_fields[key].get_default(call_default_factory=True),
            )
            name = f"{condition.section}.{key}"
            if value != default or condition.decider not in given:
                lines.setdefault(name, f"{name}: {shown(value)} has no effect: {condition.reason(scenario)}")
    return list(lines.values())
