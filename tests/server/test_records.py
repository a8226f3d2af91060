"""The run folder: who may write to it."""

import pytest

from lightcl.errors import RequestError
from lightcl.scenario import Scenario
from server.records import RunFolder


def begun(path) -> RunFolder:
    folder = RunFolder(path)
    folder.begin(Scenario(), {"run": "a"}, [])
    folder.append("rounds.jsonl", [{"round": 1}])
    return folder


def test_a_run_that_another_process_writes_is_not_overwritten(tmp_path):
    folder = begun(tmp_path)
    with folder.held(), pytest.raises(RequestError, match="another process is at work"):
        RunFolder(tmp_path).prepare(resume=False, overwrite=True)
    assert folder.exists
    assert folder.rows("rounds.jsonl") == [{"round": 1}]


def test_a_run_that_nobody_writes_is_overwritten_when_asked_for(tmp_path):
    begun(tmp_path)
    folder = RunFolder(tmp_path)
    folder.prepare(resume=False, overwrite=True)
    assert not folder.exists
    assert folder.rows("rounds.jsonl") == []
