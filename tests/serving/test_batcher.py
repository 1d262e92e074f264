"""The queue: who is computed with whom, in which order, and what becomes of those who leave."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest

from detailflow.serving.batcher import Batcher, ClosingError, ComputingError, Job, QueueFullError, Result, Task
from detailflow.serving.counters import Metrics


class Machine:
    """Computes only when it is told to, and notes its batches; every item takes two steps."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, list[Any]]] = []
        self.steps = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def run(self, key: Any, tasks: Sequence[Task]) -> Iterator[list[Result]]:
        self.batches.append((key, [task.item for task in tasks]))
        self.begun.release()
        for final in (False, True):
            self.steps.acquire()
            if key == "broken":
                raise ValueError("broken")
            yield [Result(i, (task.item, final), final) for i, task in enumerate(tasks)]

    def release(self, steps: int = 1000) -> None:
        self.steps.release(steps)


Play = Callable[[Batcher, Machine], Coroutine[Any, Any, None]]


def play(scene: Play, max_batch: int = 4, window: float = 0, max_queue: int = 10) -> Metrics:
    """Run a scene with a batcher in an event loop."""

    async def scenes() -> None:
        machine = Machine()
        batcher = Batcher(machine.run, max_batch, window, max_queue, metrics)
        batcher.start()
        try:
            await asyncio.wait_for(scene(batcher, machine), 30)
        finally:
            machine.release()
            await asyncio.to_thread(batcher.stop)
            assert not batcher.alive

    metrics = Metrics()
    asyncio.run(scenes())
    return metrics


async def begun(machine: Machine) -> None:
    await asyncio.to_thread(machine.begun.acquire)


async def finals(job: Job) -> list[Any]:
    with job:
        return [result.value[0] async for result in job if result.final]


def value(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value(name) or 0.0


def test_what_waits_is_computed_together():
    async def scene(batcher: Batcher, machine: Machine) -> None:
        first = batcher.submit("a", ["first"], 9)
        await begun(machine)
        jobs = [batcher.submit("a", items, 9) for items in (["x"], ["y", "z"], ["u", "v"])]
        machine.release()
        assert await finals(first) == ["first"]
        assert [await finals(job) for job in jobs] == [["x"], ["y", "z"], ["u", "v"]]
        assert machine.batches == [("a", ["first"]), ("a", ["x", "y", "z", "u"]), ("a", ["v"])]

    metrics = play(scene)
    assert value(metrics, "detailflow_images_total") == 6
    assert value(metrics, "detailflow_batch_images_count") == 3
    assert value(metrics, "detailflow_queue_images") == 0


def test_no_sampling_starves_another():
    """Whatever comes, the image that has waited longest is in the next batch."""

    async def scene(batcher: Batcher, machine: Machine) -> None:
        jobs = [batcher.submit("a", ["a0"], 9)]
        await begun(machine)
        for key, count in (("a", 3), ("b", 1), ("a", 4), ("c", 1)):
            jobs.append(batcher.submit(key, [f"{key}{i}" for i in range(count)], 9))
        machine.release()
        for job in jobs:
            await finals(job)
        keys = [key for key, _ in machine.batches]
        assert keys == ["a", "a", "b", "a", "c"]
        assert [len(items) for _, items in machine.batches] == [1, 4, 1, 3, 1]

    play(scene)


def test_a_window_waits_for_the_clients_of_the_last_batch():
    async def scene(batcher: Batcher, machine: Machine) -> None:
        machine.release()
        lonely = batcher.submit("a", ["lonely"], 9)  # a single client does not wait for others
        await finals(lonely)
        both = [batcher.submit("a", [i, i], 9) for i in range(2)]
        for job in both:
            await finals(job)
        # The last batch had several: the next waits until as many are there.
        sizes = [len(items) for _, items in machine.batches]
        again = [batcher.submit("a", [i], 9) for i in range(sizes[-1])]
        for job in again:
            await finals(job)
        assert len(machine.batches[-1][1]) == sizes[-1]

    play(scene, window=2)


def test_a_full_queue_refuses_and_says_when_to_come_back():
    async def scene(batcher: Batcher, machine: Machine) -> None:
        running = batcher.submit("a", ["running"], 9)
        await begun(machine)
        waiting = batcher.submit("a", list(range(9)), 9)
        with pytest.raises(QueueFullError) as refused:
            batcher.submit("a", [1, 2], 9)
        assert 1 <= refused.value.retry_after <= 60
        accepted = batcher.submit("a", [1], 9)  # one more is room for
        machine.release()
        assert [len(await finals(job)) for job in (running, waiting, accepted)] == [1, 9, 1]

    play(scene)


def test_who_leaves_frees_the_queue_and_the_batch():
    async def scene(batcher: Batcher, machine: Machine) -> None:
        running = batcher.submit("a", ["running"], 9)
        await begun(machine)
        waiting = batcher.submit("a", list(range(10)), 9)
        with waiting:
            pass
        staying = batcher.submit("a", ["staying"], 9)
        with running:
            pass
        machine.release(3)  # the batch that nobody waits for ends with its first step, so two are left for the next
        assert await finals(staying) == ["staying"]
        assert [items for _, items in machine.batches] == [["running"], ["staying"]]

    metrics = play(scene)
    assert value(metrics, "detailflow_images_cancelled_total") == 11
    assert value(metrics, "detailflow_images_total") == 1


def test_time_is_limited():
    async def scene(batcher: Batcher, machine: Machine) -> None:
        job = batcher.submit("a", ["slow"], 0.05)
        with pytest.raises(TimeoutError):
            await finals(job)
        machine.release(1)
        machine.release(2)
        assert await finals(batcher.submit("a", ["next"], 9)) == ["next"]

    play(scene)


def test_an_error_fails_its_batch_alone(caplog: pytest.LogCaptureFixture):
    async def scene(batcher: Batcher, machine: Machine) -> None:
        machine.release()
        good, broken = batcher.submit("a", ["x"], 9), batcher.submit("broken", ["y"], 9)
        with pytest.raises(ComputingError):
            await finals(broken)
        assert await finals(good) == ["x"]
        assert await finals(batcher.submit("a", ["z"], 9)) == ["z"]

    play(scene)
    assert "ValueError: broken" in caplog.text


def test_an_end_in_order_finishes_what_runs():
    async def scene(batcher: Batcher, machine: Machine) -> None:
        running = batcher.submit("a", list(range(6)), 9)  # two batches
        await begun(machine)
        waiting = batcher.submit("a", ["waiting"], 9)
        batcher.drain()
        with pytest.raises(ClosingError):
            batcher.submit("a", ["late"], 9)
        with pytest.raises(ClosingError):
            await finals(waiting)
        machine.release()
        assert await finals(running) == list(range(6))

    play(scene)


def test_an_end_at_once_fails_what_runs():
    async def scene(batcher: Batcher, machine: Machine) -> None:
        running = batcher.submit("a", list(range(6)), 9)
        await begun(machine)
        stopping = asyncio.create_task(asyncio.to_thread(batcher.stop))
        while not batcher._stopped:
            await asyncio.sleep(0.001)
        machine.release(1)
        await stopping
        assert not batcher.alive  # it ended after the one step
        with pytest.raises(ClosingError):
            await finals(running)

    play(scene)
