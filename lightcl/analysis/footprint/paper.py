"""The FLOPs and memory columns of the paper's Table 1, beside the results of its counting rules.

Wang, Cheng, Ji, Huang: "LightCL", ASP-DAC 2025 (arXiv 2407.10545). ResNet-18 of width 64, batch 32, 15 samples in the
memory or buffer; Split CIFAR-10: 5 tasks, 45,000 images, 50 epochs, 32x32; Split Tiny-ImageNet: 10 tasks, 90,000
images, 100 epochs, 64x64. MB are MiB (2^20 bytes), numbers fp32. With P the parameters, and a the outputs of the 3x3
convolutions of one image and its logits (shortcuts are not counted):

    memory  SGD, JOINT 2P + 32a; EWC + P; PNN + 4P; FDR, ER + 15a; DER++ + 30a
    FLOPs   3 forward passes per image (1 MAC = 2 FLOPs), times 47/32 or 62/32 with 15 or 30 more samples per step

For the other rows, the rules are those that come closest; `note` says what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lightcl.analysis.footprint.shapes import MIB, Block, NetworkShape, shape_of
from lightcl.analysis.footprint.theory import Footprint, Workload, footprint
from lightcl.methods.base import MethodParameters
from lightcl.networks.resnet import StagedResNet
from lightcl.scenario import method_types

WIDTH, BATCH, MEMORY = 64, 32, 15
CHANNELS_KEPT = {"stem": 0.8, "layer1": 0.8, "layer2": 0.8, "layer3": 0.3, "layer4": 0.2}
"""In the sparse variant, which removes 0.7 of the channels in layer3, 0.8 in layer4 and 0.2 elsewhere."""
SPARCL = 0.1
"""Share of the weights that SparCL keeps."""
DataName = Literal["CIFAR-10", "Tiny-ImageNet"]
DATA: tuple[DataName, ...] = ("CIFAR-10", "Tiny-ImageNet")


@dataclass(frozen=True)
class Setting:
    """One of the paper's two data sets."""

    side: int
    classes: int
    tasks: int
    images: int
    epochs: int

    @property
    def workload(self) -> Workload:
        return Workload((3, self.side, self.side), BATCH, self.epochs, (self.images // self.tasks,) * self.tasks)


SETTINGS: dict[DataName, Setting] = {
    "CIFAR-10": Setting(side=32, classes=10, tasks=5, images=45_000, epochs=50),
    "Tiny-ImageNet": Setting(side=64, classes=200, tasks=10, images=90_000, epochs=100),
}


@dataclass(frozen=True)
class Row:
    """A method as the paper names it: its sparsity, and its FLOPs and MiB on the two data sets."""

    method: str
    """Name in a scenario."""
    label: str
    sparsity: float
    flops: tuple[float, float]
    mib: tuple[float, float]
    note: str = ""


ROWS: tuple[Row, ...] = (
    Row(
        "joint", "JOINT", 0, (37.5e15, 120e16), (153.4, 357.9),
        "FLOPs: SGD's times the number of tasks; our `joint` passes over all images once per epoch, like SGD",
    ),
    Row("sgd", "SGD", 0, (7.5e15, 12e16), (153.4, 357.9)),
    Row("ewc", "EWC", 0, (7.5e15, 12e16), (196.0, 400.5)),
    Row(
        "pnn", "PNN", 0, (10.5e15, 26.4e16), (323.9, 528.4),
        "FLOPs: task t runs t - 2 earlier columns forward (t from 2); the columns take 4P for any number of tasks",
    ),
    Row("fdr", "FDR", 0, (11e15, 17.7e16), (185.4, 485.7)),
    Row("er", "ER", 0, (11e15, 17.7e16), (185.4, 485.7)),
    Row("derpp", "DER++", 0, (14.5e15, 23.3e16), (217.3, 613.5)),
    Row(
        "sparcl-er", "SparCL-ER", 0.9, (1.1e15, 1.8e16), (106.6, 407.0),
        "0.1 of ER's FLOPs and of its 2P; the paper has 1 to 2 MiB less, whatever the image size",
    ),
    Row(
        "sparcl-derpp", "SparCL-DER++", 0.9, (1.5e15, 2.3e16), (140.6, 536.8),
        "0.1 of DER++'s FLOPs and of its 2P; the paper rounds 1.45 up to 1.5",
    ),
    Row(
        "lightcl", "LightCL", 0, (5.4e15, 8.6e16), (92.8, 128.0),
        "memory: P, the suffix's gradients, its maps for 47 samples and 15 patterns; the paper does not say how the "
        "frozen part and the rest are counted (P + gradients + 47 x twice the suffix's maps + 6.4 MiB matches both)",
    ),
    Row(
        "lightcl-sparse", "LightCL", 0.9, (2.3e15, 3.7e16), (25.0, 87.1),
        "FLOPs: layers weighted by their kept outputs, not inputs. Memory: as LightCL, with the same weights; the "
        "paper's grows by 62.1 MiB from 32x32 to 64x64, more than its dense row's 35.2: removing channels cannot "
        "explain that",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A row on one data set: bytes and FLOPs as in the paper, by its rule, and by our own count (None if this project
    does not have the method)."""

    row: Row
    data: DataName
    paper_memory: float
    memory: float
    paper_flops: float
    flops: float
    own: Footprint | None


def table1() -> list[Cell]:
    """All rows on both data sets, in the paper's order."""
    cells = []
    for index, data in enumerate(DATA):
        setting = SETTINGS[data]
        dense = _shape(setting, "layer3")
        for row in ROWS:
            memory, flops = paper_memory(row, dense), paper_flops(row, dense, setting)
            own = _own_count(row, setting)
            cells.append(Cell(row, data, row.mib[index] * MIB, memory, row.flops[index], flops, own))
    return cells


# -- the paper's rules ---------------------------------------------------------------------------------------------


def paper_memory(row: Row, shape: NetworkShape) -> float:
    """Bytes by the paper's rule; `shape` is the dense network's, with layer4 as the suffix."""
    p = 4 * shape.parameters
    a = 4 * (sum(_maps(b) for b in shape.blocks) + shape.classes)
    sgd = 2 * p + BATCH * a
    if row.method.startswith("lightcl"):
        kept = CHANNELS_KEPT if row.sparsity else dict.fromkeys(CHANNELS_KEPT, 1.0)
        weights = 4 * (sum(b.parameters * kept[b.layer] for b in shape.blocks) + shape.head_parameters)
        trained = 4 * (sum(b.parameters * kept[b.layer] for b in shape.trained) + shape.head_parameters)
        maps = 4 * (sum(_maps(b) * kept[b.layer] for b in shape.trained) + shape.classes)
        return weights + trained + (BATCH + MEMORY + MEMORY) * maps
    further = {"ewc": p, "pnn": 4 * p}.get(row.method, 0) + _replayed(row) * a
    return sgd + further - (1 - SPARCL) * 2 * p * bool(row.sparsity)


def paper_flops(row: Row, shape: NetworkShape, setting: Setting) -> float:
    """FLOPs of all training by the paper's rule."""
    images = setting.images * setting.epochs
    if row.method.startswith("lightcl"):
        kept = CHANNELS_KEPT if row.sparsity else dict.fromkeys(CHANNELS_KEPT, 1.0)
        forward = sum(b.macs * kept[b.layer] for b in shape.blocks) + shape.head_macs
        suffix = sum(b.macs * kept[b.layer] for b in shape.trained) + shape.head_macs
        return 2 * images * (1 + MEMORY / BATCH) * (forward + 2 * suffix)
    passes = 3.0
    if row.method == "pnn":  # the mean over tasks t of the earlier columns it counts, max(0, t - 2)
        passes += (setting.tasks - 1) * (setting.tasks - 2) / 2 / setting.tasks
    repeats = setting.tasks if row.method == "joint" else 1
    dense = 2 * images * passes * repeats * (1 + _replayed(row) / BATCH) * shape.macs
    return dense * (SPARCL if row.sparsity else 1.0)


def _replayed(row: Row) -> int:
    name = row.method.removeprefix("sparcl-")
    return {"er": MEMORY, "fdr": MEMORY, "derpp": 2 * MEMORY}.get(name, 0)


def _maps(block: Block) -> int:
    """Stored outputs of a block's 3x3 convolutions, elements per sample."""
    return sum(c.outputs for c in block.convolutions if c.kernel == 3)


# -- our own count -------------------------------------------------------------------------------------------------


def _own_count(row: Row, setting: Setting) -> Footprint | None:
    if row.method not in method_types():
        return None
    parameters = method_types()[row.method]()
    workload = setting.workload
    if parameters.joint:
        workload = Workload(workload.image, BATCH, setting.epochs, (setting.images,))
    return footprint(_network(setting, parameters.default_freeze, parameters), parameters.cost(), workload)


def _shape(setting: Setting, freeze: str) -> NetworkShape:
    return shape_of(_network(setting, freeze), (3, setting.side, setting.side))


def _network(setting: Setting, freeze: str, parameters: MethodParameters | None = None) -> StagedResNet:
    # Only sizes are needed, except by a method that chooses by the weights' values.
    with torch.random.fork_rng(devices=[]), torch.device("meta" if _keeps_shape(parameters) else "cpu"):
        torch.manual_seed(0)
        network = StagedResNet(width=WIDTH, classes=setting.classes, freeze=freeze)
    if parameters is not None:
        parameters.shape_(network)
    return network


def _keeps_shape(parameters: MethodParameters | None) -> bool:
    return parameters is None or type(parameters).shape_ is MethodParameters.shape_
