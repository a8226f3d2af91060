"""Outputs of the frozen prefix, image by image: the same in every batch, and kept on disk where the scenario says so.

The rounding of a convolution may depend on the batch size. So images pass the prefix in chunks of `CHUNK`, the last one
padded: the output of an image then depends only on the image, with any batch size and with or without the cache. The
batch-norm of the prefix is folded into its convolutions (lightcl/networks/folding.py), or computed with them in C
(lightcl/networks/unit.py).

The cache holds outputs of views of training images (lightcl/data/augment.py) and of images without augmentation: those
that a device is tested on, and training images that a method looks at as they are. Where the disk has no room, the
cache is switched off with a warning, and the run continues with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightcl.assembly import fleet_head
from lightcl.data.augment import View
from lightcl.data.batches import viewed
from lightcl.data.images import Source
from lightcl.data.tasks import Batch, Samples
from lightcl.device.arithmetic import arithmetic_of, with_arithmetic
from lightcl.device.hardware import choose_accelerator, set_up_torch
from lightcl.device.mapped import MappedWeights
from lightcl.device.network import device_network
from lightcl.errors import RequestError
from lightcl.methods.base import PrefixFeatures
from lightcl.networks import BACKBONES
from lightcl.networks.folding import folded
from lightcl.networks.native import is_native, kept_scratch
from lightcl.networks.native.library import require_library
from lightcl.networks.staged import Backbone, OnMap, Stage
from lightcl.networks.weights import digest
from lightcl.plugins import from_plugin, source_digest
from lightcl.scenario import Scenario
from lightcl.storage.files import cache_folder
from lightcl.storage.prefix_cache import SEGMENT_ROWS, CacheFull, FeatureStore, PrefixCache, size_on_disk

CHUNK = 16
FORMAT = 1
"""Part of every key; raise it when the computation of the outputs changes."""
Announced = tuple[FeatureStore, Batch, int]
"""A store, a batch with images that it lacks, and the row of one of them."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
GB = 1_000_000_000


def prefix_cache(limit_gb: float = 0.0) -> PrefixCache:
    """The stores in the cache folder; the default limit allows only reading and clearing."""
    return PrefixCache(cache_folder() / "prefix", round(limit_gb * GB))


@dataclass
class Stores:
    """The stores of one prefix: one for each view of each set of images.

    `about` is part of the key. `dtype` is the type that a store holds; None: the computed type.
    """

    cache: PrefixCache
    about: dict[str, Any]
    dtype: torch.dtype | None = None
    _open: dict[tuple[str, View | None, torch.dtype], FeatureStore] = field(default_factory=dict)

    def find(
        self, batch: Batch, shape: Callable[[], tuple[int, int, int]], computed: torch.dtype
    ) -> FeatureStore | None:
        """The store of a batch's images; None where they are not cached. Raises OSError."""
        if batch.origin is None:
            return None
        images = batch.origin.source
        view = None if batch.view is None or batch.view.augmentation == "none" else batch.view
        dtype = self.dtype or computed
        name = (images.images_digest, view, dtype)
        if name not in self._open:
            about = self.about | {
                "images": images.images_digest,
                "count": len(images),
                "view": None if view is None else [view.seed, view.number, view.augmentation, view.padding],
                "computed": str(computed).removeprefix("torch."),
                "dtype": str(dtype).removeprefix("torch."),
                "shape": shape(),
            }
            key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]
            self._open[name] = self.cache.store(key, shape(), dtype, about)
        return self._open[name]


