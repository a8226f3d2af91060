"""The guard on weights: what an accepted reply may do to the shared model. `server.guard` switches it.

Every update u_i = x_i - w (x_i: the device's weights, w: the last model) is held against the others of its round. Of K
updates with shares p_i of the examples and s_i = ⌈examples_i / batch⌉ steps per epoch, the usual norm of each is

    m_i = max(med_j ‖u_j‖, s_i · med_j ‖u_j‖/s_j) · max(1, 1/(K p_i))

A median is that of honest devices as long as they are the majority. The second term lets a device with more steps move
further, the third one whose share in the average is small. An update longer than F m_i is out of range and is clipped
to m_i; beyond 30 m_i it is left out. With one or two devices in a round the medians are over the last updates of the
run, too, and F is larger.

In a round of a few devices, an update against all others is left out, if those agree with each other: cos(u_j, u_k) > c
for all others, and cos(u_i, u_j) < -c for all j. Where the server knows that device i has the classes of the others in
the same proportions, cos(u_i, u_j) < c/6 is enough: noise has nothing in common with them. Without agreement a
direction says nothing: honest devices with different classes oppose each other as much as a flipped sign does.

Norm clipping: Sun et al., "Can you really backdoor federated learning?", 2019. Here an update out of range is cut to
the usual norm, not to the limit: three times an honest update already spoils a model of three devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from torch import Tensor, from_numpy

from lightcl.exchange.messages import ARRAYS
from lightcl.exchange.section import Guard
from lightcl.exchange.tensors import Arrays, is_statistic
from server.aggregation.robust import FEW, lower_median
from server.aggregation.weights import Contribution

FACTOR, FACTOR_OF_FEW = 2.0, 4.0
"""F from three devices on, and below. Measured on honest fleets: docs/results/reliability.md."""

COSINE, MOST_COMPARED = 0.3, 16
"""c, and the most devices of a round whose directions are compared: each pair is."""

FAR = 30.0
"""Times the usual norm: what is longer is not an update that was learned, and its direction says nothing."""

SMALLEST = 1e-3
"""An update of this share of the model's norm is never too large: where most devices hardly move."""

BATCH_NORM_FACTOR = 10.0
"""For the mean variance of a batch-norm tensor; for a shift of its means, in standard deviations."""

EXAMPLES_FACTOR = 2.0
"""Times the median of a round, where the server does not know how many images a device has."""

ALIKE = 0.95
"""The least cosine between the class counts of devices with the same classes."""

LARGE = 1e15
"""Norms beyond it are taken out before updates are multiplied."""

REMEMBERED = 50
"""Updates of earlier rounds."""

NAMED = 3
"""Devices that a warning describes."""


