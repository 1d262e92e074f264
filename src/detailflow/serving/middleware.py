"""What surrounds every request: time, size, the API key and the counters. Plain ASGI: streams pass unchanged."""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from detailflow.serving.batcher import ClosingError
from detailflow.serving.counters import Metrics
from detailflow.serving.options import ServeConfig
from detailflow.serving.refusals import ApiError, api_error
from detailflow.serving.strict import whole_form
from detailflow.serving.studio import PREFIX

_log = logging.getLogger(__name__)
MULTIPART_EXTRA = 64 * 1024  # bytes of a form beside its file
LARGEST_JSON = 2**20  # bytes
_OPEN = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")  # without the key; all else needs it
_METHODS = {"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"}  # anybody may make up others


class Guard:
    """Check the key, bound the body and the time, count the answer."""

    def __init__(
        self,
        app: ASGIApp,
        routes: Sequence[BaseRoute],
        config: ServeConfig,
        metrics: Metrics,
        ending: Callable[[], bool],
    ) -> None:
        self.app, self.routes = app, routes
        self.config, self.metrics, self.ending = config, metrics, ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        is_head = scope["method"] == "HEAD"  # which is answered as GET, but for the body
        inner = {**scope, "headers": [one for one in scope["headers"] if one[0] != b"range"]}  # which may be ignored
        inner["method"] = "GET" if is_head else scope["method"]

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            elif is_head:
                message["body"] = b""
            await send(message)

        self.metrics.in_progress.inc()
        try:
            async with asyncio.timeout(self.config.timeout + 1):  # jobs end at their own deadline, a second earlier
                self._authorize(scope)
                body = whole_form(_header(scope, b"content-type"), self._bounded(scope, receive))
                await self.app(inner, body, watched)
        except (ApiError, TimeoutError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and not self.ending():  # by who called the app
                raise
            try:
                if status:  # too late for another answer
                    raise TimeoutError from error
                # A server that ends cancels what it waits for no longer.
                problem = ClosingError() if isinstance(error, asyncio.CancelledError) else error
                async with asyncio.timeout(1):
                    await api_error(problem).response()(scope, receive, watched)
            except TimeoutError:
                _log.info("a client did not read its answer in time")
                await _abort(send)
        finally:
            self.metrics.in_progress.dec()
            path = self._route(inner)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.requests.labels(method, path, status).inc()
            self.metrics.latency.labels(path).observe(time.perf_counter() - started)

    def _route(self, scope: Scope) -> str:
        """Return the path of a request's route, also of one that was refused before; anybody may make up others."""
        found = (getattr(route, "path", "other") for route in self.routes if route.matches(scope)[0] != Match.NONE)
        return getattr(scope.get("route"), "path", None) or next(found, "other")

    def _authorize(self, scope: Scope) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.config.api_key is None:
            self._refuse_other_sites(scope)
            return
        if path in _OPEN or path.startswith(PREFIX):
            return
        given = _header(scope, b"authorization").partition(b" ")
        right = given[0].lower() == b"bearer" and hmac.compare_digest(given[2].strip(), self.config.api_key.encode())
        if not right:
            message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _refuse_other_sites(self, scope: Scope) -> None:
        """Refuse work for a page of another site, which can send forms without asking.

        Browsers say so themselves; the names in Origin and Host differ behind some proxies as well.
        """
        if self.config.cross_site or scope["method"] != "POST" or _header(scope, b"sec-fetch-site") != b"cross-site":
            return
        message = "other sites' pages may not ask a server without a key: set one, or allow it (--no-auth, cross_site)"
        raise ApiError(403, message, code="cross_site")

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Return `receive` with a limit on the bytes of the body."""
        upload = _header(scope, b"content-type").lower().startswith(b"multipart/")
        limit = self.config.max_upload + MULTIPART_EXTRA if upload else LARGEST_JSON
        received = 0
        too_large = ApiError(413, f"the body is too large: {limit:,} bytes are the most here")
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > limit:
            raise too_large

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large
            return message

        return bounded


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


async def _abort(send: Send) -> None:
    """Close the connection of uvicorn's `send` at once; an ordinary close would wait for its client to read."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    abort: Callable[[], object] | None = getattr(transport, "abort", None)
    if abort:
        abort()
        await asyncio.sleep(0)  # uvicorn hears of it now
