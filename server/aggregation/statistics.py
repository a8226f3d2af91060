"""Class sums of the whole fleet, and the head that is solved from them (`method.share_statistics`).

The guard on sums. Features come from the frozen prefix, which is the same on all devices, so sums of different devices
say much the same, whatever their classes:

- the mean squared feature norm tr(G)/n is near that of the others and of the fleet's sums so far;
- the mean of every class is nearer to the fleet's mean of this class than to that of another class.

That the counts are those of the device's images is checked with its reply (server/replies.py); where the server does
not know them, sums over too many samples are scaled down (guard.py). A head that places a
class mean of the old sums, or of the reporting devices, worse than the old head did is not adopted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from lightcl.exchange.section import Guard
from lightcl.exchange.tensors import FLEET_HEAD, STATISTICS, Arrays, outgoing_head, outgoing_statistics
from lightcl.methods import Method
from lightcl.storage.state import under
from server.aggregation.robust import FEW, lower_median, not_finite

COUNT, TOTAL, GRAM = (f"{STATISTICS}{name}" for name in ("count", "total", "gram"))
WEIGHT, BIAS, KNOWN = (f"{FLEET_HEAD}{name}" for name in ("weight", "bias", "known"))

SCALE_FACTOR = 2.0
"""For tr(G)/n against the fleet's. Honest devices: 0.9 to 1.1 under Dirichlet 0.1."""

FEWEST_SAMPLES = 5
"""Of a class, for its mean to be compared."""

NEARER = 2.0
"""A class mean that is so many times nearer to another class of the fleet than to its own is labeled wrongly. Honest
devices: at most 1.3 on an untrained network with 8 images per class, else 0.6."""

WORSE = 0.1
"""The share of samples, by their class means, that a new head may place worse than the old one."""

Sums = Mapping[int, Arrays]
"""What devices reported, by device."""


class ClassSums:
    """`sums` is empty where the method shares no statistics; `head` until the first device has reported some."""

    def __init__(self, method: Method, guard: Guard, warned: Callable[[str], None]) -> None:
        self._method, self._guard, self._warned = method, guard, warned
        self.sums: Arrays = {name: np.zeros_like(array) for name, array in outgoing_statistics(method).items()}
        self.head: Arrays = {}

    def unlike_the_fleet(self, reported: Sums) -> dict[int, str]:
        """Why sums are refused, by device: features on another scale, or classes that are labeled otherwise."""
        if self._guard == "off" or not reported or f"{STATISTICS}gram" not in self.sums:
            return {}
        return _mislabeled(reported, self.sums) | _out_of_scale(reported, self.sums)

    def update_(self, reported: Sums, round_number: int) -> tuple[set[int], dict[int, str]]:
        """Adds the sums of one round and solves the head anew.

        Returns the devices whose sums are in, and why others are refused: no head can be solved from theirs. With a
        warning, none are in where the head is worse than the old one.
        """
        refused: dict[int, str] = {}
        if not reported:
            return set(), refused
        sums = _added(self.sums, reported.values())
        head = self._solve(sums)
        if head is None:  # perhaps because of one device
            for device, given in reported.items():
                if self._solve(_added(self.sums, [given])) is None:
                    refused[device] = "no finite head can be solved from its class sums"
            reported = {device: given for device, given in reported.items() if device not in refused}
            sums = _added(self.sums, reported.values())
            head = self._solve(sums) if reported else None
        problem = "no finite head can be solved from them" if head is None else ""
        if head is not None and self._guard != "off":
            problem = _worse(self.head, head, self.sums, reported)
        if head is None or problem:
            if reported:
                self._warned(f"round {round_number}: its class sums are left out: {problem}")
            return set(), refused
        self.sums, self.head = sums, head
        return set(reported), refused

    def _solve(self, sums: Arrays) -> Arrays | None:
        """The head; None where it does not exist or is not finite."""
        try:
            head = outgoing_head(self._method, sums)
        except Exception:  # of any kind: the sums were made elsewhere, and the culprit has to be found
            return None
        return head if not_finite(head) is None else None

    def state(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in (self.sums | self.head).items()}

    def restore_(self, state: Mapping[str, Tensor]) -> None:
        if self.sums:
            self.sums = {f"{STATISTICS}{n}": np.array(tensor.numpy()) for n, tensor in under(state, STATISTICS).items()}
            self.head = {f"{FLEET_HEAD}{n}": tensor.numpy() for n, tensor in under(state, FLEET_HEAD).items()}


def _added(fleet: Arrays, reported: Iterable[Arrays]) -> Arrays:
    given = list(reported)
    return {name: total + np.sum([sums[name] for sums in given], axis=0) for name, total in fleet.items()}


