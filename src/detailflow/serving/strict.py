"""Nothing is left out without a word: unknown parameters of the address, names given twice, the end of a form."""

import json
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header
from starlette.types import Message, Receive

from detailflow.serving.refusals import ApiError, advice_on, shortened


class StrictRoute(APIRoute):
    """A route whose parameters are known and given once, in the address and in JSON; forms see `takes_form`."""

    @property
    def fields(self) -> list[str]:
        """The names that its body may have."""
        bodies = [field.field_info.annotation for field in self.dependant.body_params]
        return [name for body in bodies for name in getattr(body, "model_fields", ())]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        handler = super().get_route_handler()
        known = [field.alias for field in self.dependant.query_params]
        is_api = self.path.startswith("/v1/")  # pages and probes may have an address with anything behind it

        async def checked(request: Request) -> Response:
            if is_api:
                names = [name for name, _ in request.query_params.multi_items()]
                refuse_unknown(names, known)
                refuse_twice(names)
            return await handler(_Strict(request.scope, request.receive))

        return checked


class _Strict(Request):
    async def json(self) -> Any:
        """Return the body; FastAPI answers a `JSONDecodeError` itself, but for others only says that there was one."""
        content = await self.body()
        try:
            return json.loads(content, object_pairs_hook=_unique)
        except json.JSONDecodeError:
            raise
        except UnicodeDecodeError as error:
            reason = f"it is not UTF-8 at byte {error.start}"
        except RecursionError:
            reason = "it is nested too deeply"
        except ValueError:  # Python's limit on what it takes for a number
            reason = "a number in it has thousands of digits"
        raise ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise an `ApiError` for a parameter in the address that the route does not know."""
    known = list(known)
    for name in names:
        if name not in known:
            advice = advice_on(name, known) if known else "this route takes none there"
            message = f"unknown parameter {shortened(repr(name))} in the address: {advice}"
            raise ApiError(400, message, name, "unknown_parameter")


def refuse_twice(names: Iterable[str]) -> None:
    """Raise an `ApiError` for a name that is there more than once: which of its values counts, nobody can know."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ApiError(400, f"{shortened(name)} is given more than once: give it once", name, "duplicate_parameter")
        seen.add(name)


def whole_form(kind: bytes, receive: Receive) -> Receive:
    """Return `receive` for a body of that kind: a form that ends before its last boundary is refused.

    The parser takes it as whole, without what was cut.
    """
    boundary = parse_options_header(kind)[1].get(b"boundary") if kind.lower().startswith(b"multipart/") else None
    if not boundary:  # without one, the parser refuses it
        return receive
    last = b"\r\n--" + boundary + b"--"
    ended, tail = False, b"\r\n"

    async def whole() -> Message:
        nonlocal ended, tail
        message = await receive()
        if message["type"] == "http.request" and not ended:
            seen = tail + message.get("body", b"")
            ended, tail = last in seen, seen[1 - len(last) :]
            if not ended and not message.get("more_body", False):
                raise ApiError(400, "the form ends before its last boundary: send all of it", code="invalid_form")
        return message

    return whole


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    refuse_twice(name for name, _ in pairs)
    return dict(pairs)
