"""The server's state on disk: what is written per round, and what a kill between two writes leaves."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch

from lightcl.records.rows import DeviceRow
from lightcl.storage.state import StateError
from server.checkpoint import DATABASE, Checkpoint, PendingRound, StateLost, TensorsLost
from server.ledger import Entry, Ledger
from tests.inprocess import small


def test_what_is_saved_comes_back_and_only_changed_devices_are_written(tmp_path: Path) -> None:
    ledger = Ledger(small(fleet={"devices": 1000}))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.load() is None
    ledger[7].epochs = 2
    pending = PendingRound({7: DeviceRow(1, 7, "node", 0, 2)}, 1.5)
    checkpoint.save(1, pending, 3, {"w": torch.arange(3.0)}, [ledger[7]])
    checkpoint.close()
    saved = Checkpoint(tmp_path).load()
    assert saved is not None
    assert (saved.round, saved.version, saved.pending, saved.entries) == (1, 3, pending, [ledger[7]])
    torch.testing.assert_close(saved.tensors["w"], torch.arange(3.0))
    checkpoint.save(1, None, 3, None, [ledger[8]])
    saved = checkpoint.load()
    assert saved is not None
    assert (saved.pending, [entry.number for entry in saved.entries]) == (None, [7, 8])
    torch.testing.assert_close(saved.tensors["w"], torch.arange(3.0))
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 200_000, "not 1,000 devices"


def test_a_kill_before_the_commit_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, checkpoint = Ledger(small()), Checkpoint(tmp_path)
    checkpoint.save(1, None, 1, {"w": torch.ones(1)}, [ledger[0]])

    def killed(values: object) -> str:
        raise KeyboardInterrupt

    ledger[0].epochs = 2
    with monkeypatch.context() as patch:
        patch.setattr("server.checkpoint.json.dumps", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(2, None, 2, {"w": torch.zeros(1)}, [ledger[0]])
    assert len(list(tmp_path.glob("tensors-*"))) == 2, "the new tensors were written"
    saved = Checkpoint(tmp_path).load()
    assert saved is not None
    assert (saved.round, saved.version, saved.entries[0].epochs, saved.tensors["w"].item()) == (1, 1, 0, 1.0)
    for number in (2, 3):
        checkpoint.save(number, None, number, {"w": torch.zeros(1)}, [ledger[0]])
        assert len(list(tmp_path.glob("tensors-*"))) == 2, "two generations"


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_the_tensors_before_damaged_ones_are_there(tmp_path: Path, damage: str) -> None:
    ledger, checkpoint = Ledger(small(fleet={"devices": 4})), Checkpoint(tmp_path)

    def learned(number: int, epochs: int) -> list[Entry]:
        ledger[number].epochs = epochs
        return [ledger[number]]

    checkpoint.save(1, PendingRound({}, 0.5), 1, {"w": torch.ones(1)}, learned(0, 1))
    checkpoint.save(1, None, 1, None, learned(1, 1))
    before = checkpoint.load()
    checkpoint.save(2, PendingRound({}, 0.5), 2, {"w": torch.zeros(1)}, learned(0, 2) + learned(2, 1))
    newest = max(tmp_path.glob("tensors-*"), key=lambda file: file.stat().st_mtime_ns)
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data if damage == "flipped" else data[:-1])
    if damage == "gone":
        newest.unlink()
    with pytest.raises(TensorsLost, match="newest shared tensors cannot be read") as lost:
        checkpoint.load()
    assert lost.value.pending
    checkpoint.go_back()
    found = checkpoint.load()
    assert found == before
    assert found is not None
    assert [(entry.number, entry.epochs) for entry in found.entries] == [(0, 1), (1, 1)]
    checkpoint.save(2, PendingRound({}, 0.5), 2, {"w": torch.zeros(1)}, learned(0, 2))
    again = checkpoint.load()
    assert again is not None
    assert (again.version, again.tensors["w"].item(), [entry.epochs for entry in again.entries]) == (2, 0.0, [2, 1])


def test_older_tensors_take_the_place_of_damaged_ones(tmp_path: Path) -> None:
    ledger, checkpoint = Ledger(small()), Checkpoint(tmp_path)
    for number in (1, 2):
        checkpoint.save(number, PendingRound({}, 0.5), number, {"w": torch.full((1,), number)}, [ledger[0]])
        checkpoint.save(number, None, number, None, [ledger[1]])
    (tmp_path / "tensors-1.safetensors").unlink()
    with pytest.raises(TensorsLost) as lost:
        checkpoint.load()
    assert not lost.value.pending
    checkpoint.use_older_tensors()
    found = checkpoint.load()
    assert found is not None
    assert (found.round, found.version, found.tensors["w"].item(), len(found.entries)) == (2, 2, 1, 2)
    checkpoint.save(3, PendingRound({}, 0.5), 3, {"w": torch.full((1,), 3)}, [])
    assert checkpoint.load() is not None
    assert len(list(tmp_path.glob("tensors-*"))) == 2


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / DATABASE).write_bytes(b"no database" * 1000)
    with pytest.raises(StateError, match=r"state\.db: the saved state cannot be read"):
        Checkpoint(tmp_path / "damaged").load()
    checkpoint = Checkpoint(tmp_path / "half")
    checkpoint.save(1, None, 1, {"w": torch.ones(1)}, [])
    next((tmp_path / "half").glob("tensors-*")).unlink()
    with pytest.raises(StateError, match="cannot be read"):
        checkpoint.load()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "state.json").write_text("{}")
    with pytest.raises(StateError, match="earlier version"):
        Checkpoint(tmp_path / "old").load()


@pytest.mark.parametrize(("durable", "synchronous"), [(True, 2), (False, 1)])
def test_a_simulation_does_not_wait_for_the_disk(tmp_path: Path, durable: bool, synchronous: int) -> None:
    checkpoint = Checkpoint(tmp_path, durable=durable)
    checkpoint.save(1, None, 0, {}, [])
    connection: sqlite3.Connection = checkpoint._database
    assert connection.execute("PRAGMA synchronous").fetchone() == (synchronous,)


def test_a_database_without_room_keeps_the_state_before(tmp_path: Path) -> None:
    ledger, checkpoint = Ledger(small()), Checkpoint(tmp_path)
    checkpoint.save(1, None, 1, {"w": torch.ones(1)}, [ledger[0]])
    (pages,) = checkpoint._database.execute("PRAGMA page_count").fetchone()
    checkpoint._database.execute(f"PRAGMA max_page_count = {pages}")
    ledger[0].dropped = "x" * 100_000
    with pytest.raises(StateError, match=r"cannot be saved .*full"):
        checkpoint.save(2, None, 2, {"w": torch.zeros(1)}, [ledger[0]])
    checkpoint.close()
    saved = Checkpoint(tmp_path).load()
    assert saved is not None
    assert (saved.round, saved.version, saved.tensors["w"].item()) == (1, 1, 1.0)


def test_every_damage_to_a_saved_state_is_found(tmp_path: Path) -> None:
    """Each byte of what a device and a round have in the database, and of the tensors, one after the other."""
    ledger, folder = Ledger(small()), tmp_path / "good"
    checkpoint = Checkpoint(folder)
    checkpoint.save(7, PendingRound({7: DeviceRow(7, 1, "node", 0, 2)}, 1.5), 3, {"w": torch.arange(3.0)}, [ledger[1]])
    checkpoint._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    texts = checkpoint._database.execute("SELECT entry FROM devices UNION SELECT pending FROM run").fetchall()
    checkpoint.close()
    assert Checkpoint(folder).load() is not None
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".db", ".safetensors")}
    flipped = {"tensors-0.safetensors": range(len(files["tensors-0.safetensors"])), DATABASE: []}
    for (text,) in texts:
        start = files[DATABASE].index(text.encode())
        flipped[DATABASE] = [*flipped[DATABASE], *range(start, start + len(text))]
    for name, positions in flipped.items():
        for number, position in enumerate(positions):
            damaged = tmp_path / f"{name}-{number}"
            damaged.mkdir()
            for other, data in files.items():
                (damaged / other).write_bytes(data)
            data = bytearray(files[name])
            data[position] ^= 4
            (damaged / name).write_bytes(bytes(data))
            with pytest.raises(StateLost, match="cannot be read"):
                Checkpoint(damaged).load()
