"""The run folder: when it may be written to."""

import pytest

from lightcl.errors import Failure, RequestError
from lightcl.records.folder import RunFolder
from lightcl.records.rows import DeviceRow, RoundRow
from lightcl.scenario import Scenario


def begun(path) -> RunFolder:
    folder = RunFolder(path)
    folder.begin(Scenario(), {"run": "a"}, [])
    rows = [DeviceRow(number, 0, "device-0", 0, 1) for number in (1, 2)]
    folder.append("devices.jsonl", rows)
    folder.append("rounds.jsonl", [RoundRow.of([row], 0, 1.0, 2.0) for row in rows])
    return folder


def test_a_run_that_another_process_writes_is_not_overwritten(tmp_path):
    folder = begun(tmp_path)
    with folder.locked(), pytest.raises(RequestError, match="another process is working on this run"):
        RunFolder(tmp_path).prepare(resume=False, overwrite=True)
    assert folder.exists
    assert [row.round for row in folder.rounds()] == [1, 2]


def test_a_run_that_no_process_writes_is_overwritten_on_request(tmp_path):
    begun(tmp_path)
    folder = RunFolder(tmp_path)
    folder.prepare(resume=False, overwrite=True)
    assert not folder.exists
    assert folder.rounds() == []


def damage_last_line(folder, name, text):
    file = folder.path / name
    file.write_text("\n".join([*file.read_text().splitlines()[:-1], text]) + "\n")


@pytest.mark.parametrize("name", ["rounds.jsonl", "devices.jsonl"])
@pytest.mark.parametrize("text", ["{}", "[1]\n{}", '{"round": 1}', "}\n{}"])
def test_a_line_that_is_not_a_row_is_named(tmp_path, name, text):
    folder = begun(tmp_path)
    damage_last_line(folder, name, text)
    with pytest.raises(RequestError, match=rf"{name}, line 2: not a row"):
        folder.rounds() if name == "rounds.jsonl" else folder.devices()
    with pytest.raises(RequestError, match=rf"{name}, line 2: not a row"):
        folder.prepare(resume=True, overwrite=False)


def test_a_line_cut_off_by_a_kill_is_ignored_and_the_run_continues(tmp_path):
    folder = begun(tmp_path)
    damage_last_line(folder, "rounds.jsonl", '{"round": 2, "ta')
    folder.prepare(resume=True, overwrite=False)
    assert [row.round for row in folder.rounds()] == [1]


@pytest.mark.parametrize(("name", "kept"), [("rounds.jsonl", 0), ("devices.jsonl", 0), ("devices.jsonl", 1)])
def test_rows_that_no_kill_can_have_lost_are_missed(tmp_path, name, kept):
    folder = begun(tmp_path)
    (tmp_path / name).write_text("".join((tmp_path / name).read_text().splitlines(keepends=True)[:kept]))
    with pytest.raises(RequestError, match="rows are missing"):
        folder.prepare(resume=True, overwrite=False)
    folder.prepare(resume=False, overwrite=True)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_broken_results_are_named(tmp_path, text):
    folder = begun(tmp_path)
    (tmp_path / "results.json").write_text(text)
    (tmp_path / "failure.json").write_text(text)
    with pytest.raises(RequestError, match=r"results\.json"):
        folder.results()
    with pytest.raises(RequestError, match=r"failure\.json"):
        folder.failure()


def test_a_folder_counts_as_a_run_only_with_its_marker_file(tmp_path):
    """Names of our files are not enough: a scenario.yaml may be the user's."""
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "mine.png").touch()
    (tmp_path / "scenario.yaml").write_text("name: mine")
    for overwrite in (False, True):
        with pytest.raises(RequestError, match=r"holds other files \(plots, scenario.yaml\)"):
            RunFolder(tmp_path).prepare(resume=False, overwrite=overwrite)
    assert (tmp_path / "plots" / "mine.png").exists()
    (tmp_path / ".lock").touch()
    RunFolder(tmp_path).prepare(resume=False, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_the_remains_of_a_run_killed_at_its_start_count_as_a_run_folder(tmp_path, monkeypatch):
    """The marker is written first: a run killed after any number of files can be started again."""
    from lightcl.records import folder as records

    for writes in range(3):
        with monkeypatch.context() as patch:
            left = iter(range(writes))
            real = records.write_atomically
            patch.setattr(records, "write_atomically", lambda *a, left=left, real=real: next(left) + 1 and real(*a))
            with pytest.raises(StopIteration):
                RunFolder(tmp_path / "run").begin(Scenario(), {}, [])
        RunFolder(tmp_path / "run").prepare(resume=False, overwrite=False)
        assert list((tmp_path / "run").iterdir()) == []


def test_a_name_that_the_disk_refuses(tmp_path):
    folder = RunFolder(tmp_path / ("n" * 300))
    for options in ((False, False), (True, False), (False, True)):
        with pytest.raises(RequestError, match="cannot be written to"):
            folder.prepare(resume=options[0], overwrite=options[1])


@pytest.mark.parametrize("text", [None, "[{", '{"device": 0}', '[{"train": [1]}]'])
def test_a_partition_that_cannot_be_read_stops_no_run(tmp_path, text):
    folder = begun(tmp_path)
    file = tmp_path / "partition.json"
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    assert folder.partition() == {}
    folder.note_own_data([1])
    own = "all images of the board"
    assert folder.partition() == {1: {"device": 1, "train": own, "test": own}}


def test_rows_that_the_disk_refuses_in_the_middle_of_a_run(tmp_path):
    folder = begun(tmp_path)
    (tmp_path / "devices.jsonl").unlink()
    (tmp_path / "devices.jsonl").mkdir()
    with pytest.raises(Failure, match=r"devices\.jsonl cannot be written \(Is a directory\); make room"):
        folder.append("devices.jsonl", [DeviceRow(3, 0, "device-0", 0, 1)])


@pytest.mark.parametrize("piece", [b"5", b"0.25", b"null", b'"dev"', b"[1]", b'{"round": 3, "dev'])
def test_a_piece_of_a_row_is_torn_also_where_it_is_json(tmp_path, piece):
    folder = begun(tmp_path)
    file = tmp_path / "devices.jsonl"
    whole = file.read_bytes()
    for end in (b"", b"\n"):
        file.write_bytes(whole + piece + end)
        assert [row.round for row in folder.devices()] == [1, 2]
    folder.prepare(resume=True, overwrite=False)
    folder.forget_after(2)
    assert file.read_bytes() == whole


def test_rows_of_an_unfinished_round_may_be_torn_and_others_may_not(tmp_path):
    """What a power cut leaves of an append: zeros in the place of its beginning, and the end of it."""
    folder = begun(tmp_path)
    file = tmp_path / "devices.jsonl"
    whole = file.read_bytes()
    third = whole.splitlines()[1].replace(b'"round": 2', b'"round": 3')
    file.write_bytes(whole + bytes(100) + b"\n" + third + b"\n")
    assert [row.round for row in folder.devices()] == [1, 2]
    folder.prepare(resume=True, overwrite=False)
    folder.forget_after(2)
    assert file.read_bytes() == whole
    first, second = whole.splitlines(keepends=True)
    file.write_bytes(bytes(len(first)) + b"\n" + second)
    with pytest.raises(RequestError, match=r"devices\.jsonl, line 1: not a row"):
        folder.devices()
