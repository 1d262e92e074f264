"""Slow work on files that clients sent or ask for, off the event loop, a few pieces at once."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """Runs work in threads of its own, which no other answer waits for, nor the end of the process.

    Args:
        name: what its threads are called.
        at_once: threads that run; more work waits for them.
    """

    def __init__(self, name: str, at_once: int) -> None:
        self.name, self._room = name, asyncio.Semaphore(at_once)

    async def run(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; its thread goes on if nobody waits for that any more."""
        await self._room.acquire()
        return await asyncio.wrap_future(self._start(work, asyncio.get_running_loop()))

    def _start(self, work: Callable[[], T], loop: asyncio.AbstractEventLoop) -> Future[T]:
        result: Future[T] = Future()
        result.set_running_or_notify_cancel()  # a client that leaves does not stop it
        thread = threading.Thread(target=self._work, args=(work, loop, result), name=self.name, daemon=True)
        try:
            thread.start()
        except Exception:  # there are as many threads as there may be
            self._room.release()
            raise
        return result

    def _work(self, work: Callable[[], T], loop: asyncio.AbstractEventLoop, result: Future[T]) -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)
            del result  # a failure's traceback holds this frame
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(self._room.release)