@dataclass
class UpdateGuard:
    """Holds the updates of a round against each other and against the last model. `batch_size` is the devices'."""

    mode: Guard
    batch_size: int
    warned: Callable[[str], None]
    _history: list[tuple[float, float, float]] = field(default_factory=list)
    """Norm, norm per step of an epoch, and examples of the last updates."""

    def bound_examples(self, contributions: Sequence[Contribution], round_number: int) -> list[Contribution]:
        """No device weighs more than the images that the server knows of, else than a multiple of the median."""
        if self.mode == "off" or not contributions:
            return list(contributions)
        given = [min(item.examples, item.images or item.examples) for item in contributions]
        median = lower_median([*given, *(self._earlier(2) if len(given) < FEW else [])])
        bounded, cut = [], {}
        for item in contributions:
            most = float(item.images or math.floor(EXAMPLES_FACTOR * median))
            if item.examples > most:
                cut[item.device] = f"{item.examples:g} examples count as {most:g}"
            bounded.append(replace(item, examples=min(item.examples, most)))
        self._warn(round_number, cut)
        return bounded

    def check(
        self, contributions: Sequence[Contribution], current: Arrays, round_number: int
    ) -> tuple[list[Contribution], dict[int, str]]:
        """The contributions that may move the model `current`, and why others are refused, by device."""
        items = [item for item in contributions if item.reply]
        if self.mode == "off" or not items:
            return list(contributions), {}
        norms, cosines = _norms_and_cosines(items, current)
        usual = self._usual_norms(items, norms, current)
        factor = FACTOR if len(items) >= FEW else FACTOR_OF_FEW
        least = SMALLEST * _norm(current)
        too_long = {
            item.device: (norm, most)
            for item, norm, most in zip(items, norms, usual, strict=True)
            if norm > max(factor * most, least)
        }
        absurd = {device for device, (norm, most) in too_long.items() if norm > FAR * max(most, least)}
        strange = _strange_batch_norm(items, current)
        opposed = _opposed(items, cosines) if cosines is not None else set()
        out = opposed | absurd
        said = strange | {d: f"its update has norm {n:.3g}, the usual is {m:.3g}" for d, (n, m) in too_long.items()}
        said |= dict.fromkeys(opposed, "its update is against those of all others, which agree")
        refused = said if self.mode == "refuse" else {}
        kept = [item for item in contributions if item.device not in refused]
        if self.mode == "clip":
            for item in items:
                if item.reply and item.device in too_long.keys() - out:
                    norm, most = too_long[item.device]
                    _shorten_(item.reply, current, most / norm)
            kept = [replace(item, batch_norm={}) if item.device in strange else item for item in kept]
            kept = [replace(item, reply=None, batch_norm={}) if item.device in out else item for item in kept]
            self._warn(round_number, {d: f"{t}; {'left out' if d in out else 'clipped'}" for d, t in said.items()})
        for item, norm in zip(items, norms, strict=True):
            if item.device not in refused and item.device not in out:
                length = too_long[item.device][1] if item.device in too_long else norm
                self._history.append((length, length / self._steps(item), item.examples))
        del self._history[:-REMEMBERED]
        return kept, {device: f"server.guard: {text}" for device, text in refused.items()}

    def state(self) -> dict[str, Tensor]:
        return {"guard/history": from_numpy(np.array(self._history))} if self._history else {}

    def restore_(self, state: Mapping[str, Tensor]) -> None:
        if "guard/history" in state:
            self._history = [(row[0], row[1], row[2]) for row in state["guard/history"].tolist()]

    def _earlier(self, column: int) -> list[float]:
        return [row[column] for row in self._history]

    def _steps(self, item: Contribution) -> int:
        return max(1, math.ceil(item.examples / self.batch_size))

    def _usual_norms(self, items: Sequence[Contribution], norms: Sequence[float], current: Arrays) -> list[float]:
        """m_i of every device."""
        steps = [self._steps(item) for item in items]
        lengths, paces = list(norms), [norm / count for norm, count in zip(norms, steps, strict=True)]
        if len(items) < FEW:
            lengths, paces = lengths + self._earlier(0), paces + self._earlier(1)
        if len(lengths) == 1:  # nothing to compare with but the model itself
            lengths, paces = [_norm(current)], [0.0]
        length, pace = lower_median(lengths), lower_median(paces)
        total = sum(item.examples for item in items)
        return [
            max(length, pace * count) * max(1.0, total / (len(items) * item.examples))
            for item, count in zip(items, steps, strict=True)
        ]

    def _warn(self, round_number: int, said: Mapping[int, str]) -> None:
        if said:
            texts = [f"device {device}: {text}" for device, text in list(said.items())[:NAMED]]
            more = f"; and {len(said) - NAMED} more devices" if len(said) > NAMED else ""
            self.warned(f"round {round_number}: server.guard: {'; '.join(texts)}{more}")


def _squares(array: np.ndarray) -> float:
    """The sum of squares, in fp64 where fp32 overflows."""
    flat = array.ravel()
    with np.errstate(over="ignore"):
        total = float(np.dot(flat, flat))
    return total if math.isfinite(total) else float(np.dot(flat.astype(np.float64), flat.astype(np.float64)))


def _norm(model: Arrays) -> float:
    return math.sqrt(sum(_squares(array) for name, array in model.items() if not is_statistic(name)))


