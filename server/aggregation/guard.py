"""The guard on weights: what an accepted reply may do to the shared model. `server.guard` switches it.

Every update u_i = x_i - w (x_i: the device's weights, w: the last model) is held against the others of its round. Of K
updates with shares p_i of the examples and s_i = ⌈examples_i / batch⌉ steps per epoch, the usual norm of each is

    m_i = max(med_j ‖u_j‖, s_i · med_j ‖u_j‖/s_j) · max(1, 1/(K p_i))

A median is that of honest devices as long as they are the majority. The second term lets a device with more steps move
further, the third one whose share in the average is small. An update longer than F m_i is out of range and is clipped
to m_i; beyond 30 m_i it is left out. With one or two devices in a round F is larger, and the last updates of the run
count too: of two devices the shorter update or the median with those before, whichever is longer, since the first
updates of a task are many times as long as the last ones of the task before; of one device the longest before.

In a round of a few devices, an update against all others is left out, if those agree with each other: cos(u_j, u_k) > c
for all others, and cos(u_i, u_j) < -c for all j. Without agreement a direction says nothing: honest devices with
different classes oppose each other as much as a flipped sign does.

So is an update that has nothing in common with any other, if each of these has something in common with one of them.
Two updates have in common

    r_ij = 1/T · sum over the tensors t of d_t cos²(u_it, u_jt)

with d_t the size of tensor t. Where one of them is noise, d_t cos² has the mean 1 in each tensor, whatever the other is
(chi-squared of one degree of freedom, nearly), so that r is 1 ± √(2/T). Honest updates with different classes may be
orthogonal as a whole, but not in all tensors.

Batch-norm statistics are held against the last model's in the same way, layer by layer. With means μ and standard
deviations σ of C channels, those of the last model with index w, a device's shift in standard deviations is

    d = √(1/C Σ_c (μ_c - μ_wc)² + (σ_c - σ_wc)²) / √(1/C Σ_c σ_wc²),

the Wasserstein distance of normal distributions. The usual shift of each device is that of the formula above with d in
place of the norm. Statistics that are shifted by more than F times the usual in a layer are not averaged; in rounds of
one or two devices, which cannot say who is right, μ and σ of this layer move a part of the way, as far as is usual.

Norm clipping: Sun et al., "Can you really backdoor federated learning?", 2019. Here an update out of range is cut to
the usual norm, not to the limit: three times an honest update already spoils a model of three devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from flwr.app import Message
from torch import Tensor, from_numpy

from lightcl.exchange.messages import ARRAYS
from lightcl.exchange.section import Guard
from lightcl.exchange.tensors import Arrays, is_statistic
from server.aggregation.robust import FEW, lower_median
from server.aggregation.statistics import COUNT
from server.aggregation.weights import Contribution
from server.arrays import plain_record

FACTOR, FACTOR_OF_FEW = 2.0, 4.0
"""F from three devices on, and below. Measured on honest fleets: docs/results/reliability.md."""

COSINE, MOST_COMPARED = 0.3, 16
"""c, and the most devices of a round whose directions are compared: each pair is."""

NOISE, RELATED = 2.5, 100.0
"""r below the first is that of noise; above the second two updates have something in common. Where two honest devices
were related, a third honest one had 4.8 or more with one of them: docs/results/reliability.md."""

FAR = 30.0
"""Times the usual norm: what is longer is not an update that was learned, and its direction says nothing."""

SMALLEST = 1e-3
"""An update of this share of the model's norm is never too large: where most devices hardly move."""

BATCH_NORM_FACTOR = 10.0
"""Statistics beyond this are not averaged at all: the mean variance of a batch-norm tensor; a shift of its means, in
standard deviations."""

SMALLEST_SHIFT = 0.1
"""A shift of so many standard deviations is never too large: where most devices hardly move."""

EXAMPLES_FACTOR = 2.0
"""Times the median of a round, where the server does not know how many images a device has."""