class FixedPrefix(PrefixFeatures):
    """Prefix outputs that depend only on the image, read from `stores` where they are present.

    With `rounding` every output is rounded to that type, stored or not, as a store of that type does. Feature maps
    (`on_map`) are not cached: where a method asks for them, the batch passes the network's own prefix.
    """

    def __init__(
        self, network: Backbone, stores: Stores | None = None, rounding: torch.dtype | None = None,
        weights: MappedWeights | None = None,
    ) -> None:  # fmt: skip
        super().__init__(network)
        self.stores, self.rounding, self._weights = stores, rounding, weights
        self._stage: Stage | None = None
        self._later: Iterator[Announced] = iter(())
        self._next: Announced | None = None  # taken from `_later` already
        self._shapes: dict[tuple[int, ...], tuple[int, int, int]] = {}

    def __call__(self, batches: Sequence[Batch], on_map: OnMap | None = None) -> Tensor:
        if on_map is not None:
            return super().__call__(batches, on_map)
        with torch.no_grad():
            parts = [self._features(batch) for batch in batches]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def announce(self, batches: Iterable[Batch]) -> None:
        """A chunk that would have to be padded takes images that are asked for later instead."""
        self._later, self._next = self._absent_of(batches), None

    def _features(self, batch: Batch) -> Tensor:
        store = self._store(batch)
        if store is None or batch.origin is None:
            return self._compute(batch.images)
        rows = batch.origin.indices
        try:
            found, present = store.read(rows)
        except OSError as error:
            self._switch_off(error)
            return self._compute(batch.images)
        features = found.to(self._device, self._dtype)
        if present.all():
            if not self._needed_soon(store):
                self.release()
            return features
        missing = np.flatnonzero(~present)
        others = self._others(store, rows[missing])
        images = [batch.images[torch.from_numpy(missing)], *(other.images for _, other in others)]
        computed, *further = torch.split(self._compute(torch.cat(images)), list(map(len, images)))
        features[torch.from_numpy(missing).to(self._device)] = computed
        if self.stores is None:  # off since: another store failed
            return features
        try:
            store.write(rows[missing], computed)
            for (place, other), outputs in zip(others, further, strict=True):
                assert other.origin is not None
                place.write(other.origin.indices, outputs)
        except (CacheFull, OSError) as error:
            self._switch_off(error)
        return features

    def _others(self, store: FeatureStore, rows: np.ndarray) -> list[tuple[FeatureStore, Batch]]:
        """Announced images and the stores that lack them, for the room that `rows` of `store` leave in a chunk."""
        room, known = -len(rows) % CHUNK, {(id(store), row) for row in rows.tolist()}
        found = list[tuple[FeatureStore, Batch, list[int]]]()
        while room and (announced := self._peek()) is not None:
            self._next = None
            place, batch, row = announced
            if (id(place), row) in known:
                continue
            known.add((id(place), row))
            room -= 1
            if found and found[-1][1] is batch:
                found[-1][2].append(row)
            else:
                found.append((place, batch, [row]))
        return [(place, _again(batch, chosen).to(self._device)) for place, batch, chosen in found]

    def _needed_soon(self, store: FeatureStore) -> bool:
        """Whether the next of the announced images is one of this store's: preparing the prefix again takes time."""
        announced = self._peek() if self._stage is not None else None
        return announced is not None and announced[0] is store

    def _peek(self) -> Announced | None:
        if self._next is not None and not self._lacks(self._next[0], self._next[2]):  # stored since
            self._next = None
        if self._next is None:
            self._next = next(self._later, None)
        return self._next

    def _absent_of(self, batches: Iterable[Batch]) -> Iterator[Announced]:
        """The images of the batches that are not stored at the time when it is their turn."""
        for batch in batches:
            store = self._store(batch)
            if store is not None and batch.origin is not None:
                for row in batch.origin.indices.tolist():
                    if self._lacks(store, row):
                        yield store, batch, row

    def _lacks(self, store: FeatureStore, row: int) -> bool:
        """Whether an image is to be computed for a store; of none where the cache is off."""
        try:
            return self.stores is not None and not store.present(row)
        except OSError as error:
            self._switch_off(error)
            return False

    def release(self) -> None:
        """With a cache, the suffix alone stays in memory."""
        if self.stores is not None and self._stage is not None:
            self._stage = None
            if self._weights is not None:
                self._weights.release()

    def _compute(self, images: Tensor) -> Tensor:
        """Outputs `[N, C, H, W]` (channels-last) for uint8 images `[N, C, H, W]`."""
        if self._stage is None:
            prefix = self.network.prefix
            # In C a batch-norm is part of the convolution's pass, or a pass with the ReLU: there is nothing to fold.
            self._stage = prefix if is_native(prefix) else prefix.derive("folded", lambda: folded(self.network))
        parts = []
        # The prefix's maps are large. With a cache they seldom stand in memory, and never beside what training keeps.
        with kept_scratch(wanted=False) if self.stores is not None else nullcontext():
            for start in range(0, len(images), CHUNK):
                chunk = images[start : start + CHUNK]
                count = len(chunk)
                if count < CHUNK:
                    chunk = torch.cat([chunk, chunk.new_zeros(CHUNK - count, *chunk.shape[1:])])
                outputs = self._stage(chunk.contiguous(memory_format=torch.channels_last))[:count]
                parts.append(outputs.permute(0, 2, 3, 1))
        features = torch.cat(parts).contiguous()  # [N, H, W, C]
        if self.rounding is not None:
            features = features.to(self.rounding).to(features.dtype)
        return features.permute(0, 3, 1, 2)

    def _store(self, batch: Batch) -> FeatureStore | None:
        if self.stores is None or batch.origin is None:
            return None
        images = batch.origin.source.images
        try:
            return self.stores.find(batch, lambda: self._shape(images.shape[1:]), self._dtype)
        except OSError as error:
            self._switch_off(error)
            return None

    def _shape(self, image: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W) of the prefix's output for one image (H, W, C)."""
        if image not in self._shapes:
            name = f"shape of {image}"
            self._shapes[image] = self.network.prefix.derive(name, lambda: self._shape_of(image))
        return self._shapes[image]

    def _shape_of(self, image: tuple[int, ...]) -> tuple[int, int, int]:
        height, width, channels = image
        blank = torch.zeros(1, channels, height, width, dtype=torch.uint8, device=self._device)
        _, c, h, w = self.network.features(blank).shape
        return c, h, w

    def _switch_off(self, error: Exception) -> None:
        self.stores = None
        self.notice = f"the prefix cache is off from here on: {error}"
        warnings.warn(self.notice, RuntimeWarning, stacklevel=2)

    @property
    def _device(self) -> torch.device:
        return self.network.head.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        """The type that the prefix computes in: inside autocast, that of autocast."""
        kind = self._device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def _again(batch: Batch, rows: list[int]) -> Batch:
    """Some of the batch's images, by their rows in its source."""
    assert batch.origin is not None
    return _seen(Samples(batch.origin.source, np.array(rows)), batch.view)