def _norms_and_cosines(items: Sequence[Contribution], current: Arrays) -> tuple[list[float], np.ndarray | None]:
    """The norms of the updates and, of a few devices, the cosines `[K, K]` between them."""
    names = sorted(name for name in current if not is_statistic(name))
    compared = FEW <= len(items) <= MOST_COMPARED
    norms, rows = [], []
    for item in items:
        row = _update(item.reply, current, names) if item.reply else np.zeros(0, np.float32)
        norms.append(math.sqrt(_squares(row)))
        if compared:
            if norms[-1] > LARGE:  # its squares overflow in fp32
                row /= np.float32(norms[-1])
            rows.append(row)
    if not compared:
        return norms, None
    stacked = np.stack(rows)
    dots = stacked @ stacked.T
    lengths = np.sqrt(np.maximum(dots.diagonal(), 1e-30))
    return norms, dots / np.outer(lengths, lengths)


def _update(reply: Message, current: Arrays, names: Sequence[str]) -> np.ndarray:
    """u, of all tensors in one vector, fp32."""
    arrays, done = reply.content.array_records[ARRAYS], 0
    update = np.empty(sum(current[name].size for name in names), np.float32)
    for name in names:
        size = current[name].size
        np.subtract(arrays[name].numpy().ravel(), current[name].ravel(), out=update[done : done + size])
        done += size
    return update


def _opposed(items: Sequence[Contribution], cosines: np.ndarray) -> set[int]:
    """Devices whose update is against those of all others, if these agree with each other."""
    opposed = set()
    for index, item in enumerate(items):
        others = np.delete(cosines, index, axis=0)
        among = np.delete(others, index, axis=1)[~np.eye(len(items) - 1, dtype=bool)]
        most = COSINE / 6 if _same_classes(item, items) else -COSINE
        if (others[:, index] < most).all() and (among > COSINE).all():
            opposed.add(item.device)
    return opposed


def _same_classes(item: Contribution, others: Sequence[Contribution]) -> bool:
    """Whether the server knows that all have images of the same classes, in about the same proportions."""
    if item.classes is None or not item.classes.any():
        return False
    own = item.classes / np.linalg.norm(item.classes)
    return all(
        other.classes is not None and own @ other.classes >= ALIKE * np.linalg.norm(other.classes) for other in others
    )


def _shorten_(reply: Message, current: Arrays, factor: float) -> None:
    """The device's weights x become w + factor · (x - w)."""
    moved = {}
    for name, array in reply.content.array_records[ARRAYS].items():
        update = array.numpy().astype(np.float64) - current[name]
        moved[name] = Array((current[name] + factor * update).astype(np.float32))
    reply.content[ARRAYS] = ArrayRecord(moved)


def _strange_batch_norm(items: Sequence[Contribution], current: Arrays) -> dict[int, str]:
    """Devices whose batch-norm statistics are far from the round's median and from the last model's."""
    strange: dict[int, str] = {}
    for name in [name for name in current if name.endswith("running_var") and items[0].batch_norm]:
        variances = [float(item.batch_norm[name].mean(dtype=np.float64)) for item in items]
        last = float(current[name].mean())
        # One device alone is no evidence, and the statistics of a network before its first round may be far off.
        usual = max(lower_median(variances), last, 1e-12) if len(items) > 1 else BATCH_NORM_FACTOR * last
        means = name.removesuffix("var") + "mean"
        shifts = [
            float(np.sqrt(np.mean((item.batch_norm[means].astype(np.float64) - current[means]) ** 2))) for item in items
        ]
        farthest = max(lower_median(shifts) if len(items) > 1 else 0.0, math.sqrt(usual))
        for item, variance, shift in zip(items, variances, shifts, strict=True):
            if variance > BATCH_NORM_FACTOR * usual:
                strange[item.device] = f"{name} is {variance:.3g} on average, the fleet's {usual:.3g}"
            elif shift > BATCH_NORM_FACTOR * farthest:
                strange[item.device] = f"{means} is {shift:.3g} from the last model, the fleet's {farthest:.3g}"
    return strange
