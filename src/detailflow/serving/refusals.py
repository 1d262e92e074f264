"""Errors in the format of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from detailflow.errors import DetailFlowError
from detailflow.serving.batcher import ClosingError, ComputingError, QueueFullError
from detailflow.words import printable

LONGEST = 100  # characters of what a client gave, in messages
FILE_ADVICE = "send what the file contains, as curl -F image=@photo.png does, with @"
_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class ApiError(HTTPException):
    """An answer that is not a success, with one sentence that says what would be right."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, printable(message), dict(headers or {}))
        self.param, self.code = param and shortened(printable(param)), code or _CODES.get(status)

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        kinds = {429: "rate_limit_error"}
        kind = kinds.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.content, self.status_code, self.headers)


def shortened(value: object) -> str:
    """Return a client's value for a message; of one longer than `LONGEST` only its start and end."""
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 4 :]}"


def api_error(error: Exception, scope: Scope | None = None) -> ApiError:
    """Return what a client is told about an error in answering that request; nothing about the server's inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, _sentence(error, scope or {}), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return _invalid(error, getattr((scope or {}).get("route"), "fields", ()))
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(error.retry_after)}
        return ApiError(429, f"too many images wait already: {error}", code="rate_limit_exceeded", headers=headers)
    if isinstance(error, ClosingError):
        return ApiError(503, "the server is stopping: try again", code="stopping", headers={"Retry-After": "1"})
    if isinstance(error, TimeoutError):
        return ApiError(503, "this took longer than the server allows: ask for less, or later", code="timeout")
    if isinstance(error, DetailFlowError):
        return ApiError(400, str(error))
    message = "the model failed" if isinstance(error, ComputingError) else "something failed in the server"
    return ApiError(500, f"{message}: its log says why", code="internal_error")


def install(app: FastAPI) -> None:
    """Let the app answer every error in this format."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return api_error(error, request.scope).response()

    kinds = (HTTPException, RequestValidationError, QueueFullError, ClosingError, ComputingError, TimeoutError)
    for kind in (*kinds, DetailFlowError, Exception):
        app.add_exception_handler(kind, answer)


def advice_on(name: str, known: Iterable[str]) -> str:
    """Return what to do about a parameter that is none of those known."""
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else "see /docs"


def _sentence(error: HTTPException, scope: Scope) -> str:
    """Return what a framework's own error is about, and what would be right."""
    path, detail = shortened(scope.get("path", "")), str(error.detail)
    if error.status_code == 404:
        return f"there is no {path} here: /docs lists what there is"
    if error.status_code == 405:
        others = (error.headers or {}).get("Allow", "another method")
        return f"{path} takes {others}, not {shortened(scope.get('method', ''))}"
    if "exceeded maximum size" in detail:
        return f"a text in the form has more than 1 MiB: if it is an image, {FILE_ADVICE}"
    return detail.lower()


def _invalid(error: RequestValidationError, fields: Iterable[str]) -> ApiError:
    """Return the first thing that is wrong with a request of these fields, as a sentence."""
    problems = error.errors()
    first = problems[0]
    where = [str(part) for part in first["loc"][1:] if not isinstance(part, int)]
    param, kind, message = (where[0] if where else None), first["type"], first["msg"]
    if kind == "json_invalid":
        what = first.get("ctx", {}).get("error", message).removesuffix(" at")
        return ApiError(400, f"the body is not valid JSON: {what} at character {first['loc'][1]}", code="invalid_json")
    if not where and isinstance(first.get("input"), bytes):  # as another kind of content
        message = "the body was not sent as JSON: send it with the header Content-Type: application/json"
        return ApiError(400, message, code="invalid_json")
    if kind == "extra_forbidden":
        advice = advice_on(param or "", fields)
        return ApiError(400, f"unknown parameter {shortened(repr(param))}: {advice}", param, "unknown_parameter")
    if param == "image" and isinstance(first.get("input"), str):
        return ApiError(400, f"image must be a file, not text: {FILE_ADVICE}", param, "invalid_value")
    if kind == "missing":
        return ApiError(400, f"{param or 'the body'} is missing: see /docs", param, "missing_required_parameter")
    message = _alternatives(problems)
    text = message if message[1:2].isupper() else f"{message[0].lower()}{message[1:]}"
    return ApiError(400, f"{param}: {text}" if param else f"the body: {text}", param, "invalid_value")


def _alternatives(problems: Sequence[Mapping[str, Any]]) -> str:
    """Return the first message, with what else its value may be, such as a number or `off`."""
    first, start = problems[0], "Input should be "
    if len(first["loc"]) != 3 or isinstance(first["loc"][2], int):  # an item of a list
        return str(first["msg"])
    messages = [one["msg"] for one in problems if one["loc"][:2] == first["loc"][:2] and len(one["loc"]) == 3]
    if not all(message.startswith(start) for message in messages):
        return str(first["msg"])
    return start + " or ".join(message.removeprefix(start).partition(",")[0] for message in messages)
