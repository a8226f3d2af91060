"""What one board may send, on a clock of the test's own."""

from __future__ import annotations

from server.link.limits import BURST_SECONDS, MOST_SENDERS, Limits


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_is_free_and_then_each_request_waits_for_its_turn() -> None:
    clock = Clock()
    limits = Limits(requests_per_second=2, reply_bytes=100, clock=clock)
    assert [limits.wait_for("a") for _ in range(int(2 * BURST_SECONDS))] == [0.0] * 40
    assert [limits.wait_for("a") for _ in range(3)] == [0.5, 1.0, 1.5]
    assert limits.wait_for("b") == 0.0, "another board does not wait for it"
    clock.now = 2.0  # 4 more are allowed: 3 were counted ahead
    assert [limits.wait_for("a") for _ in range(2)] == [0.0, 0.5]


def test_a_quiet_board_saves_no_more_than_a_burst() -> None:
    clock = Clock()
    limits = Limits(requests_per_second=1, reply_bytes=100, clock=clock)
    limits.wait_for("a")
    clock.now = 1e6
    assert [limits.wait_for("a") for _ in range(21)] == [0.0] * 20 + [1.0]


def test_the_bytes_of_a_reply_count_together_and_the_next_one_begins_anew() -> None:
    limits = Limits(1, reply_bytes=100)
    assert limits.accepts("a", 40, begins=True)
    assert limits.accepts("a", 60, begins=False)
    assert not limits.accepts("a", 1, begins=False)
    assert not limits.accepts("a", 1, begins=False)
    assert limits.accepts("b", 100, begins=True)
    assert limits.accepts("a", 100, begins=True)


def test_senders_that_were_quiet_the_longest_are_forgotten() -> None:
    limits = Limits(1, reply_bytes=100, clock=Clock())
    for _ in range(21):
        waits = limits.wait_for("first")
    assert waits == 1.0
    for number in range(MOST_SENDERS):
        limits.wait_for(str(number))
    assert limits.wait_for("first") == 0.0
