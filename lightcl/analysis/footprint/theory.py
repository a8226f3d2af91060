"""FLOPs of training, and the memory of a training step by category, counted from the network's shapes.

The memory is that of the step's peak. The step is simulated operation by operation with sizes instead of numbers: what
the implementation allocates, what autograd keeps for the backward pass, and when each is released.

    prefix     no graph: a block's input, its two convolutions' outputs and one batch-norm's output at a time
    forward    kept of each block: both convolutions' outputs (batch-norm needs them), both maps after ReLU (in place;
               the next convolution needs them), and the shortcut convolution's output
    backward   from the last block to the first; weight gradients are allocated, kept activations released
    save       after the task: copies of tensors that are channels-last in memory

Not counted: index and label tensors, batch-norm statistics of a batch, and memory that libraries allocate outside of
PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from lightcl.analysis.footprint.shapes import Block, Convolution, Image, NetworkShape, shape_of
from lightcl.data.tasks import TaskStream
from lightcl.device.arithmetic import Convolutions, arithmetic_of
from lightcl.device.prefix import CHUNK
from lightcl.methods.base import StepCost
from lightcl.networks.native.calls import Pass
from lightcl.networks.native.convolution import multiplies_half, scratch_size, suits_half
from lightcl.networks.staged import Backbone
from lightcl.networks.winograd import parts
from lightcl.scenario import Scenario
from lightcl.storage.state import GENERATIONS

Category = Literal[
    "parameters", "gradients", "optimizer state", "kept activations", "frozen part", "temporaries", "buffer",
    "weight copies", "patterns", "statistics", "masks",
]  # fmt: skip
CATEGORIES: tuple[Category, ...] = get_args(Category)
MEANINGS: dict[Category, str] = {
    "parameters": "weights, and batch-norm's statistics",
    "gradients": "of the weights",
    "optimizer state": "momentum, or the two moments of adam and adamw",
    "kept activations": "what the backward pass needs",
    "frozen part": "working memory of the prefix",
    "temporaries": "gradients of activations, and what a convolution takes while it runs",
    "buffer": "images and logits of old samples, and the batch",
    "weight copies": "further tensors of the weights' size",
    "patterns": "feature patterns and the memory samples' prefix outputs",
    "statistics": "class sums, and the head solved from them",
    "masks": "vital channels, or masked weights",
}

Disk = Literal["state", "prefix cache"]
"""state: trained weights, the optimizer's numbers and all that the method keeps, with its replay buffer."""

FP32, BF16 = 4, 2
LAYOUTS = {"cpu": (1, 3), "cuda": (0, 1)}
"""Copies of a convolution's weights that exist while it runs, forward and backward. On the CPU, oneDNN uses its own
layout: the weights are converted into it, and their gradient is converted back through two others."""
REARRANGED, PART = 650_000, 0.55
"""What each thread of a product in bf16 rearranges of the patches at a time: most bytes, and of a few patches the part.
Measured with PyTorch 2.14: 0.5 to 0.6 of up to 1.1 MB, 640 to 710 KB of 2.2 to 6.9 MB."""


@dataclass(frozen=True)
class Workload:
    """The training data: `images` per task, in the order of the tasks; joint training has one task."""

    image: Image
    batch: int
    epochs: int
    images: tuple[int, ...]
    precision: Literal["fp32", "bf16"] = "fp32"
    momentum: bool = False
    weight_decay: bool = False
    accelerator: str = "cpu"
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    at_once: bool = False
    """`training.update: at-once`: a gradient is applied and released as soon as it is complete."""
    prefix: Literal["batch", "fixed", "cached"] = "batch"
    """How the prefix is computed. batch: batch by batch; fixed: a few images at a time, with batch-norm folded into a
    copy (not in C); cached: the same, and kept on disk: prefix and copy are in memory only while something is
    computed."""
    convolutions: Convolutions = "direct"
    """`device.convolutions`; on other accelerators than the CPU all are direct."""
    cached_outputs: int = 0
    """Prefix outputs in the cache when all tasks are learned, at most: of every view of the device's training images,
    of these images without augmentation (a method looks at some or all of them), and of its test images."""
    cache_bytes: int = FP32
    """Bytes per number in the cache."""
    threads: int = 1
    """`device.threads`: convolutions in C have scratch memory for each."""

    @property
    def optimizer_copies(self) -> int:
        """Numbers that the optimizer keeps per trained weight."""
        return int(self.momentum) if self.optimizer == "sgd" else 2

    @property
    def tasks(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Footprint:
    """One device: bytes by category at the peak of a training step, and FLOPs of all its training (1 MAC = 2 FLOPs)."""

    memory: dict[Category, int]
    disk: dict[Disk, int]
    """Bytes on the device's disk after the last task."""
    moment: str
    """Where in the step the peak is, for example "backward layer4.0.conv2"."""
    step_flops: int
    training_flops: int

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak}