def _seen(samples: Samples, view: View | None) -> Batch:
    """All samples, without augmentation where there is no view."""
    return samples.load() if view is None else viewed(samples, view)


def fixed_prefix(scenario: Scenario, network: Backbone, prefix_digest: str) -> FixedPrefix:
    """The prefix outputs of a device with `scenario.fixed_prefix`; the network must be on its accelerator."""
    if not scenario.caches_prefix:
        return FixedPrefix(network)
    device = scenario.device
    dtype = DTYPES.get(device.prefix_cache_dtype)
    stores = network.prefix.derive(
        "stores", lambda: Stores(prefix_cache(device.prefix_cache_gb), _about(scenario, network, prefix_digest), dtype)
    )
    return FixedPrefix(network, stores, dtype, _mapped(network))


def _about(scenario: Scenario, network: Backbone, prefix_digest: str) -> dict[str, Any]:
    """The part of a store's key that is the same for all images and views."""
    about = {
        "format": FORMAT,
        "network": f"{scenario.network.name}, width {network.width}, up to {scenario.freeze}",
        "source": scenario.data.source,
        "prefix": prefix_digest,
        # Rounding may depend on these:
        "torch": torch.__version__,
        "hardware": _hardware(network.head.weight.device),
        "threads": scenario.device.threads,
    }
    if is_native(network.prefix):
        about["native"] = require_library().digest
    return about | _plugin_code(scenario.network.name, network)


def _plugin_code(name: str, network: Backbone) -> dict[str, list[str]]:
    """Digests of the plugins' files that define the prefix; the built-in networks have `FORMAT` instead."""
    blocks = [module for block in network.prefix.block_modules for module in block.modules()]
    kinds = {kind for module in (network, *network.prefix.modules(), *blocks) for kind in type(module).__mro__}
    defined = [owner for owner in (BACKBONES.find(name), *kinds) if from_plugin(owner)]
    return {"code": sorted({source_digest(owner) for owner in defined})} if defined else {}


def _mapped(network: Backbone) -> MappedWeights | None:
    """The frozen prefix's weights in a file beside the cache; None where they stay in memory."""
    if network.head.weight.device.type != "cpu":
        return None
    try:
        return MappedWeights.of(network.prefix, cache_folder() / "weights")
    except OSError:  # the cache will say that there is no room
        return None


