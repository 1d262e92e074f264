"""One thread that computes batches of what many requests ask for, off the event loop.

Requests are split into images. A batch is the image that has waited longest and those behind it with the same key (the
same sampling), so images with other keys wait for their turn, which comes at the latest when they are the oldest.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from detailflow.serving.counters import Metrics

_log = logging.getLogger(__name__)
LONGEST_RETRY = 60  # seconds, of Retry-After


class QueueFullError(Exception):
    """There is no room for these images; try again in `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"try again in {retry_after} s")
        self.retry_after = retry_after


class ClosingError(Exception):
    """The service is stopping and takes nothing more."""


class ComputingError(Exception):
    """The model failed; the log says why."""


class Result(NamedTuple):
    """What a batch has for one of its images; `final` if nothing more comes for it."""

    image: int  # its number in its job (of a runner: in its batch)
    value: Any
    final: bool


class Job:
    """The images of one request, and what has been computed of them: `async for result in job`.

    A job is a context manager: on leaving, what is not computed yet is given up.
    """

    def __init__(self, batcher: "Batcher", key: Hashable, items: Sequence[Any], deadline: float) -> None:
        self.key, self.items, self.deadline = key, items, deadline
        self.started = self.cancelled = False
        self._batcher, self._loop = batcher, asyncio.get_running_loop()
        self._results: asyncio.Queue[Result | Exception] = asyncio.Queue()
        self.unfinished = len(items)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._batcher.cancel(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Result:
        """Return the next result.

        Raises:
            TimeoutError: at the job's deadline.
            ClosingError, ComputingError: if there will be none.
        """
        if not self.unfinished:
            raise StopAsyncIteration
        async with asyncio.timeout_at(self.deadline):
            result = await self._results.get()
        if isinstance(result, Exception):
            raise result
        self.unfinished -= result.final
        return result

    def deliver(self, results: Iterable[Result | Exception]) -> None:
        """Hand results to the event loop, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._put, list(results))
        except RuntimeError:  # the loop is closed: nobody waits for them any more
            self.cancelled = True

    def _put(self, results: Sequence[Result | Exception]) -> None:
        for result in results:
            self._results.put_nowait(result)


@dataclass(frozen=True, eq=False)
class Task:
    """One image of a job, as the runner sees it."""

    job: Job
    index: int
    arrived: float

    @property
    def item(self) -> Any:
        """What was submitted."""
        return self.job.items[self.index]

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.job.cancelled


Runner = Callable[[Hashable, Sequence[Task]], Iterator[Iterable[Result]]]


class Batcher:
    """The queue and the thread that works through it.

    Args:
        run: computes a batch: yields what there is after each step (perhaps nothing), so that between steps a batch
            that nobody waits for can be given up.
        max_batch: images of a batch.
        window: seconds to wait for as many more images as the last batch had.
        max_queue: images that may wait.
    """

    def __init__(self, run: Runner, max_batch: int, window: float, max_queue: int, metrics: Metrics) -> None:
        self._run, self.max_batch, self.window, self.max_queue = run, max_batch, window, max_queue
        self.metrics = metrics
        self._waiting: deque[Task] = deque()
        self._changed = threading.Condition()
        self._closing = self._stopped = False
        self._last_size = 1
        self._seconds_per_image = 0.0
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def closing(self) -> bool:
        """Whether the service is stopping."""
        return self._closing

    @property
    def accepts(self) -> bool:
        """Whether new work is taken."""
        return self.alive and not self._closing

    def submit(self, key: Hashable, items: Sequence[Any], timeout: float) -> Job:
        """Queue the images of a request; call it in the event loop.

        Raises:
            QueueFullError: if so many more may not wait.
            ClosingError: if the service is stopping.
        """
        job = Job(self, key, items, asyncio.get_running_loop().time() + timeout)
        now = time.monotonic()
        with self._changed:
            if self._closing:
                raise ClosingError
            if len(self._waiting) + len(items) > self.max_queue:
                raise QueueFullError(self._retry_after())
            self._waiting.extend(Task(job, i, now) for i in range(len(items)))
            self._note_queue()
        return job

    def cancel(self, job: Job) -> None:
        """Give up what is not computed yet of a job."""
        if job.cancelled or not job.unfinished:
            return
        with self._changed:
            job.cancelled = True
            self._remove(lambda task: task.job is job)
        self.metrics.cancelled.inc(job.unfinished)

    def drain(self) -> None:
        """Take nothing more: refuse the jobs that have not started, finish the others."""
        with self._changed:
            self._closing = True
            refused = {task.job for task in self._waiting if not task.job.started}
            self._remove(lambda task: task.job in refused)
        for job in refused:
            job.deliver([ClosingError()])

    def stop(self, seconds: float = 5.0) -> None:
        """Give up everything and wait for the thread, which ends after its present step."""
        self.drain()
        with self._changed:
            self._stopped = True
            rest = {task.job for task in self._waiting}
            self._remove(lambda task: True)
        for job in rest:
            job.deliver([ClosingError()])
        if self.alive:
            self._thread.join(seconds)

    def _remove(self, unwanted: Callable[[Task], bool]) -> None:
        self._waiting = deque(task for task in self._waiting if not unwanted(task))
        self._note_queue()

    def _note_queue(self) -> None:
        self.metrics.queued.set(len(self._waiting))
        self._changed.notify_all()

    def _retry_after(self) -> int:
        seconds = len(self._waiting) * self._seconds_per_image
        return min(max(math.ceil(seconds), 1), LONGEST_RETRY)

    def _work(self) -> None:
        while batch := self._next_batch():
            self._compute(batch)

    def _next_batch(self) -> list[Task] | None:
        """Wait for a batch and take it from the queue; `None` if there will be no more."""
        with self._changed:
            free = time.monotonic()
            # Those who wait, and the clients of the last batch, who are about to ask again; of a single client nobody
            # else.
            expected = min(len(self._waiting) + self._last_size, self.max_batch)
            while True:
                if not self._waiting:
                    if self._closing:
                        return None
                    self._changed.wait()
                    continue
                key = self._waiting[0].job.key
                batch = [task for task in self._waiting if task.job.key == key][: self.max_batch]
                rest = max(free, batch[0].arrived) + self.window - time.monotonic()
                if len(batch) >= expected or rest <= 0 or self._closing:
                    break
                self._changed.wait(rest)
            taken = set(batch)
            for task in batch:
                task.job.started = True
            self._remove(taken.__contains__)
        self._last_size = len(batch)
        return batch

    def _compute(self, batch: Sequence[Task]) -> None:
        started = time.monotonic()
        for task in batch:
            self.metrics.waited.observe(started - task.arrived)
        self.metrics.batch_size.observe(len(batch))
        try:
            for results in self._run(batch[0].job.key, batch):
                for result in results:
                    task = batch[result.image]
                    task.job.deliver([result._replace(image=task.index)])
                    self.metrics.images.inc(result.final)
                if self._stopped:
                    raise ClosingError
                if all(task.cancelled for task in batch):
                    return
        except Exception as error:
            if not isinstance(error, ClosingError):
                _log.exception("a batch of %d failed", len(batch))
                error = ComputingError()
            for job in {task.job for task in batch}:
                job.deliver([error])
        finally:
            seconds = time.monotonic() - started
            self.metrics.batch_seconds.observe(seconds)
            self._seconds_per_image = seconds / len(batch)
