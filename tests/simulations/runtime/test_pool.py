"""Which worker gets which job, and when. The workers are doubles here; tests/.../test_ray_grid.py has Ray's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, WorkerCrashedError

from simulations.runtime.pool import Job, PoolBroken, WorkerPool, _Waiting


class Call:
    """A method of a worker: `remote` begins a call, which the test ends."""

    def __init__(self, begun: Callable[[Any, Future[Any]], None]) -> None:
        self._begun = begun

    def remote(self, argument: Any = None) -> Call:
        self._future: Future[Any] = Future()
        self._begun(argument, self._future)
        return self

    def future(self) -> Future[Any]:
        return self._future


def _end(future: Future[Any], error: Exception | None) -> None:
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


class Worker:
    """Starts at once unless it is `late`, or fails to with `error`; `given` are its unfinished jobs."""

    def __init__(self, late: bool, error: Exception | None) -> None:
        self.given: dict[str, Future[Any]] = {}
        self.greet = Call(lambda _, future: None if late else _end(future, error))
        self.handle = Call(self.given.__setitem__)

    def finish(self, job: str) -> None:
        self.given.pop(job).set_result(f"result of {job}")

    def die(self, error: Exception | None = None) -> None:
        for future in self.given.values():
            future.set_exception(error or ActorDiedError())


class Bench:
    """A pool with workers of the test, and what it has delivered."""

    def __init__(self, size: int) -> None:
        self.workers: list[Worker] = []
        self.results: dict[str, Any] = {}
        self.broken: list[PoolBroken] = []
        self.late, self.alive = False, True
        self.error: Exception | None = None
        self.pool = WorkerPool(
            self._start, size,
            admit=lambda _: None, alive=lambda: self.alive, on_broken=self.broken.append, clock=lambda: 0.0,
        )  # fmt: skip

    def _start(self) -> Worker:
        self.workers.append(Worker(self.late, self.error))
        return self.workers[-1]

    def submit(self, *jobs: str) -> None:
        """Jobs whose names begin with the same letter are about the same subject."""
        for job in jobs:
            deliver = partial(self.results.__setitem__, job)
            self.pool.submit(Job(job, deliver, expires=1.0, subject=job[0]))
        self.settle()

    def settle(self) -> None:
        """Until the pool has seen every event before this one."""
        seen: list[bool] = []
        self.pool._events.put(lambda: seen.append(True))
        while not seen:
            time.sleep(0.001)

    def why_broken(self) -> str:
        """Why the pool ends, which it does within seconds."""
        deadline = time.monotonic() + 20
        while not self.broken and time.monotonic() < deadline:
            time.sleep(0.01)
        return "; ".join(map(str, self.broken))

    def finish(self, worker: int, job: str) -> None:
        self.workers[worker].finish(job)
        self.settle()

    def die(self, worker: int) -> None:
        self.workers[worker].die()
        self.settle()

    @property
    def given(self) -> list[list[str]]:
        return [sorted(worker.given) for worker in self.workers]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr("simulations.runtime.pool._kill", lambda _: None)
    bench = Bench(2)
    bench.settle()
    yield bench
    bench.pool.close()
    assert not bench.broken


def test_every_worker_has_a_job_before_one_has_a_next_one(two: Bench) -> None:
    two.submit("a", "b")
    assert sorted(two.given) == [["a"], ["b"]]


def test_workers_get_next_jobs_and_the_last_ones_wait_for_whoever_is_free_first(two: Bench) -> None:
    two.submit("a", "b", "c", "d", "e", "f")
    assert sorted(map(len, two.given)) == [2, 2]  # e and f wait
    slow, fast = 0, 1
    for job in sorted(two.given[fast]):
        two.finish(fast, job)
    two.finish(fast, "e" if "e" in two.given[fast] else "f")
    left = {"e", "f"} - set(two.results)
    assert set(two.given[fast]) == left
    assert len(two.given[slow]) == 2, "they were there before"
    assert len(two.results) == 3


def test_no_job_has_a_second_one_behind_it_while_others_are_free(two: Bench) -> None:
    two.submit("a", "b", "c")
    assert sorted(map(len, two.given)) == [1, 1]
    holder = next(i for i, jobs in enumerate(two.given) if "b" in jobs)
    two.finish(holder, "b")
    assert two.given[holder] == ["c"]


def test_the_next_job_of_a_worker_that_dies_is_not_blamed(two: Bench) -> None:
    two.submit("a", "b", "c", "d", "e", "f")
    first = two.given[0]
    two.die(0)
    two.die(2)  # the worker that came for it, with the same jobs
    running, after = sorted(first)
    assert two.results == {running: None}, "two workers have died over it"
    assert any(after in jobs for jobs in [two.given[1], *two.given[3:]])
    assert two.pool.replaced == 2


def serve(bench: Bench) -> dict[str, int]:
    """Which worker does which job, where the first one of each worker takes the same time, then the next one."""
    done: dict[str, int] = {}
    while jobs := [(at, next(iter(worker.given))) for at, worker in enumerate(bench.workers) if worker.given]:
        for at, job in jobs:
            bench.finish(at, job)
            done[job] = at
    return done


def test_a_worker_gets_the_next_job_about_what_it_had_the_last_one_about(two: Bench) -> None:
    two.submit(*(f"{subject}1" for subject in "abcdefgh"))
    before = serve(two)
    two.submit("x1", "y1", "x2", "y2", *(f"{subject}2" for subject in "abcdefgh"))  # the first ones keep both busy
    after = serve(two)
    assert len(before) == 8
    assert len(after) == 12
    same = [after[f"{subject}2"] == before[f"{subject}1"] for subject in "abcdefgh"]
    assert sum(same) >= 7, "the last one goes to whoever is free"


def test_no_worker_waits_for_jobs_that_another_one_should_have(two: Bench) -> None:
    two.submit(*(f"{subject}1" for subject in "abcdef"))
    before = serve(two)
    two.submit(*(f"{job[0]}2" for job, at in before.items() if at == 0))
    assert min(map(len, two.given)) == 1


def test_the_jobs_that_a_dead_worker_should_have_had_are_done_by_others(two: Bench) -> None:
    two.submit(*(f"{subject}1" for subject in "abcdef"))
    before = serve(two)
    assert set(before.values()) == {0, 1}
    two.submit("x1")
    holder = next(at for at, given in enumerate(two.given) if given)
    two.submit(*(f"{job[0]}2" for job in before))
    two.die(holder)
    two.workers[holder].given.clear()
    assert set(serve(two)) | set(two.results) >= {"x1", *(f"{job[0]}2" for job in before)}


def waiting(*jobs: str) -> list[Job]:
    return [Job(job, print, expires=1.0, subject=job[0]) for job in jobs]


def test_jobs_are_taken_in_the_order_in_which_they_came_whoever_should_have_them() -> None:
    queue = _Waiting()
    for job in waiting("a1", "b1"):
        queue.add(job)
    assert [queue.take(worker).argument for worker in ("A", "B")] == ["a1", "b1"]
    for job in waiting("a2", "x1", "a3", "b2"):
        queue.add(job)
    assert [queue.take("A").argument for _ in range(4)] == ["a2", "x1", "a3", "b2"], "b2 is another worker's"
    assert len(queue) == 0


def test_a_worker_that_has_nothing_takes_the_last_job_of_another_one() -> None:
    queue = _Waiting()
    queue.add(*waiting("a1"))
    queue.take("A")
    for job in waiting("a2", "a3"):
        queue.add(job)
    assert not queue.has_for("B")
    assert [queue.take("B").argument, queue.take("A").argument] == ["a3", "a2"]


def test_what_a_dead_worker_had_and_should_have_had_comes_before_later_jobs() -> None:
    queue = _Waiting()
    for job in waiting("a1", "b1", "c1"):
        queue.add(job)
    had = [queue.take("A") for _ in range(3)]
    for job in waiting("a2", "x1", "b2"):
        queue.add(job)
    queue.forget("A", had[1:])
    queue.add(*waiting("a3"))
    assert [queue.take("C").argument for _ in range(6)] == ["b1", "c1", "a2", "x1", "b2", "a3"]


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr("simulations.runtime.pool._kill", lambda _: None)
    monkeypatch.setattr("simulations.runtime.pool.PROBE_SECONDS", 0.05)
    monkeypatch.setattr("simulations.runtime.pool.START_SECONDS", 0.3)
    bench = Bench(1)
    bench.settle()
    yield bench
    bench.pool.close()


def test_a_replacement_that_never_starts_ends_the_run_while_jobs_wait(one: Bench) -> None:
    """Ray accepts an actor that it will never start where it has no raylet, or where others have its CPUs."""
    one.submit("a")
    one.late = True
    one.die(0)
    assert "no Ray worker has started for 0.3 s" in one.why_broken()


def test_a_worker_that_cannot_be_built_ends_the_run_at_once_with_the_cause(one: Bench) -> None:
    """Its app raises: on a cluster, a library is missing there, or a plugin."""
    cause = RayTaskError("__init__", "Traceback:\n  ...\nModuleNotFoundError: No module named 'timm'\n", ValueError())
    one.submit("a")
    one.error = ActorDiedError(cause)
    one.die(0)
    assert one.why_broken() == "a worker could not start: ModuleNotFoundError: No module named 'timm'"
    assert len(one.workers) == 2


def test_the_last_death_is_named_where_workers_die_one_after_the_other(one: Bench) -> None:
    one.error = WorkerCrashedError()
    one.submit("a")
    one.die(0)
    assert "8 Ray workers died one after the other" in one.why_broken()
    assert one.why_broken().endswith(f"the last one: {str(WorkerCrashedError()).splitlines()[-1].strip()}")


def test_without_waiting_jobs_a_worker_may_start_as_late_as_it_likes(one: Bench) -> None:
    one.submit("a")
    time.sleep(0.6)  # it works
    one.late = True
    one.finish(0, "a")
    time.sleep(0.6)
    assert not one.broken


def test_a_ray_that_has_died_is_noticed_while_a_job_runs(one: Bench) -> None:
    one.submit("a")
    one.alive = False
    assert "no longer answers" in one.why_broken()
