"""Device-rounds per second, this project against a plain Flower app, on the same images, epochs and batches.

    python benchmarks/fleet_rival.py [--images PATH] [--devices 1000] [--per-round 50] [--rounds 5] [--repeats 3]

The plain app is written as Flower's tutorials write one: every device loads the whole model that it is sent, trains all
of it with SGD and a DataLoader, and returns all of it; `FedAvg` averages, and Flower's simulation engine runs the
devices on Ray actors. The network is the same ResNet-18 (width 20). Its images are decoded beforehand and neither
augmented nor rehearsed, all of which is in its favor.

Ours is `lightcl simulate`: LightCL, a frozen prefix, a shared suffix, the project's engine; in fp32, in bf16 and as the
bundled fleets compute, with fresh augmentation, with views and an empty prefix cache, and with a prefix cache that an
earlier run has filled.

A device-round is one device's training on the images of its first task and one test on its test images. The kinds
take turns, each run is a process of its own, and the first round, in which workers start, does not count. Beside the
rate stands the processor time of all processes of a run, which depends less on what else the machine does.
`--images` is a folder of train.parquet and test.parquet (CIFAR-10); without it the images are noise of the same size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.fleet_scale import ENVIRONMENT, Measured, in_a_process, processor_seconds
from lightcl.assembly import build_network, build_stream
from lightcl.data.partition import partition
from lightcl.data.sources import load_source
from lightcl.scenario import Scenario, load_scenario

CLASSES_PER_TASK = 5
"""Of ten: two tasks, so that a device of a thousand has 22 images of CIFAR-10 per task."""
FP32, BF16 = ["device.precision=fp32"], ["device.precision=bf16"]
BUNDLED = ["device.precision=auto", "device.convolutions=auto", "method.memory_pass=joint"]
"""What the bundled fleets have: the fastest arithmetic of the machine."""
OURS = {
    "ours, fp32": (0, FP32, False),
    "ours, fp32, views, empty cache": (2, FP32, False),
    "ours, fp32, views, filled cache": (2, FP32, True),
    "ours, bf16": (0, BF16, False),
    "ours, bf16, views, empty cache": (2, BF16, False),
    "ours, bf16, views, filled cache": (2, BF16, True),
    "ours, as bundled": (0, BUNDLED, False),
    "ours, as bundled, views, empty cache": (2, BUNDLED, False),
    "ours, as bundled, views, filled cache": (2, BUNDLED, True),
}
"""By name: data.views, other changes, and whether the prefix cache of an earlier run is kept."""


def changes_for(chosen: argparse.Namespace, images: str, views: int, others: list[str]) -> list[str]:
    return [
        "data.source=parquet", f"data.path={images}", "data.augmentation=crop-flip", f"data.views={views}",
        f"stream.tasks={2}", f"stream.classes_per_task={CLASSES_PER_TASK}", "stream.held_out=0.1",
        f"fleet.devices={chosen.devices}", "fleet.partition=iid", "fleet.test_data=share",
        f"training.epochs={chosen.epochs}", f"training.batch_size={chosen.batch}",
        f"server.fraction={chosen.per_round / chosen.devices}", "server.aggregation=suffix",
        "device.accelerator=cpu", f"simulation.workers={chosen.workers}", "simulation.keep_states=none",
        f"network.width={chosen.width}", f"network.weights={chosen.weights}", *others,
    ]  # fmt: skip


# -- the plain Flower app ------------------------------------------------------------------------------------------


def write_shares(scenario: Scenario, folder: Path) -> None:
    """The images that each device trains on in its first task, and those that it is then tested on, one file each."""
    source = load_source(scenario.source_request())
    for number, share in enumerate(partition(source, scenario.fleet, scenario.seed)):
        task = build_stream(scenario, source, share, number).to_learn(0)
        np.savez(
            folder / f"device-{number}.npz",
            train_images=source.train.images[task.train.indices].transpose(0, 3, 1, 2),
            train_labels=source.train.labels[task.train.indices],
            test_images=source.test.images[task.test.indices].transpose(0, 3, 1, 2),
            test_labels=source.test.labels[task.test.indices],
        )


def load_data(folder: Path, partition_id: int, batch: int) -> tuple[DataLoader[object], DataLoader[object]]:
    with np.load(folder / f"device-{partition_id}.npz") as arrays:
        sets = [
            TensorDataset(torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]))
            for split in ("train", "test")
        ]
    return DataLoader(sets[0], batch_size=batch, shuffle=True), DataLoader(sets[1], batch_size=batch)


def make_model(scenario: Scenario) -> nn.Module:
    """The whole network, trainable, in PyTorch's usual memory format. It normalizes its images itself."""
    model = build_network(scenario, in_channels=3, classes=2 * CLASSES_PER_TASK)
    model.freeze("none")
    return model.to(memory_format=torch.contiguous_format)