def workload_of(scenario: Scenario, stream: TaskStream, image: Image, accelerator: str = "cpu") -> Workload:
    training, arithmetic = scenario.training, arithmetic_of(scenario)
    train, test = sum(len(task.train) for task in stream), sum(len(task.test) for task in stream)
    views = 1 if scenario.augmentation == "none" else scenario.data.views + 1  # and as they are, for the method
    half = arithmetic.precision == "bf16" or scenario.device.prefix_cache_dtype != "exact"
    return Workload(
        image,
        training.batch_size,
        training.epochs,
        tuple(len(stream.to_learn(task).train) for task in range(stream.first, len(stream))),
        arithmetic.precision,
        training.momentum > 0,
        training.weight_decay > 0,
        accelerator,
        training.optimizer,
        training.update == "at-once",
        ("cached" if scenario.caches_prefix else "fixed") if scenario.fixed_prefix else "batch",
        arithmetic.convolutions if accelerator == "cpu" else "direct",
        (views * train + test) * scenario.caches_prefix,
        BF16 if half else FP32,
        scenario.device.threads,
    )


def footprint(network: Backbone, cost: StepCost, workload: Workload) -> Footprint:
    """The count for a step of the last task, when a method has stored everything that it stores."""
    shape = shape_of(network, workload.image)
    step = _Step(shape, cost, workload)
    step.play()
    disk: dict[Disk, int] = {
        "state": GENERATIONS * step.saved,
        "prefix cache": workload.cached_outputs * shape.features * workload.cache_bytes,
    }
    return Footprint(
        step.worst, disk, step.moment, step_flops(shape, cost, workload), training_flops(shape, cost, workload)
    )


# -- FLOPs ---------------------------------------------------------------------------------------------------------


def step_flops(shape: NetworkShape, cost: StepCost, workload: Workload, *, first_task: bool = False) -> int:
    """FLOPs of one full step, forward and backward. Convolutions and the head count; batch-norm and ReLU do not."""
    columns = (workload.tasks - 1) * cost.columns
    macs = (workload.batch + cost.replayed) * (shape.macs + backward_macs(shape))
    macs += (workload.batch + cost.replayed) * columns * trained_macs(shape)
    if not first_task:
        macs += cost.suffix_samples * (trained_macs(shape) + backward_macs(shape))
    return 2 * macs