BLOCK = 2**18
"""Values of all updates together that are multiplied at once: those of several updates stay in a cache of 1 MiB."""

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
    _shifts: list[list[float]] = field(default_factory=list)
    """Shifts of the batch-norm statistics of the last updates, by layer, and after them the shifts per step."""

    def bound_examples(self, contributions: Sequence[Contribution], round_number: int) -> list[Contribution]:
        """No device weighs more than the images that the server knows of, else than a multiple of the median.

        Class sums are over as many samples as examples are reported: they are scaled, which keeps the classes' means.
        """
        if self.mode == "off" or not contributions:
            return list(contributions)
        given = [min(item.examples, item.images or item.examples) for item in contributions]
        median = lower_median([*given, *(self._earlier(2) if len(given) < FEW else [])])
        bounded, cut = [], {}
        for item in contributions:
            most = float(item.images or math.floor(EXAMPLES_FACTOR * median))
            if item.examples > most:
                cut[item.device] = f"{item.examples:g} examples count as {most:g}"
            bounded.append(_weighing_at_most(item, most))
        self._warn(round_number, cut)
        return bounded

    def check(
        self, contributions: Sequence[Contribution], current: Arrays, round_number: int
    ) -> tuple[list[Contribution], dict[int, str]]:
        """The contributions that may move the model `current`, and why others are refused, by device."""
        items = [item for item in contributions if item.reply]
        if self.mode != "off" and not items:  # without weights, examples alone are held against earlier rounds
            self._history = [*self._history, *((0.0, 0.0, item.examples) for item in contributions)][-REMEMBERED:]
        if self.mode == "off" or not items:
            return list(contributions), {}
        norms, directions = _compared(items, current)
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
        layers = _layers(items, current)
        shifts = _shifts(items, current, layers)
        usual_shifts = self._usual_shifts(items, shifts)
        parts, shifted = _too_far(
            items, layers, shifts, np.maximum(factor * usual_shifts, SMALLEST_SHIFT), usual_shifts
        )
        opposed = {items[index].device: text for index, text in (directions.outliers() if directions else {}).items()}
        out = opposed.keys() | absurd
        said = {d: f"its update has norm {n:.3g}, the usual is {m:.3g}" for d, (n, m) in too_long.items()} | opposed
        if len(items) >= FEW:
            strange = shifted | strange
        for device, text in (shifted | strange).items():
            said[device] = f"{said[device]}; {text}" if device in said else text
        refused = said if self.mode == "refuse" else {}
        kept = [item for item in contributions if item.device not in refused]
        if self.mode == "clip":
            for item in items:
                if item.reply and item.device in too_long.keys() - out:
                    norm, most = too_long[item.device]
                    _shorten_(item.reply, current, most / norm)
            kept = [_without_far_statistics(item, current, parts.get(item.device, {})) for item in kept]
            kept = [replace(item, batch_norm={}) if item.device in strange else item for item in kept]
            kept = [replace(item, reply=None, batch_norm={}) if item.device in out else item for item in kept]
            lost = out | (strange.keys() - too_long.keys())
            self._warn(round_number, {d: f"{t}; {'left out' if d in lost else 'clipped'}" for d, t in said.items()})
        for index, item in enumerate(items):
            if item.device not in refused and item.device not in out:
                length = min(norms[index], usual[index])  # so that a device alone cannot raise it round by round
                self._history.append((length, length / self._steps(item), item.examples))
                ways = np.minimum(shifts[:, index], usual_shifts[:, index])
                self._shifts.append([*ways.tolist(), *(ways / self._steps(item)).tolist()])
        del self._history[:-REMEMBERED], self._shifts[:-REMEMBERED]
        return kept, {device: f"server.guard: {text}" for device, text in refused.items()}

    def state(self) -> dict[str, Tensor]:
        saved: dict[str, Sequence[Sequence[float]]] = {"guard/history": self._history, "guard/shifts": self._shifts}
        return {name: from_numpy(np.array(rows)) for name, rows in saved.items() if rows and len(rows[0])}

    def restore_(self, state: Mapping[str, Tensor]) -> None:
        if "guard/history" in state:
            self._history = [(row[0], row[1], row[2]) for row in state["guard/history"].tolist()]
        if "guard/shifts" in state:
            self._shifts = state["guard/shifts"].tolist()

    def _earlier(self, column: int) -> list[float]:
        return [row[column] for row in self._history]

    def _steps(self, item: Contribution) -> int:
        return max(1, math.ceil(item.examples / self.batch_size))

    def _usual(
        self, items: Sequence[Contribution], norms: Sequence[float], earlier: Sequence[Sequence[float]], alone: float
    ) -> list[float]:
        """m_i of every device. `earlier` are norms of the last updates and those per step.

        `alone` stands for them where a device has nothing else to be compared with.
        """
        steps = [self._steps(item) for item in items]
        lengths, paces = list(norms), [norm / count for norm, count in zip(norms, steps, strict=True)]
        if len(items) < FEW:
            lengths, paces = lengths + [row[0] for row in earlier], paces + [row[1] for row in earlier]
        if len(lengths) == 1:
            lengths, paces = [alone], [0.0]
        length, pace = lower_median(lengths), lower_median(paces)
        if len(items) == 2:
            length, pace = max(length, min(norms)), max(pace, min(paces[:2]))
        elif len(items) == 1 and earlier:
            length, pace = max(row[0] for row in earlier), max(row[1] for row in earlier)
        total = sum(item.examples for item in items)
        return [
            max(length, pace * count) * max(1.0, total / (len(items) * item.examples))
            for item, count in zip(items, steps, strict=True)
        ]

    def _usual_norms(self, items: Sequence[Contribution], norms: Sequence[float], current: Arrays) -> list[float]:
        """m_i of every device, for its weights."""
        return self._usual(items, norms, [row[:2] for row in self._history], alone=_norm(current))

    def _usual_shifts(self, items: Sequence[Contribution], shifts: np.ndarray) -> np.ndarray:
        """m_i of every device in each layer, `[layers, devices]` as `shifts`."""
        found = np.zeros_like(shifts)
        for layer, given in enumerate(shifts):
            earlier = [(row[layer], row[len(shifts) + layer]) for row in self._shifts]
            found[layer] = self._usual(items, given.tolist(), earlier, alone=BATCH_NORM_FACTOR)
        return found

    def _warn(self, round_number: int, said: Mapping[int, str]) -> None:
        if said:
            texts = [f"device {device}: {text}" for device, text in list(said.items())[:NAMED]]
            more = f"; and {len(said) - NAMED} more devices" if len(said) > NAMED else ""
            self.warned(f"round {round_number}: server.guard: {'; '.join(texts)}{more}")