def make_client(scenario: Scenario, folder: Path) -> ClientApp:
    app = ClientApp()
    training = scenario.training

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = make_model(scenario)
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        batches, _ = load_data(folder, int(context.node_config["partition-id"]), training.batch_size)
        model.train()
        criterion = nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=training.learning_rate)
        total = 0.0
        for _ in range(training.epochs):
            for images, labels in batches:
                optimizer.zero_grad()
                loss = criterion(model(images), labels)
                loss.backward()
                optimizer.step()
                total += loss.item()
        metrics = {"train_loss": total / len(batches), "num-examples": len(batches.dataset)}  # type: ignore[arg-type]
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = make_model(scenario)
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        _, batches = load_data(folder, int(context.node_config["partition-id"]), training.batch_size)
        model.eval()
        correct, count = 0, 0
        with torch.no_grad():
            for images, labels in batches:
                correct += int((model(images).argmax(1) == labels).sum())
                count += len(labels)
        metrics = {"eval_acc": correct / max(count, 1), "num-examples": count}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return app


def make_server(scenario: Scenario, rounds: int, ends: list[tuple[float, float]]) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        def note(round_number: int, arrays: ArrayRecord) -> None:
            """Flower calls it before the first round and after each."""
            ends.append((time.perf_counter(), processor_seconds()))

        fraction = scenario.server.fraction
        strategy = FedAvg(
            fraction_train=fraction, fraction_evaluate=fraction, min_available_nodes=scenario.fleet.devices
        )
        arrays = ArrayRecord(make_model(scenario).state_dict())
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds, evaluate_fn=note)

    return app