def training_flops(shape: NetworkShape, cost: StepCost, workload: Workload) -> int:
    """FLOPs of all epochs of all tasks. Patterns count from the second task on; old samples count in every task."""
    image = shape.macs + backward_macs(shape)
    total = 0
    for task, images in enumerate(workload.images):
        steps = -(-images // workload.batch)
        further = steps * cost.replayed * image
        if task > 0:
            further += steps * cost.suffix_samples * (trained_macs(shape) + backward_macs(shape))
        further += task * cost.columns * (images + steps * cost.replayed) * trained_macs(shape)
        total += workload.epochs * (images * image + further)
    return 2 * total


def trained_macs(shape: NetworkShape) -> int:
    """MACs of one sample's forward pass through suffix and head."""
    return sum(b.macs for b in shape.trained) + shape.head_macs


def backward_macs(shape: NetworkShape) -> int:
    """MACs of one sample: every trained layer has gradients of its weights and of its inputs, each with as many MACs as
    the forward pass; the input of the first trained block needs no gradient."""
    macs = 2 * trained_macs(shape)
    if shape.trained:
        first = shape.trained[0]
        macs -= first.first.macs + (first.shortcut.macs if first.shortcut else 0)
    else:
        macs -= shape.head_macs
    return macs


# -- memory --------------------------------------------------------------------------------------------------------


class _Step:
    """Simulates a step and records its peak."""

    def __init__(self, shape: NetworkShape, cost: StepCost, workload: Workload) -> None:
        self.shape, self.cost, self.workload = shape, cost, workload
        self.size = BF16 if workload.precision == "bf16" else FP32
        self.layouts = LAYOUTS[workload.accelerator]
        self.live: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self.worst, self.moment = dict(self.live), ""
        self.cast: set[str] = set()  # weights of which autocast holds a copy
        self.begun: set[str] = set()  # weights whose gradients are allocated, after the first pass or later
        self.scratch = 0  # bytes that winograd.c's passes use one after another

    def allocate(self, category: Category, amount: float) -> None:
        """Allocates `amount` bytes; a negative amount releases them."""
        self.live[category] += int(amount)

    def note(self, moment: str, category: Category = "temporaries", amount: float = 0) -> None:
        """Records this moment, with `amount` temporary bytes in `category`, if it is the peak so far."""
        here = self.live | {category: self.live[category] + int(amount)}
        if sum(here.values()) > sum(self.worst.values()):
            self.worst, self.moment = here, moment

    # -- the parts of a step -----------------------------------------------------------------------------------

    def play(self) -> None:
        shape, cost, workload = self.shape, self.cost, self.workload
        samples = workload.batch + cost.replayed
        self._allocate_permanent()
        prefix = self._prefix if workload.prefix == "batch" or not shape.frozen else self._fixed_prefix
        # Before the first step of a task the memory samples pass through the prefix, possibly more than a batch; the
        # task's optimizer has no state yet.
        state = self.live["optimizer state"]
        self.allocate("optimizer state", -state)
        prefix(cost.pattern_samples)
        self.allocate("optimizer state", state)
        if workload.prefix == "cached":
            prefix(samples)
            self._keep_scratch(samples)
        else:
            self._keep_scratch(samples)
            prefix(samples)
        if cost.joint_pass:
            self._play_joint(samples + cost.suffix_samples)
            return
        if shape.frozen:
            self.allocate("kept activations", samples * shape.features * self.size)
        self._forward(samples)
        if cost.suffix_samples:
            self._forward(cost.suffix_samples)
            drifts = self._vital_share * sum(b.maps for b in shape.trained) * cost.suffix_samples * FP32
            self.allocate("kept activations", drifts)
            self.note("regularization", "temporaries", drifts)
            self._backward(cost.suffix_samples, last=False)
            self.allocate("kept activations", -drifts)
        self._backward(samples, last=True)
        self._end()

    def _play_joint(self, samples: int) -> None:
        """One pass of the batch and the memory samples."""
        shape, cost = self.shape, self.cost
        if shape.frozen:
            self.note("joined features", "temporaries", 2 * samples * shape.features * self.size)
            self.allocate("kept activations", samples * shape.features * self.size)
        self._forward(samples)
        drifts = int(self._vital_share * sum(b.maps for b in shape.trained) * cost.suffix_samples * FP32)
        self.allocate("kept activations", drifts)
        self.note("regularization", "temporaries", drifts)
        self._backward(samples, last=True)
        self.allocate("kept activations", -drifts)
        self._end()

    def _end(self) -> None:
        if temporaries := self._optimizer_temporaries:
            self.note("optimizer's step", "temporaries", temporaries)
        self.allocate("gradients", -self.live["gradients"])
        self.allocate("optimizer state", -self.live["optimizer state"])  # the next task has an optimizer of its own
        self.allocate("temporaries", -self.scratch)
        self.note("saved state", "temporaries", self._saved_copies)

    @property
    def saved(self) -> int:
        """Bytes of the saved state."""
        fresh = _Step(self.shape, self.cost, self.workload)
        fresh._allocate_permanent()
        frozen = sum(b.parameters + sum(c.norm for c in b.convolutions) for b in fresh._present if b.frozen) * FP32
        batch = (self.workload.batch + self.cost.replayed) * _pixels(self.workload.image)
        return sum(fresh.live.values()) - fresh.live["frozen part"] - frozen - batch

    @property
    def _present(self) -> Sequence[Block]:
        """The blocks whose weights are in memory while training."""
        return self.shape.trained if self.workload.prefix == "cached" else self.shape.blocks

    @property
    def _saved_copies(self) -> int:
        """Bytes copied while the state is saved: files store tensors contiguously, but the weights of larger kernels
        are channels-last in memory. From a GPU the copies go to the host's memory."""
        if self.workload.accelerator != "cpu":
            return 0
        copied = sum(c.weights for b in self.shape.trained for c in b.convolutions if c.kernel > 1)
        return (1 + self.cost.weight_copies) * copied * FP32

    @property
    def _optimizer_temporaries(self) -> int:
        """Temporary bytes of the optimizer's step.

        Weight decay that is added to the gradients copies one of them. Adam computes the square root of the second
        moment and a quotient: tensor by tensor on the CPU, for all tensors at once on a GPU.
        """
        shape, workload = self.shape, self.workload
        biggest = max((c.weights for b in shape.trained for c in b.convolutions), default=shape.head_parameters)
        adam, decay = workload.optimizer != "sgd", workload.weight_decay and workload.optimizer != "adamw"
        if adam and workload.accelerator == "cuda":
            return (1 + decay) * shape.trained_parameters * FP32
        return (2 * adam + decay) * biggest * FP32

    @property
    def _vital_share(self) -> float:
        """Share of channels that are vital in the last task, if those of all earlier tasks differ."""
        return min(1.0, self.cost.vital_ratio * (self.workload.tasks - 1))

    @property
    def _columns(self) -> int:
        """Columns of earlier tasks."""
        return (self.workload.tasks - 1) * self.cost.columns

    @property
    def _boundaries(self) -> list[Block]:
        """The last trained block of each layer, after which a column reads earlier columns; empty without columns."""
        blocks = self.shape.trained if self._columns else ()
        return [b for b, after in zip(blocks, (*blocks[1:], None), strict=False) if not after or b.layer != after.layer]

    def _lateral(self, block: Block) -> int:
        """Elements per sample that an adapter keeps: its input, the inputs of both convolutions, and the sum."""
        return (self._columns + 3) * block.outputs if block in self._boundaries else 0

    def _allocate_permanent(self) -> None:
        shape, cost, workload = self.shape, self.cost, self.workload
        trained = shape.trained_parameters * FP32
        norms = sum(c.norm for b in self._present for c in b.convolutions)  # as many statistics as affine parameters
        weights = sum(b.parameters for b in self._present) + shape.head_parameters
        adapters = sum(_adapter(b, k) for b in self._boundaries for k in range(1, self._columns + 1))
        self.allocate("parameters", (weights + norms + adapters) * FP32 + self._columns * trained)
        if workload.prefix == "fixed":
            self.allocate("frozen part", self._folded_bytes)
        self.allocate("optimizer state", trained * workload.optimizer_copies)
        self.allocate("weight copies", (cost.weight_copies + cost.columns) * trained)
        pixels = (workload.batch + cost.replayed + cost.stored_images) * _pixels(workload.image)
        self.allocate("buffer", pixels + cost.stored_logits * shape.classes * FP32)
        maps = sum(b.maps for b in shape.trained)
        memory = shape.features * (self.size if shape.frozen else 1)
        stored = memory + (maps * self._vital_share + shape.classes) * FP32
        self.allocate("patterns", cost.pattern_samples * stored)
        self.allocate("statistics", cost.statistics_bytes)
        masked = sum(c.weights for b in shape.trained for c in b.convolutions if c.kernel == 3 and b.second)
        vital = sum(b.maps // _positions(c) for b in shape.trained if b.second for c in (b.first,))
        self.allocate("masks", 2 * masked * (cost.weight_sparsity > 0) + vital * (cost.pattern_samples > 0))

    @property
    def _folded_bytes(self) -> int:
        """The copy of the prefix whose batch-norm is folded into its convolutions: a bias per channel. In C nothing is
        folded."""
        if self._in_c:
            return 0
        return sum(c.weights + c.norm // 2 for b in self.shape.frozen for c in b.convolutions) * FP32

    def _fixed_prefix(self, samples: int) -> None:
        """Images pass in chunks (lightcl/device/prefix.py); the outputs of all are put together at the end."""
        unit = CHUNK * self.size
        copy = self._folded_bytes if self.workload.prefix == "cached" else 0
        outputs = samples * self.shape.features * self.size
        x = CHUNK * _pixels(self.workload.image) * FP32
        for block in self.shape.frozen:
            first, second, shortcut = block.first, block.second, block.shortcut
            beside = shortcut.outputs if shortcut else 0
            for convolution, others in ((first, first.outputs), (second, first.outputs + beside + block.outputs)):
                if convolution is not None:
                    amount = copy + outputs + x + unit * others + self._frozen_working(convolution, CHUNK)
                    self.note(f"forward {convolution.name}", "frozen part", amount)
            x = unit * block.outputs
        self.note("prefix outputs", "frozen part", copy + 2 * outputs)

    def _prefix(self, samples: int) -> None:
        """No graph is kept, so each moment stands for itself."""
        unit = samples * self.size
        image = samples * _pixels(self.workload.image) * FP32
        before = 0
        for block in self.shape.frozen:
            x = image if block.second is None else unit * before
            for name, others, running in _moments(block):
                self.note(f"forward {name}", "frozen part", x + unit * others + self._frozen_working(running, samples))
            before = block.outputs

    def _forward(self, samples: int) -> None:
        unit = samples * self.size
        for block in self.shape.trained:
            if block.second is None:
                self.allocate(
                    "kept activations", unit * self.shape.features
                )  # after normalization; only before it are they fp32
            for convolution in (block.first, block.shortcut, block.second):
                if convolution is None:
                    continue
                self.allocate("kept activations", unit * convolution.outputs)
                copied = self.size != FP32 and not self._native(convolution)
                if copied and convolution.name not in self.cast:  # one copy for all passes of the step
                    self.cast.add(convolution.name)
                    self.allocate("temporaries", convolution.weights * self.size)
                self.note(
                    f"forward {convolution.name}", "temporaries", self._working(convolution, Pass.FORWARD, samples)
                )
                if convolution is block.shortcut:
                    self.allocate("temporaries", unit * convolution.outputs)
                else:
                    self.allocate("kept activations", unit * convolution.outputs)
                # Of batch and memory samples, put together; in C they are one map.
                parts = unit * convolution.outputs * (self.cost.joint_pass and not self._in_c)
                self.note(f"forward {convolution.name}, batch-norm", "temporaries", parts)
            if block.shortcut:
                self.allocate("temporaries", -unit * block.shortcut.outputs)
            if block.pooled is not None:
                self.allocate("kept activations", unit * block.pooled + samples * block.pooled * 8)  # and its indices
            self.allocate("kept activations", unit * self._lateral(block))
            self.note(f"forward {block.name}, earlier columns", "temporaries", unit * self._columns * 3 * block.outputs)
        self.allocate("kept activations", samples * self._head_elements * FP32)
        self.note("loss")

    @property
    def _head_elements(self) -> int:
        """Pooled features, logits and their logarithmic softmax."""
        return self.shape.pooled + 3 * self.shape.classes

    def _backward(self, samples: int, last: bool) -> None:
        unit = samples * self.size
        self.allocate("kept activations", -samples * self._head_elements * FP32)
        self._gradient("fc", last, plain=self.shape.head_parameters)
        for index in reversed(range(len(self.shape.trained))):
            block, entered = self.shape.trained[index], index > 0  # its inputs need gradients
            self._backward_block(block, unit, samples, entered, last)
        if self.shape.frozen and last:
            self.allocate("kept activations", -unit * self.shape.features)

    def _backward_block(self, block: Block, unit: int, samples: int, entered: bool, last: bool) -> None:
        out, end = unit * block.outputs, block.second or block.first
        if lateral := unit * self._lateral(block):
            self.note(f"backward {block.name}, adapter", "temporaries", 4 * out)
            self.allocate("kept activations", -lateral)
            self._gradient(f"{block.name}.adapter", last, plain=_adapter(block, self._columns))
        if block.pooled is not None:
            out = unit * end.outputs
            self.note(f"backward {block.name}, max-pool", "temporaries", unit * block.pooled + out)
            self.allocate("kept activations", -unit * block.pooled - samples * block.pooled * 8)
        self.note(f"backward {end.name}, ReLU", "temporaries", 2 * out)
        # The last map is the next block's input, whose operations are done: it is released with its ReLU.
        self.allocate("kept activations", -out)
        shortcut = out if block.second else 0  # its gradient is kept while the convolutions run
        self.note(f"backward {end.name}, batch-norm", "temporaries", shortcut + (3 if shortcut else 2) * out)
        self.allocate("kept activations", -out)
        if block.second:
            inner = unit * block.first.outputs
            self._backward_convolution(block.second, shortcut + out + inner, samples, last, entered=True)
            if block.shortcut:
                self.note(f"backward {block.shortcut.name}, batch-norm", "temporaries", 2 * out + inner)
                self._backward_convolution(block.shortcut, inner + 2 * out, samples, last, entered=entered)
                self.allocate("kept activations", -out)
                shortcut = unit * block.shortcut.inputs * entered
            self.note(f"backward {block.first.name}, ReLU", "temporaries", shortcut + 2 * inner)
            self.allocate("kept activations", -inner)
            self.note(f"backward {block.first.name}, batch-norm", "temporaries", shortcut + 3 * inner)
            self.allocate("kept activations", -inner)
            out = inner
        activations = shortcut + out + unit * block.first.inputs * entered
        self._backward_convolution(block.first, activations, samples, last, entered=entered)
        if block.second is None:
            self.allocate("kept activations", -unit * self.shape.features)

    def _backward_convolution(
        self, convolution: Convolution, activations: float, samples: int, last: bool, *, entered: bool
    ) -> None:
        gradient = self._working(convolution, Pass.OF_MAPS if entered else Pass.OF_WEIGHTS, samples)
        self.note(f"backward {convolution.name}", "temporaries", activations + gradient)
        if self._native(convolution):  # autocast does not copy its weights
            self._gradient(convolution.name, last, plain=convolution.weights + convolution.norm)
        else:
            self._gradient(convolution.name, last, convolution.weights, convolution.norm)

    def _gradient(self, name: str, last: bool, weights: int = 0, plain: int = 0) -> None:
        """The gradients of `weights`, which autocast copies, and of `plain` parameters, which it does not copy.

        Gradients of several passes are summed in place, so only the first allocates memory. Under autocast the copies'
        gradients are summed; with the last pass they become gradients of the weights, and the copies are released.
        """
        if name not in self.begun:
            self.begun.add(name)
            self.allocate("gradients", weights * self.size + plain * FP32)
        if last and name in self.cast:
            self.allocate("temporaries", -weights * self.size)
            self.allocate("gradients", weights * (FP32 - self.size))
        if last and self.workload.at_once:
            # Gradients of an earlier pass are kept until the last one: a gradient is complete with the last operation
            # that used its weight.
            self.note(f"update of {name}")
            self.allocate("gradients", -(weights + plain) * FP32)

    def _working(self, convolution: Convolution, of: Pass, samples: int) -> int:
        """Bytes that a convolution of the suffix takes while it runs."""
        if self._native(convolution):
            return self._scratch(convolution, of, samples)
        if self._multiplied(convolution):
            return self._product(convolution, of, samples)
        direction = int(of is not Pass.FORWARD)
        if convolution.kernel == 1 and self._in_c:
            channels = convolution.weights * _positions(convolution) // convolution.outputs
            return samples * _positions(convolution) * channels * self.size  # the positions that its stride meets
        if direction and convolution.by_product and self.size == BF16 and self.workload.accelerator == "cpu":
            return self._product(convolution, Pass.OF_WEIGHTS, samples)
        if not (self.workload.convolutions == "winograd" and self.size == FP32 and convolution.tiles):
            return self._layout(convolution, direction)
        positions = _positions(convolution)
        inputs, outputs = convolution.inputs // positions, convolution.outputs // positions
        places, blocks = parts(outputs, inputs)[0]
        tiles, block = samples * convolution.tiles, blocks[0].stop
        products = len(places) * (block * inputs + tiles * (inputs + block))  # of weights, inputs and outputs
        gradients = (convolution.weights + samples * convolution.inputs) * direction
        return int((products + gradients) * FP32)

    def _frozen_working(self, convolution: Convolution | None, samples: int) -> int:
        """The same for the prefix; None: no convolution runs."""
        if convolution is not None and self._native(convolution):
            return self._scratch(convolution, Pass.FORWARD, samples)
        if convolution is not None and self._multiplied(convolution):
            return convolution.weights * BF16 + self._product(convolution, Pass.FORWARD, samples)
        return self._layout(convolution, 0)

    @property
    def _in_c(self) -> bool:
        return self.workload.convolutions == "native"

    def _native(self, convolution: Convolution) -> bool:
        if not (self._in_c and convolution.native_tiles):
            return False
        return self.size == FP32 or suits_half(_positions(convolution) * convolution.stride**2)

    def _multiplied(self, convolution: Convolution) -> bool:
        """Whether a step in C computes it as products of patches and weights."""
        return (
            self._in_c
            and self.size == BF16
            and convolution.native
            and multiplies_half(_positions(convolution), convolution.stride)
        )

    def _scratch(self, convolution: Convolution, of: Pass, samples: int) -> int:
        """Bytes of a pass through winograd.c: its scratch memory where none is kept, and new gradients."""
        own, shared = self._scratch_numbers(convolution, of, samples)
        numbers = 0 if self.scratch else self.workload.threads * own + shared
        of_weights = convolution.weights if of else 0
        of_maps = samples * convolution.inputs if of is Pass.OF_MAPS else 0
        return (numbers + of_weights) * FP32 + of_maps * self.size

    def _keep_scratch(self, samples: int) -> None:
        """With several threads, the epochs' passes through winograd.c use the same scratch memory: as much as the
        largest takes, those left out that fill a cache (`lightcl.networks.native.kept_scratch`)."""
        shape, cost, workload = self.shape, self.cost, self.workload
        if workload.threads == 1:
            return
        together = samples + cost.suffix_samples * cost.joint_pass
        passes = [
            (c, of, together) for b in shape.trained for c in b.convolutions for of in (Pass.FORWARD, Pass.OF_MAPS)
        ]
        if shape.trained:  # its inputs need no gradients
            passes[:2] = [(shape.trained[0].first, of, together) for of in (Pass.FORWARD, Pass.OF_WEIGHTS)]
        if workload.prefix != "cached":
            frozen = samples if workload.prefix == "batch" else CHUNK
            passes += [(c, Pass.FORWARD, frozen) for b in shape.frozen for c in b.convolutions]
        sizes = [self._scratch_numbers(*each) for each in passes if self._native(each[0])]
        if sizes:
            largest = workload.threads * max(own for own, _ in sizes) + max(shared for _, shared in sizes)
            self.scratch = largest * FP32
            self.allocate("temporaries", self.scratch)

    def _scratch_numbers(self, convolution: Convolution, of: Pass, samples: int) -> tuple[int, int]:
        outputs = convolution.outputs // _positions(convolution)
        inputs = convolution.weights // convolution.kernel**2 // outputs
        return scratch_size(
            samples, convolution.native_tiles, inputs, outputs, stride=convolution.stride, of=of,
            threads=self.workload.threads,
        )  # fmt: skip

    def _product(self, convolution: Convolution, of: Pass, samples: int) -> int:
        """Bytes of a convolution as a matrix product: the patches and, of the weights, their gradient; in C also what
        the product rearranges, and of the weights the outputs' gradient transposed. What the inputs' gradient takes is
        gone before."""
        positions = _positions(convolution)
        patches = samples * positions * (convolution.weights * positions // convolution.outputs)  # inputs of an output
        multiplied = self._multiplied(convolution)
        if of is Pass.FORWARD:
            rearranged, numbers = convolution.weights * BF16, patches
        else:
            rearranged = min(int(PART * patches * BF16), REARRANGED)
            numbers = patches + convolution.weights + samples * convolution.outputs * multiplied
        return numbers * BF16 + rearranged * self.workload.threads * multiplied

    def _layout(self, convolution: Convolution | None, direction: int) -> int:
        """Bytes of the copies of a convolution's weights while it runs: forward (0) or backward (1)."""
        return 0 if convolution is None else self.layouts[direction] * convolution.weights * self.size


def _adapter(block: Block, earlier: int) -> int:
    """Parameters and statistics of an adapter to `earlier` columns after this block: V, U with bias, batch-norm."""
    channels = block.outputs // _positions(block.second or block.first)
    return channels * channels * (earlier + 1) + 5 * channels


def _pixels(image: Image) -> int:
    channels, height, width = image
    return channels * height * width


def _positions(convolution: Convolution) -> int:
    return convolution.macs // convolution.weights


def _moments(block: Block) -> Sequence[tuple[str, int, Convolution | None]]:
    """The moments of a block without a graph: elements per sample beside its input, and the running convolution."""
    first, second, shortcut = block.first, block.second, block.shortcut
    moments: list[tuple[str, int, Convolution | None]] = [
        (first.name, first.outputs, first),
        (f"{first.name}, batch-norm", 2 * first.outputs, None),
    ]
    if block.pooled is not None:
        moments.append(("max-pool", first.outputs + block.pooled, None))
    beside = 0
    if shortcut:
        beside = shortcut.outputs
        moments += [
            (shortcut.name, first.outputs + beside, shortcut),
            (f"{shortcut.name}, batch-norm", first.outputs + 2 * beside, None),
        ]
    if second:
        moments += [
            (second.name, first.outputs + beside + second.outputs, second),
            (f"{second.name}, batch-norm", beside + 2 * second.outputs, None),
        ]
    return moments