def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def check_cache_limit(scenario: Scenario, network: Backbone, image: tuple[int, ...]) -> None:
    """Raises RequestError where the cache is too small for anything; `image` is (H, W, C)."""
    if not scenario.caches_prefix:
        return
    shape = FixedPrefix(network)._shape(image)
    least = size_on_disk(1, _row_bytes(scenario, shape))
    if least > prefix_cache(scenario.device.prefix_cache_gb).limit:
        raise RequestError(
            f"device.prefix_cache_gb is {scenario.device.prefix_cache_gb:g}, but the cache grows by {SEGMENT_ROWS} "
            f"outputs of {'x'.join(map(str, shape))}, which take {_gb(least)}: raise it, or set device.prefix_cache: "
            "off"
        )


def _row_bytes(scenario: Scenario, shape: tuple[int, int, int]) -> int:
    half = arithmetic_of(scenario).precision == "bf16" or scenario.device.prefix_cache_dtype in DTYPES
    return int(np.prod(shape)) * (2 if half else 4)


def _gb(size: int) -> str:
    """GB with three digits, rounded up, so that the value is enough as a limit."""
    return f"{1.005 * size / GB:.3g}"


@dataclass(frozen=True)
class Warmed:
    """Progress of `warm`: outputs `done` of `images`, over test images and all views of training images."""

    done: int
    images: int


def warm(scenario: Scenario, source: Source, *, looked_at: bool = True, classes: int | None = None) -> Iterator[Warmed]:
    """Computes and stores every output that the scenario's devices may ask the cache for.

    `looked_at`: training images without augmentation as well, where a method only looks at them before or after a task.
    `classes`: rows of the devices' head, where they are not those of the fleet's streams; random weights depend on it.

    Raises RequestError where the scenario uses no cache, and where the cache is too small or the disk is full.
    """
    if not scenario.caches_prefix:
        raise RequestError(
            "this scenario uses no prefix cache: it needs data.views above 0 or device.prefix_cache: on, a method with "
            "a frozen prefix, and network.frozen_batch_norm: eval"
        )
    scenario = with_arithmetic(scenario)
    accelerator = choose_accelerator(scenario.device.accelerator)
    set_up_torch(accelerator, scenario.device.threads)
    rows = len(fleet_head(scenario, source)) if classes is None else classes
    network = device_network(scenario, in_channels=source.channels, classes=rows).to(accelerator).eval()
    features = fixed_prefix(scenario, network, digest(network.prefix))
    parts = list(_parts(scenario, source, looked_at))
    total, done = sum(len(samples) for samples, _ in parts), 0
    shape = features._shape(source.train.images.shape[1:])
    needed = sum(size_on_disk(len(samples), _row_bytes(scenario, shape)) for samples, _ in parts)
    if needed > prefix_cache(scenario.device.prefix_cache_gb).limit:
        raise RequestError(
            f"device.prefix_cache_gb is {scenario.device.prefix_cache_gb:g}, but {total} outputs of "
            f"{'x'.join(map(str, shape))} take {_gb(needed)}: raise it, lower data.views, or set "
            "device.prefix_cache_dtype: bf16"
        )
    for samples, view in parts:
        for start in range(0, len(samples), 8 * CHUNK):
            chosen = samples.only(slice(start, start + 8 * CHUNK))
            with (
                warnings.catch_warnings(),
                torch.autocast(accelerator.type, torch.bfloat16, enabled=scenario.device.precision == "bf16"),
            ):
                warnings.simplefilter("error", RuntimeWarning)
                try:
                    batch = _seen(chosen, view)
                    features([batch.to(accelerator)])
                except RuntimeWarning as warning:
                    raise RequestError(str(warning)) from warning
            done += len(chosen)
            yield Warmed(done, total)


def _parts(scenario: Scenario, source: Source, looked_at: bool) -> Iterator[tuple[Samples, View | None]]:
    yield Samples(source.test, np.arange(len(source.test))), None
    if looked_at or scenario.augmentation == "none" or scenario.stream.evaluate_on == "held-out":
        yield Samples(source.train, np.arange(len(source.train))), None
    if scenario.augmentation != "none":
        for number in range(scenario.data.views):
            view = View(scenario.seed, number, scenario.augmentation, scenario.data.crop_padding)
            yield Samples(source.train, np.arange(len(source.train))), view
