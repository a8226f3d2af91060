"""The ledger by hand: devices that learn some tasks only, and what is left for each."""

from __future__ import annotations

from dataclasses import replace

from lightcl.exchange.messages import Refusal, Tested, Trained
from server.ledger import Entry, Ledger
from server.selection import Selection
from tests.inprocess import small

SCENARIO = small(stream={"tasks": 4})


def learn(entry: Entry, task: int) -> None:
    """The device trains a task to its end and is tested on what it has learned."""
    entry.add_training_(Trained(entry.number, task, 2, 0, "", "", 10, 0.5, 1.0, 1.0))
    tasks = list(entry.tasks[: entry.position + 1])
    entry.add_test_(Tested(entry.number, task, 2, 0, tasks, [0.5] * len(tasks), [], [10] * len(tasks), 1.0))


def test_a_device_walks_its_own_tasks_and_is_finished_after_its_last() -> None:
    ledger = Ledger(SCENARIO, [(1, 3), (), (0, 1, 2, 3)])
    entry = ledger[0]
    assert (entry.goal(SCENARIO), entry.rounds_left([2])) == ((1, 2), 2)
    learn(entry, 1)
    assert (entry.goal(SCENARIO), entry.rounds_left([2])) == ((3, 2), 1)
    assert not entry.finished(SCENARIO)
    learn(entry, 3)
    assert entry.finished(SCENARIO)
    assert entry.rows["til"] == {1: [0.5], 3: [0.5, 0.5]}
    assert [e.number for e in ledger.active] == [2], "device 1 learns nothing and never takes part"
    assert ([e.number for e in ledger.finished], ledger.dropped, ledger.without_tasks) == ([0], {}, 1)


def test_rounds_left_counts_own_tasks_only() -> None:
    assert Ledger(SCENARIO, [(1, 3), (), (0, 1, 2, 3)]).rounds_left == 2, "2 + 0 + 4 device-rounds, 3 a round"


def test_the_least_advanced_have_learned_the_smallest_share_of_their_own_streams() -> None:
    scenario = small(stream={"tasks": 4}, server={"fraction": 0.34})
    ledger = Ledger(scenario, [(1, 3), (0, 1, 2, 3), (2,)])
    learn(ledger[0], 1)  # one of two
    learn(ledger[1], 0)  # one of four
    learn(ledger[2], 2)  # all
    chosen = Selection(scenario).choose(ledger.active, 1)
    assert [entry.number for entry in chosen] == [1]
    learn(ledger[1], 1)  # two of four: even with device 0
    learn(ledger[1], 2)
    assert [entry.number for entry in Selection(scenario).choose(ledger.active, 1)] == [0]


def test_joint_training_waits_for_the_devices_own_last_task() -> None:
    joint = small(stream={"tasks": 4}, method={"name": "joint"})
    entry = Ledger(joint, [(0, 2), (), (3,)])[0]
    assert entry.goal(joint) == (2, 2)
    assert entry.rounds_left([2]) == 1
    assert [entry.rounds_left([1, 2]), replace(entry, epochs=1).rounds_left([1, 2])] == [2, 1]
    assert replace(entry, epochs=2).rounds_left([1, 2]) == 0


def test_a_board_that_lost_its_state_begins_with_its_own_first_task() -> None:
    ledger = Ledger(SCENARIO, [(1, 3), (), (0,)])
    entry = ledger[0]
    learn(entry, 1)
    ledger.follow_(0, Refusal(1, 0, 0, "state lost"))
    assert entry.goal(SCENARIO) == (1, 2)
    assert entry.rows["til"] == {}


def test_a_board_with_images_of_its_own_says_what_it_learns_until_it_has_begun() -> None:
    ledger = Ledger(SCENARIO)
    ledger.set_tasks_(1, [2, 3])
    assert (ledger[1].tasks, ledger[1].goal(SCENARIO)) == ((2, 3), (2, 2))
    assert [entry.number for entry in ledger.take_changed_()] == [1]
    learn(ledger[1], 2)
    ledger.set_tasks_(1, [0])
    assert ledger[1].tasks == (2, 3)


def test_a_saved_entry_comes_back() -> None:
    entry = Ledger(SCENARIO, [(1, 3), (), (0,)])[0]
    learn(entry, 1)
    assert Entry.from_saved(entry.to_saved()) == entry
