"""What a killed node leaves to its successor, and what is never taken for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from client.board import journal as module
from client.board.journal import Journal, Parcel
from client.board.link import closed, envelope, opened
from tests.inprocess import InProcessGrid

PARCEL = Parcel(b"header", b"tree", {"a" * 64: b"\0content", "b" * 64: b""})


def test_a_parcel_is_read_as_it_was_written(tmp_path: Path) -> None:
    PARCEL.write(tmp_path / "message")
    assert Parcel.read(tmp_path / "message") == PARCEL
    assert [file.name for file in tmp_path.iterdir()] == ["message"]


def test_a_damaged_parcel_is_none(tmp_path: Path) -> None:
    file = tmp_path / "message"
    assert Parcel.read(file) is None
    PARCEL.write(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert Parcel.read(file) is None
    file.write_bytes(whole.replace(b"content", b"contend"))
    assert Parcel.read(file) is None


def test_a_successor_is_the_same_node_and_has_the_message_and_the_reply(tmp_path: Path) -> None:
    first = Journal(tmp_path, "server key")
    assert first.node_id is None
    first.joined(2**63 + 5)
    first.received(PARCEL)
    second = Journal(tmp_path, "server key")
    assert second.node_id == 2**63 + 5
    found = second.unfinished()
    assert (found.message, found.reply, found.kills) == (PARCEL, None, 1)
    second.replied(PARCEL)
    assert second.unfinished().reply == PARCEL
    second.announced("session")
    assert (second.unfinished().session, second.unfinished().kills) == ("session", 4)
    second.finished()
    found = Journal(tmp_path, "server key").unfinished()
    assert (found.message, found.reply, found.session, found.kills) == (None, None, "", 0)


def test_a_node_that_left_is_not_continued(tmp_path: Path) -> None:
    first = Journal(tmp_path, "server key")
    first.joined(7)
    first.received(PARCEL)
    first.left()
    second = Journal(tmp_path, "server key")
    assert second.node_id is None
    assert second.unfinished().message is None


def test_another_server_another_start_of_the_machine_and_a_copied_folder_are_other_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "board"
    Journal(folder, "server key").joined(7)
    assert Journal(folder, "server key").node_id == 7
    assert Journal(folder, "other key").node_id is None
    shutil.copytree(folder, tmp_path / "copy")
    assert Journal(tmp_path / "copy", "server key").node_id is None
    (tmp_path / "boot").write_text("another start")
    monkeypatch.setattr(module, "_BOOT", tmp_path / "boot")
    assert Journal(folder, "server key").node_id is None


def test_a_broken_file_is_no_node(tmp_path: Path) -> None:
    for text in ("", "null", "[]", "{}", '{"identity": 3}'):
        (tmp_path / "node.json").write_text(text)
        assert Journal(tmp_path, "server key").node_id is None


def test_a_node_that_is_killed_while_it_asks_may_have_lost_a_message(tmp_path: Path) -> None:
    """The mark is in memory that outlives the process."""
    text = f"""
import os, sys, time
from pathlib import Path
from client.board.journal import Journal
journal = Journal(Path({str(tmp_path)!r}), "server key")
with journal.asking():
    pass
assert not journal.may_have_lost
with journal.asking():
    print("asks", flush=True)
    time.sleep(60)
"""
    node = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, env={**os.environ})
    assert node.stdout is not None
    assert node.stdout.readline() == b"asks\n"
    node.send_signal(signal.SIGKILL)
    node.wait()
    journal = Journal(tmp_path, "server key")
    assert journal.may_have_lost
    journal.nothing_lost()
    assert not Journal(tmp_path, "server key").may_have_lost


def test_a_disk_that_is_full_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "server key")
    journal.joined(7)
    journal.received(PARCEL)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Parcel, "write", full)
    journal.received(Parcel(b"newer", b""))
    assert journal.unfinished().message is None  # the older one is not taken for it
    assert Journal(tmp_path, "server key").node_id is None  # and nobody waits for the newer one


def test_a_message_survives_the_wire_and_the_disk(tmp_path: Path) -> None:
    InProcessGrid(tmp_path / "fleet", 1)  # a message needs a run
    asked = Message(RecordDict({"a": ConfigRecord({"round": 3})}), dst_node_id=5, message_type="train")
    asked.metadata.__dict__.update(_run_id=9, _message_id="0" * 64)
    values = ArrayRecord({"w": Array(np.arange(6, dtype=np.float32).reshape(2, 3))})
    closed(Message(RecordDict({"arrays": values}), reply_to=asked)).write(tmp_path / "reply")
    parcel = Parcel.read(tmp_path / "reply")
    assert parcel is not None
    found = opened(parcel)
    assert found.metadata.reply_to_message_id == "0" * 64
    assert np.array_equal(found.content.array_records["arrays"]["w"].numpy(), values["w"].numpy())
    assert not envelope(parcel).content
    assert envelope(parcel).metadata.run_id == 9
    with pytest.raises(ValueError, match="without its part"):
        opened(Parcel(parcel.header, parcel.tree, {}))
    refusal = closed(Message(Error(ErrorCode.UNKNOWN, "no"), reply_to=asked))
    assert envelope(refusal).error.reason == "no"
