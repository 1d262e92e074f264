"""Clients that close their connection before they have an answer."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

T = TypeVar("T")
CLIENT_GONE = 499  # nginx's number, for the metrics: nobody reads it


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | Response:
    """Return what `work` returns; give it up if the client closes the connection."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=CLIENT_GONE)
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