# -- the guard -----------------------------------------------------------------------------------------------------


def _out_of_scale(reported: Sums, fleet: Arrays) -> dict[int, str]:
    """Devices whose mean squared feature norm is far from the median of all and of the fleet's sums so far.

    Of two that differ without a third to judge, the smaller one is right.
    """
    scales = {device: _scale(sums) for device, sums in reported.items()}
    voters = [*scales.values(), *([_scale(fleet)] if fleet[COUNT].any() else [])]
    usual = lower_median(voters)
    least = usual / SCALE_FACTOR if len(voters) >= FEW else 0.0
    return {
        device: f"its features have a mean squared norm of {scale:.3g}, the fleet's {usual:.3g}"
        for device, scale in scales.items()
        if not least <= scale <= SCALE_FACTOR * usual
    }


def _scale(sums: Arrays) -> float:
    """tr(G)/n; the diagonal of the packed triangle `[d(d+1)/2]` begins each of its rows."""
    features = sums[TOTAL].shape[1]
    starts = np.cumsum([0, *range(features, 1, -1)])
    return float(sums[GRAM][starts].sum() / max(1.0, sums[COUNT].sum()))


def _mislabeled(reported: Sums, fleet: Arrays) -> dict[int, str]:
    """Devices with a class mean that is far nearer to another class of the fleet than to its own.

    The fleet's mean of a class is the median over at least three devices and the sums so far, or that of these sums. A
    class without one says nothing. Means are in units of the features' scale.
    """
    means = {device: _class_means(sums, _scale(sums)) for device, sums in reported.items()}
    so_far = _class_means(fleet, _scale(fleet))
    references: dict[int, np.ndarray] = {}
    for label in sorted({label for own in means.values() for label in own} | so_far.keys()):
        voters = [own[label] for own in [*means.values(), so_far] if label in own]
        if len(voters) >= FEW:
            references[label] = np.median(voters, axis=0)
        elif label in so_far:
            references[label] = so_far[label]
    wrong = {}
    for device, own in means.items():
        for label in [label for label in own if label in references and len(references) > 1]:
            nearest, distance = _nearest_other(own[label], label, references)
            if NEARER * distance < np.linalg.norm(own[label] - references[label]):
                wrong[device] = f"its class {label} looks like the fleet's class {nearest}: mislabeled class sums"
                break
    return wrong


def _class_means(sums: Arrays, scale: float = 1.0) -> dict[int, np.ndarray]:
    """The means `[d]` of the classes with samples enough, divided by √`scale`."""
    count, total = sums[COUNT], sums[TOTAL] / np.sqrt(max(scale, 1e-300))
    return {int(c): total[c] / count[c] for c in np.flatnonzero(count >= FEWEST_SAMPLES)}


def _nearest_other(mean: np.ndarray, label: int, references: Mapping[int, np.ndarray]) -> tuple[int, float]:
    """The nearest class other than `label`, and its distance."""
    distances = {other: float(np.linalg.norm(mean - at)) for other, at in references.items() if other != label}
    nearest = min(distances, key=lambda other: distances[other])
    return nearest, distances[nearest]


def _worse(old: Arrays, new: Arrays, fleet: Arrays, reported: Sums) -> str:
    """Why the new head is worse than the old one on class means that the old one knows; empty where it is not.

    A head places nearly all means of the sums that it was solved from. Where it does not do so for those of the fleet
    so far, or of most reporting devices, wrong sums outweigh theirs.
    """
    if not {WEIGHT, BIAS, KNOWN} <= old.keys():
        return ""
    before, after = _placed(old, old, fleet), _placed(new, old, fleet)
    if after < before - WORSE:
        return f"the new head places {after:.0%} of the fleet's class means, the old one {before:.0%}"
    falls = [_placed(old, old, sums) - _placed(new, old, sums) for sums in reported.values()]
    if lower_median(falls) > WORSE:
        return "most devices' class means are placed worse by the new head than by the old one"
    return ""


def _placed(head: Arrays, known_to: Arrays, sums: Arrays) -> float:
    """The share of samples whose class mean the head places in its class; 1 where no class is known to both."""
    means = {label: mean for label, mean in _class_means(sums).items() if known_to[KNOWN][label]}
    if not means:
        return 1.0
    labels = np.array(list(means))
    scores = np.stack(list(means.values())) @ head[WEIGHT].T.astype(np.float64) + head[BIAS]
    right = np.where(head[KNOWN] > 0, scores, -np.inf).argmax(axis=1) == labels
    return float((right * sums[COUNT][labels]).sum() / sums[COUNT][labels].sum())