def _weighing_at_most(item: Contribution, most: float) -> Contribution:
    samples = float(item.sums[COUNT].sum()) if COUNT in item.sums else 0.0
    sums = item.sums
    if samples > most:
        sums = {name: array * (most / samples) for name, array in item.sums.items()}
    return replace(item, examples=min(item.examples, most), sums=sums)


def _norm(model: Arrays) -> float:
    return math.sqrt(sum(float(_lower_products(model[name].reshape(1, -1))[0, 0]) for name in _learned(model)))


def _learned(model: Arrays) -> list[str]:
    return sorted(name for name in model if not is_statistic(name))


@dataclass(frozen=True)
class Directions:
    """The directions of a round's updates against each other, `[K, K]` each: cosines, and what they have in common (r).

    r is infinite where no tensor has moved in both.
    """

    cosines: np.ndarray
    common: np.ndarray

    @classmethod
    def of(cls, products: np.ndarray, sizes: np.ndarray) -> Self:
        """From the scalar products by tensor `[T, K, K]`, and the tensors' sizes `[T]`."""
        dots = products.sum(axis=0)
        lengths = np.sqrt(np.maximum(dots.diagonal(), 1e-30))
        by_tensor = np.sqrt(products.diagonal(axis1=1, axis2=2))
        outer = by_tensor[:, :, None] * by_tensor[:, None, :]
        moved = outer > 0
        with np.errstate(invalid="ignore"):  # values that overflow fp32: a comparison with not-a-number is false
            squares = np.divide(products, outer, out=np.zeros_like(products), where=moved) ** 2
        total, tensors = np.tensordot(sizes.astype(float), squares, 1), moved.sum(axis=0)
        common = np.divide(total, tensors, out=np.full_like(total, np.inf), where=tensors > 0)
        return cls(dots / np.outer(lengths, lengths), common)

    def outliers(self) -> dict[int, str]:
        """The updates to be left out, by their place, and why."""
        found = {}
        for index in range(len(self.cosines)):
            others = np.delete(np.arange(len(self.cosines)), index)
            pairs = np.ix_(others, others)
            apart = ~np.eye(len(others), dtype=bool)
            if (self.cosines[index, others] < -COSINE).all() and (self.cosines[pairs][apart] > COSINE).all():
                found[index] = "its update is against those of all others, which agree"
            related = np.where(apart, self.common[pairs], 0.0).max(axis=1)
            if (self.common[index, others] < NOISE).all() and (related > RELATED).all():
                found[index] = "its update has nothing in common with any other, as noise has not"
        return found