def plain_child(changes: list[str], rounds: int, folder: str) -> None:
    from flwr.simulation import run_simulation

    scenario, ends = load_scenario("quickstart", changes), list[tuple[float, float]]()
    workers = scenario.simulation.workers
    run_simulation(
        server_app=make_server(scenario, rounds, ends),
        client_app=make_client(scenario, Path(folder)),
        num_supernodes=scenario.fleet.devices,
        backend_config={
            "init_args": {"address": "local", "num_cpus": workers, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    print(json.dumps([(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends)]), flush=True)
    os._exit(0)


def plain_cost(changes: list[str], chosen: argparse.Namespace, folder: str) -> tuple[float, float]:
    """Wall and processor seconds per device-round of one run of the plain app: medians of the rounds after the first.

    The wall seconds are those of a round over its devices, which several workers share.
    """
    words = ["--child", json.dumps([changes, chosen.rounds + 1, folder])]
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, check=False, env=os.environ | ENVIRONMENT
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    seconds = json.loads(done.stdout.splitlines()[-1])[1:]
    return median(wall for wall, _ in seconds) / chosen.per_round, median(p for _, p in seconds) / chosen.per_round


# -- the table -----------------------------------------------------------------------------------------------------


def our_cost(found: Measured) -> tuple[float, float]:
    """As `plain_cost`."""
    if found.failed:
        raise SystemExit(f"{found.failed} device-rounds failed")
    wall, processor = (
        median(seconds / count for seconds, count in zip(values[1:], found.messages[1:], strict=True))
        for values in (found.ends, found.processor)
    )
    return wall, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="", help="folder of train.parquet and test.parquet; default: noise")
    parser.add_argument("--devices", type=int, default=1_000)
    parser.add_argument("--per-round", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5, help="beside the first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="of ours, only the kinds that have this in their name"
    )
    parser.add_argument("--toy", action="store_true", help="a small fleet, for a smoke test")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        plain_child(*json.loads(chosen.child))
    kinds = {name: kind for name, kind in OURS.items() if chosen.only in name}
    chosen.width, chosen.weights = 20, "builtin"
    if chosen.toy:
        chosen.devices, chosen.per_round, chosen.rounds, chosen.repeats, chosen.epochs = 6, 3, 1, 1, 1
        chosen.width, chosen.weights, chosen.workers = 4, "none", 1
        kinds = {name: OURS[name] for name in list(OURS)[-2:]}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIGHTCL_CACHE"] = f"{folder}/cache"
        images = chosen.images or f"{folder}/noise"
        if not chosen.images:
            write_noise(Path(images), 50 * chosen.devices, 10 * chosen.devices, 8 if chosen.toy else 32)
        print_rates(chosen, kinds, images, folder)


def write_noise(folder: Path, train: int, test: int, side: int) -> None:
    from datasets import ClassLabel, Dataset, Features, Image

    folder.mkdir()
    names = [str(number) for number in range(2 * CLASSES_PER_TASK)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        content = {
            "image": list(draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)),
            "label": [number % len(names) for number in range(count)],
        }
        Dataset.from_dict(content, features).to_parquet(folder / f"{split}.parquet")


def print_rates(
    chosen: argparse.Namespace, kinds: dict[str, tuple[int, list[str], bool]], images: str, folder: str
) -> None:
    plain = "plain Flower app, fp32"
    costs: dict[str, list[tuple[float, float]]] = {plain: []} | {name: [] for name in kinds}
    efficiency: dict[str, list[float]] = {name: [] for name in kinds}
    plain_changes = changes_for(chosen, images, 0, [])
    shares = Path(folder, "shares")
    shares.mkdir()
    write_shares(load_scenario("quickstart", plain_changes), shares)
    for _ in range(chosen.repeats):
        costs[plain].append(plain_cost(plain_changes, chosen, str(shares)))
        for name, (views, others, filled) in kinds.items():
            changes = changes_for(chosen, images, views, others)
            if not filled:  # otherwise a run with the same views and changes came first
                empty_cache()
            found = in_a_process("quickstart", changes, chosen.rounds + 1)
            costs[name].append(our_cost(found))
            efficiency[name].append(found.efficiency() if len(found.ends) > 2 else float("nan"))
    print(
        f"\n{chosen.devices} devices, {chosen.per_round} per round, {chosen.epochs} epochs, batches of "
        f"{chosen.batch}, ResNet-18 width {chosen.width}, {chosen.workers} workers, torch {torch.__version__}, median "
        f"of {chosen.repeats} runs of {chosen.rounds} rounds; load {os.getloadavg()[0]:.1f}\n"
    )
    print(
        "| kind | device-rounds per second | ratio, lowest and highest | processor ms per device-round "
        "| ratio, lowest and highest | efficiency |\n|---|---|---|---|---|---|"
    )
    for name, values in costs.items():
        wall, processor = ([pair[part] for pair in values] for part in (0, 1))
        own = f"{median(efficiency[name]):.2f}" if name in efficiency else "not measured"
        print(
            f"| {name} | {1 / median(wall):.2f} | {_ratios(costs[plain], values, 0)} "
            f"| {1000 * median(processor):.0f} | {_ratios(costs[plain], values, 1)} | {own} |"
        )


def _ratios(plain: list[tuple[float, float]], own: list[tuple[float, float]], part: int) -> str:
    """The plain app's cost over ours, in the same turn."""
    single = [base[part] / value[part] for base, value in zip(plain, own, strict=True)]
    return f"{median(single):.1f}, {min(single):.1f} to {max(single):.1f}"


def empty_cache() -> None:
    from lightcl.device.prefix import prefix_cache

    prefix_cache().clear()


if __name__ == "__main__":
    main()
