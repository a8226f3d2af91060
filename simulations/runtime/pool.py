"""Ray actors that run jobs one at a time and are replaced when they die.

One thread makes all decisions. It takes events from a queue: a job was submitted, a worker has started, a job is done.
Nothing polls, and the work per job does not depend on the number of jobs.

While many jobs wait, a worker has its next one beside the one that it runs: the way of a result to this thread and of a
job back takes milliseconds, and on a machine that is as busy as it should be, more.

A worker may have kept what it needs for the next job about the same subject, so it gets that job, unless another worker
would have nothing to do.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightcl.errors import one_line

logger = logging.getLogger("lightcl")

PROBE_SECONDS = 5.0
"""How often Ray is checked."""
START_SECONDS = 300.0
"""How long jobs may wait while no worker has started, or none of those that replace dead ones."""
SUBJECTS = 4096
"""Of so many subjects the pool knows the last worker: the devices of a round, not those of a fleet."""
DEATHS = 2
"""Workers that die over one job until the job counts as the cause."""


class PoolBroken(Exception):
    """No worker can run any more; the text says why."""


@dataclass
class Job:
    """One call of `DeviceWorker.handle(argument)`.

    `deliver` gets its result, an exception, or None if every worker that tried died.
    """

    argument: Any
    deliver: Callable[[Any], None]
    expires: float
    """Time of `clock()` after which the job is no longer started."""
    subject: Hashable = None
    """What the job is about; None: nothing that a worker keeps anything of."""
    deaths: int = 0
    place: int = 0
    """Among all jobs, in the order in which they came."""


class _Waiting:
    """The jobs that no worker has, in the order in which they came, by the worker that should have them."""

    def __init__(self) -> None:
        self._of: dict[Any, deque[Job]] = {None: deque()}
        """None: jobs that any worker may have. No other queue is empty."""
        self._last: OrderedDict[Hashable, Any] = OrderedDict()  # the last worker, by subject
        self._arrived = 0

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def add(self, job: Job) -> None:
        self._arrived += 1
        job.place = self._arrived
        self._of.setdefault(self._last.get(job.subject), deque()).append(job)

    def forget(self, actor: Any, jobs: Iterable[Job]) -> None:
        """An actor has died: any other may have `jobs`, which it had, and those that it should have had."""
        free = [*jobs, *self._of.pop(actor, ()), *self._of[None]]
        self._of[None] = deque(sorted(free, key=lambda job: job.place))
        for subject in [subject for subject, last in self._last.items() if last == actor]:
            del self._last[subject]

    def has_for(self, actor: Any) -> bool:
        return bool(self._of[None]) or actor in self._of

    def take(self, actor: Any) -> Job:
        """The next job for a worker: the first that it should have or may have, else the last one of another worker."""
        queues = {owner: jobs for owner in (actor, None) if (jobs := self._of.get(owner))}
        if queues:
            owner = min(queues, key=lambda owner: queues[owner][0].place)
            job = self._of[owner].popleft()
        else:
            owner = max(self._of, key=lambda owner: len(self._of[owner]))
            job = self._of[owner].pop()
        if owner is not None and not self._of[owner]:
            del self._of[owner]
        if job.subject is not None:
            self._last[job.subject] = actor
            self._last.move_to_end(job.subject)
            if len(self._last) > SUBJECTS:
                self._last.popitem(last=False)
        return job


class WorkerPool:
    """`size` workers created by `start`, which returns an actor with `greet` and `handle`.

    `admit(greeting)` raises PoolBroken if a worker that has started cannot be used. `alive` says whether the cluster
    still answers. `on_broken(error)` is called once, from the pool's thread.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        size: int,
        *,
        admit: Callable[[Any], None],
        alive: Callable[[], bool],
        on_broken: Callable[[PoolBroken], None],
        clock: Callable[[], float],
    ) -> None:
        self._start, self._size, self._admit, self._alive = start, size, admit, alive
        self._on_broken, self._clock = on_broken, clock
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting = _Waiting()
        self._jobs: dict[Any, list[Job]] = {}  # of the actors that have started: the job that runs and the next one
        self._actors: set[Any] = set()
        self._deaths = 0  # since a worker last finished a job
        self._probed = time.monotonic()
        self._stuck: float | None = None  # since when jobs wait without a worker
        self.replaced = 0
        """Workers that died and were replaced."""
        self._thread = threading.Thread(target=self._run, name="worker-pool", daemon=True)
        self._events.put(self._fill)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._events.put(partial(self._waiting.add, job))

    def close(self) -> None:
        """Stops the thread and the workers; unfinished jobs are never delivered."""
        self._events.put(None)
        self._thread.join(timeout=10)
        if self._alive():
            while self._actors:  # the thread may still start one
                _kill(self._actors.pop())

    # -- the pool's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with suppress(queue.Empty):
                    event = self._events.get(timeout=PROBE_SECONDS)
                    if event is None:
                        return
                    event()
                    self._dispatch()
                self._probe()
        except PoolBroken as error:
            self._on_broken(error)
        except Exception as error:
            self._on_broken(PoolBroken(f"Ray failed: {type(error).__name__}: {error}"))

    def _probe(self) -> None:
        """Raises PoolBroken where Ray has died, or where it starts no worker although jobs wait.

        A Ray without its raylet says nothing: it accepts new workers and never starts them.
        """
        now = time.monotonic()
        if not self._waiting or self._jobs:
            self._stuck = None
        elif self._stuck is None:
            self._stuck = now
        elif now - self._stuck > START_SECONDS:
            raise PoolBroken(f"no Ray worker has started for {START_SECONDS:g} s, although devices wait for one")
        if now - self._probed >= PROBE_SECONDS:
            if not self._alive():
                raise PoolBroken("the Ray cluster no longer answers")
            self._probed = time.monotonic()

    def _fill(self) -> None:
        while len(self._actors) < self._size:
            actor = self._start()
            self._actors.add(actor)
            self._when_done(actor.greet.remote(), partial(self._started, actor))

    def _when_done(self, reference: Any, then: Callable[[Future[Any]], None]) -> None:
        future = reference.future()  # called back from a thread of Ray, or at once
        future.add_done_callback(lambda done: self._events.put(partial(then, done)))

    def _started(self, actor: Any, greeting: Future[Any]) -> None:
        error = greeting.exception()
        if error is None:
            self._admit(greeting.result())
            self._jobs[actor] = []
        elif _is_death(error) and not getattr(error, "actor_init_failed", False):
            self._replace(actor, error)
        else:  # its constructor raised an error, and will do so again
            self._actors.discard(actor)
            raise PoolBroken(f"a worker could not start: {_reason(error)}")

    def _dispatch(self) -> None:
        while self._waiting and self._jobs:
            actor, jobs = min(self._jobs.items(), key=lambda item: (len(item[1]), not self._waiting.has_for(item[0])))
            most = 2 if len(self._waiting) > len(self._jobs) else 1  # the last jobs go to whoever is free first
            if len(jobs) >= most:
                return
            job = self._waiting.take(actor)
            if job.expires < self._clock():
                job.deliver(TimeoutError("expired before a worker was free"))
                continue
            jobs.append(job)
            self._when_done(actor.handle.remote(job.argument), partial(self._finished, actor, job))

    def _finished(self, actor: Any, job: Job, result: Future[Any]) -> None:
        if actor not in self._jobs:  # it has died, and its jobs are with others
            return
        error = result.exception()
        if error is not None and _is_death(error):
            running, *others = self._jobs.pop(actor)
            running.deaths += 1
            if running.deaths < DEATHS:
                others.insert(0, running)
            else:
                running.deliver(None)
            self._waiting.forget(actor, others)
            self._replace(actor, error)
            return
        self._jobs[actor].remove(job)
        self._deaths = 0
        job.deliver(error if error is not None else result.result())

    def _replace(self, actor: Any, error: BaseException) -> None:
        self._actors.discard(actor)
        if not self._alive():
            raise PoolBroken("the Ray cluster no longer answers")
        self._deaths += 1
        if self._deaths >= max(8, 4 * self._size):
            raise PoolBroken(
                f"{self._deaths} Ray workers died one after the other (out of memory?): set fewer simulation.workers; "
                f"the last one: {_reason(error)}"
            )
        self.replaced += 1
        logger.warning("a Ray worker died and is replaced")
        _kill(actor)  # one that only lost its connection must not keep running beside its replacement
        self._fill()


def _reason(error: BaseException) -> str:
    """The last line of an error: Ray puts a traceback, or the actor's description, before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1] if lines else type(error).__name__)


def _kill(actor: Any) -> None:
    import ray

    ray.kill(actor)


def _is_death(error: BaseException) -> bool:
    from ray.exceptions import NodeDiedError, RayActorError, WorkerCrashedError
    from ray.exceptions import OutOfMemoryError as RayOutOfMemoryError

    return isinstance(error, (RayActorError, WorkerCrashedError, NodeDiedError, RayOutOfMemoryError))
