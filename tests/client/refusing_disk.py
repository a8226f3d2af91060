"""Run by test_damaged_states.py in a mount namespace of its own: a disk that is full, or read-only, under a device.

unshare --user --map-root-user --mount python -m tests.client.refusing_disk full|read-only FOLDER

Prints one JSON list: the refusal's text, the state files that are left half written, and whether the device, once the
disk accepts writes again, gives the same answer as one that had no trouble.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.client.test_app import ask
from tests.inprocess import InProcessGrid


def mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True)


def main(kind: str, folder: Path) -> None:
    mount(folder, "size=8m")
    disk = InProcessGrid(folder, 1)
    ask(disk, "train")
    device = folder / "run" / "device-00000"
    before = {file.name: file.read_bytes() for file in device.iterdir()}
    filler = folder / "filler"
    if kind == "full":
        fill(filler)
    else:
        mount(folder, "remount", "ro")
    reason = ask(disk, "train", task=1)["reason"]
    changed = [file.name for file in device.iterdir() if before.get(file.name) != file.read_bytes()]
    changed += [name for name in before if not (device / name).exists()]
    filler.unlink() if kind == "full" else mount(folder, "remount", "rw")
    answer = timeless(ask(disk, "train", task=1))
    straight = InProcessGrid(folder / "straight", 1)
    ask(straight, "train")
    json.dump([reason, changed, answer == timeless(ask(straight, "train", task=1))], sys.stdout)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as handle:
        try:
            while True:
                handle.write(bytes(4096))
        except OSError:
            return


def timeless(answer: dict[str, Any]) -> dict[str, Any]:
    return {**answer, "seconds": 0, "peak_memory_mib": 0}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
