"""Cost of the simulation engine itself: device-rounds per second by fleet size, for our engine and Flower's.

    python benchmarks/fleet_runtime.py [--devices 100 1000 10000] [--per-round 50] [--rounds 5] [--app echo|real]
                                       [--engines ray flower] [--workers 2] [--toy]

`echo` is a ClientApp that returns its input (100 kB of tensors), so that all time is spent in the engine; `real` is the
project's own ClientApp on synthetic 8x8 images (width 4, one epoch). Each round sends one message to each of
`--per-round` devices and waits for all replies. The first round, in which workers start and load PyTorch, is reported
separately; for the later rounds, the median. Flower's engine gets one node per device; use at most a thousand. Every
size and engine runs in a separate process; memory is the resident set of the driver after the last round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from lightcl.device.hardware import resident
from lightcl.exchange.messages import INSTRUCTION, Instruction
from lightcl.scenario import Scenario


def make_echo(state: Path) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content.array_records["arrays"]}), reply_to=message)

    return app


def scenario(devices: int, workers: int, folder: Path) -> Scenario:
    values = {
        "data": {"source": "parquet", "path": str(folder)},
        "stream": {"tasks": 1, "classes_per_task": 2},
        "fleet": {"devices": devices, "test_data": "whole"},
        "network": {"weights": "none", "width": 4},
        "method": {"name": "sgd"},
        "training": {"epochs": 1, "batch_size": 4},
        "simulation": {"workers": workers},
    }
    return Scenario.model_validate(values)


def write_images(folder: Path, train: int, test: int = 20) -> None:
    """Two classes of 8x8 noise as PNGs, in parquet files as Hugging Face writes them."""
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        labels = [i % 2 for i in range(count)]
        images = list(generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
        Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(folder / f"{split}.parquet")


def make_server(chosen: argparse.Namespace, real: Scenario | None, found: dict[str, object]) -> ServerApp:
    """Sends `rounds` rounds of messages, without greetings, and records the seconds of each."""
    app, devices = ServerApp(), chosen.devices[0]
    record = ArrayRecord({"weights": Array(np.zeros(25_000, dtype=np.float32))})

    def content(device: int, number: int) -> RecordDict:
        if real is None:
            return RecordDict({"arrays": record})
        instruction = Instruction(device, "benchmark", real.model_dump_json(), number, 0, 1, 0)
        return RecordDict({INSTRUCTION: ConfigRecord(instruction.to_record())})

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        start, nodes = time.perf_counter(), []
        while not nodes:
            nodes = sorted(grid.get_node_ids())
        seconds = []
        draw = np.random.default_rng(0)
        for number in range(chosen.rounds + 1):
            begun = time.perf_counter() if number else start
            sent = [
                Message(content(int(d), number), dst_node_id=nodes[d % len(nodes)], message_type=MessageType.TRAIN)
                for d in draw.choice(devices, min(chosen.per_round, devices), replace=False)
            ]
            replies = list(grid.send_and_receive(sent, timeout=600))
            failed = [r for r in replies if r.has_error() or "reason" in r.content.config_records.get("reply", {})]
            if len(replies) != len(sent) or failed:
                raise RuntimeError(f"{len(replies)} replies of {len(sent)}, {len(failed)} failed: {failed[:1]}")
            seconds.append(time.perf_counter() - begun)
        found["first"], found["later"] = seconds[0], median(seconds[1:])
        found["per_round"], found["driver_mib"] = len(sent), (resident("VmRSS") or 0) / 2**20

    return app


def measure(chosen: argparse.Namespace) -> None:
    """One size on one engine, in this process; prints a line of JSON."""
    (engine,), (devices,) = chosen.engines, chosen.devices
    found: dict[str, object] = {"engine": engine, "devices": devices}
    images = Path(chosen.images)
    run = scenario(devices, chosen.workers, images)
    real = run if chosen.app == "real" else None
    server = make_server(chosen, real, found)
    with tempfile.TemporaryDirectory() as folder:
        from simulations.runtime.devices import make_app

        make = make_app if real else make_echo
        if engine == "ray":
            from simulations.runtime.ray_engine import run as run_engine
        else:
            from simulations.runtime.flower_engine import run as run_engine
        run_engine(server, Path(folder), run, make)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--per-round", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5, help="after the first")
    parser.add_argument("--app", choices=["echo", "real"], default="echo")
    parser.add_argument("--engines", choices=["ray", "flower"], nargs="+", default=["ray", "flower"])
    parser.add_argument("--flower-most", type=int, default=1_000, help="largest fleet for Flower's engine")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="two small fleets, for a smoke test")
    parser.add_argument("--images", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.toy:
        chosen.devices, chosen.per_round, chosen.rounds = [4, 100], 4, 1
    if chosen.images:
        measure(chosen)
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    print("| devices | engine | first round | later rounds | device-rounds/s | ms per device-round | driver |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 2 * 10 * max(chosen.devices) if chosen.app == "real" else 40)
        for devices in chosen.devices:
            for engine in chosen.engines:
                if engine == "flower" and devices > chosen.flower_most:
                    print(f"| {devices} | flower | not run: more than --flower-most | | | | |")
                    continue
                words = ["--devices", devices, "--engines", engine, "--per-round", chosen.per_round]
                words += ["--rounds", chosen.rounds, "--app", chosen.app, "--workers", chosen.workers]
                done = subprocess.run(
                    [sys.executable, __file__, *map(str, words), "--images", folder],
                    capture_output=True, text=True, check=False, env=environment,
                )  # fmt: skip
                if done.returncode:
                    raise SystemExit(done.stdout + done.stderr)
                found = json.loads(done.stdout.splitlines()[-1])
                each = found["later"] / found["per_round"]
                print(
                    f"| {devices} | {engine} | {found['first']:.1f} s | {found['later']:.3f} s | {1 / each:.1f} | "
                    f"{1000 * each:.1f} | {found['driver_mib']:.0f} MiB |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