def _compared(items: Sequence[Contribution], current: Arrays) -> tuple[list[float], Directions | None]:
    """The norms of the updates and, of a few devices, their directions."""
    if not FEW <= len(items) <= MOST_COMPARED:
        return [math.sqrt(_products([item], current).sum()) for item in items], None
    products = _products(items, current)
    sizes = np.array([current[name].size for name in _learned(current)])
    return np.sqrt(products.sum(axis=0).diagonal()).tolist(), Directions.of(products, sizes)


def _products(items: Sequence[Contribution], current: Arrays) -> np.ndarray:
    """The scalar products of the updates, by tensor: fp64 `[T, K, K]`.

    Blocks of the updates are computed and multiplied while they are in the processor's cache; none is kept.
    """
    names = _learned(current)
    records = [item.reply.content.array_records[ARRAYS] for item in items if item.reply]  # a copy at each call
    products = np.zeros((len(names), len(items), len(items)))
    length = min(BLOCK // len(items), max(current[name].size for name in names))
    block = np.empty((len(items), length), np.float32)
    for product, name in zip(products, names, strict=True):
        model = current[name].ravel()
        devices = [record[name].numpy().ravel() for record in records]
        for start in range(0, len(model), length):
            before = model[start : start + length]
            updates = block[:, : len(before)]
            for row, values in zip(updates, devices, strict=True):
                np.subtract(values[start : start + length], before, out=row)
            product += _lower_products(updates)
    return products + np.tril(products, -1).swapaxes(1, 2)


def _lower_products(updates: np.ndarray) -> np.ndarray:
    """The lower triangle of u uᵀ for rows `[K, n]`, in fp64 where fp32 overflows.

    Row by row: BLAS's product of a matrix with its transpose takes three times as long for so few rows.
    """
    products = np.zeros((len(updates), len(updates)))
    with np.errstate(over="ignore", invalid="ignore"):
        for index, row in enumerate(updates):
            products[index, : index + 1] = updates[: index + 1] @ row
    if updates.dtype == np.float32 and not np.isfinite(products).all():
        return _lower_products(updates.astype(np.float64))
    return products


def _shorten_(reply: Message, current: Arrays, factor: float) -> None:
    """The device's weights x become w + factor · (x - w)."""
    moved = {}
    for name, array in reply.content.array_records[ARRAYS].items():
        update = array.numpy().astype(np.float64) - current[name]
        moved[name] = (current[name] + factor * update).astype(np.float32)
    reply.content[ARRAYS] = plain_record(moved)


def _layers(items: Sequence[Contribution], current: Arrays) -> list[str]:
    """The batch-norm layers whose statistics are shared."""
    ending = ".running_var"
    return [name.removesuffix(ending) for name in current if name.endswith(ending)] if items[0].batch_norm else []


def _moments(arrays: Arrays, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of a layer, `[C]` each, in fp64."""
    means, variances = (arrays[f"{layer}.running_{name}"].astype(np.float64) for name in ("mean", "var"))
    return means, np.sqrt(variances)


def _shifts(items: Sequence[Contribution], current: Arrays, layers: Sequence[str]) -> np.ndarray:
    """How far statistics are from the last model's, in its standard deviations, `[layers, devices]`."""
    shifts = np.zeros((len(layers), len(items)))
    for row, layer in zip(shifts, layers, strict=True):
        means, deviations = _moments(current, layer)
        unit = math.sqrt(max(float((deviations**2).mean()), 1e-12))
        for index, item in enumerate(items):
            own = _moments(item.batch_norm, layer)
            row[index] = math.sqrt(float(((own[0] - means) ** 2 + (own[1] - deviations) ** 2).mean())) / unit
    return shifts


def _too_far(
    items: Sequence[Contribution], layers: Sequence[str], shifts: np.ndarray, limits: np.ndarray, usual: np.ndarray
) -> tuple[dict[int, dict[str, float]], dict[int, str]]:
    """Devices with layers whose statistics are shifted beyond `limits`: the part of the way that the usual shift is, by
    layer, and a text about the farthest."""
    parts: dict[int, dict[str, float]] = {}
    texts: dict[int, str] = {}
    for index, item in enumerate(items):
        far = [layer for layer in range(len(layers)) if shifts[layer, index] > limits[layer, index]]
        if far:
            cut = {layers[k]: float(usual[k, index] / shifts[k, index]) for k in far}
            worst = min(far, key=lambda k: cut[layers[k]])
            parts[item.device] = cut
            texts[item.device] = (
                f"statistics of {layers[worst]} are {shifts[worst, index]:.3g} standard deviations from the last "
                f"model's, the usual is {usual[worst, index]:.3g}"
            )
    return parts, texts


def _without_far_statistics(item: Contribution, current: Arrays, parts: Mapping[str, float]) -> Contribution:
    """The device's statistics; those of the layers in `parts` move only this part of the way from the last model's."""
    moved: Arrays = {}
    for layer, part in parts.items():
        before, own = _moments(current, layer), _moments(item.batch_norm, layer)
        means, deviations = (last + part * (given - last) for last, given in zip(before, own, strict=True))
        moved[f"{layer}.running_mean"] = means.astype(np.float32)
        moved[f"{layer}.running_var"] = (deviations**2).astype(np.float32)
    return replace(item, batch_norm=item.batch_norm | moved) if moved else item


def _strange_batch_norm(items: Sequence[Contribution], current: Arrays) -> dict[int, str]:
    """Devices whose batch-norm statistics are far from the round's median and from the last model's."""
    strange: dict[int, str] = {}
    for name in [name for name in current if name.endswith("running_var") and items[0].batch_norm]:
        variances = np.array([item.batch_norm[name] for item in items]).mean(axis=1, dtype=np.float64)
        last = float(current[name].mean())
        # One device alone is no evidence, and the statistics of a network before its first round may be far off.
        usual = max(lower_median(variances), last, 1e-12) if len(items) > 1 else BATCH_NORM_FACTOR * last
        means = name.removesuffix("var") + "mean"
        moved = np.array([item.batch_norm[means] for item in items], np.float64) - current[means]
        shifts = np.sqrt((moved**2).mean(axis=1))
        farthest = max(lower_median(shifts) if len(items) > 1 else 0.0, math.sqrt(usual))
        for item, variance, shift in zip(items, variances, shifts, strict=True):
            if variance > BATCH_NORM_FACTOR * usual:
                strange[item.device] = f"{name} is {variance:.3g} on average, the fleet's {usual:.3g}"
            elif shift > BATCH_NORM_FACTOR * farthest:
                strange[item.device] = f"{means} is {shift:.3g} from the last model, the fleet's {farthest:.3g}"
    return strange
