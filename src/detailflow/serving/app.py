"""The routes: OpenAI's images API, tokens, classes, health and metrics."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Form, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from detailflow import __version__
from detailflow.pipeline import DetailFlowPipeline
from detailflow.serving import refusals, schemas
from detailflow.serving.leaving import unless_gone
from detailflow.serving.middleware import Guard
from detailflow.serving.options import ServeConfig
from detailflow.serving.reference import reference_page
from detailflow.serving.service import Answer, Service
from detailflow.serving.strict import StrictRoute
from detailflow.serving.studio import add_studio
from detailflow.serving.uploads import FORM, Uploads, takes_form
from detailflow.serving.views import add_pictures

_REFUSALS = {
    400: "Something in the request is wrong; the message says what would be right.",
    401: "The API key is missing or wrong.",
    403: "A web page of another site asks a server that wants no key.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too many images wait already; `Retry-After` says for how long to wait.",
    503: "The server is stopping, or the time limit is over.",
}
_EVENTS = {"text/event-stream": {"schema": {"type": "string", "description": "With `stream`: server-sent events."}}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Failure, "description": text} for status, text in _REFUSALS.items()
}

_STREAMED: dict[int | str, dict[str, Any]] = {**_RESPONSES, 200: {"content": _EVENTS}}


class App(FastAPI):
    """The app within its guard, which sees all that is sent, errors included."""

    service: Service
    openapi_schema: dict[str, Any] | None

    def build_middleware_stack(self) -> ASGIApp:
        """Put the guard around everything else."""
        service = self.service
        app = super().build_middleware_stack()
        return Guard(app, self.routes, service.config, service.metrics, lambda: service.batcher.closing)

    def openapi(self) -> dict[str, Any]:
        """Describe the API; status 422 is FastAPI's own, for what is answered with 400 here."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for methods in schema["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            self.openapi_schema = schema
        return self.openapi_schema


def create_app(pipeline: DetailFlowPipeline, config: ServeConfig | None = None) -> App:
    """Return the service as an ASGI app; `app.service` is what it works with."""
    service = Service(pipeline, config or ServeConfig())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.batcher.stop)

    app = App(
        title="DetailFlow",
        version=__version__,
        description="Images of classes, from coarse to fine, as OpenAI's images API has it.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # to an address made of what the client calls this host
    )
    app.router.route_class = StrictRoute
    app.service = service
    refusals.install(app)
    _add_models(app, service)
    uploads = Uploads(service.config)
    _add_images(app, service, uploads)
    _add_tokens(app, service, uploads)
    add_pictures(app, service, uploads, _RESPONSES)
    _add_operations(app, service)
    add_studio(app)
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["models"], responses=_only(400, 401))
    async def list_models() -> schemas.Models:
        """List the model of this server."""
        return schemas.Models(data=[service.describe()])

    @app.get("/v1/models/{model:path}", tags=["models"], responses=_only(400, 401, 404))
    async def get_model(model: str) -> schemas.Model:
        """Return what a model can do: its sizes, its best sampling, the server's limits."""
        service.check_model(model)
        return service.describe()

    @app.get("/v1/classes", tags=["models"], responses=_only(400, 401))
    async def list_classes(
        search: Annotated[
            str | None, Query(max_length=200, description="A part of a name, a number or a WordNet id.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    ) -> schemas.Classes:
        """List the classes, or those that a search finds."""
        return service.classes(search, limit)


def _add_images(app: FastAPI, service: Service, uploads: Uploads) -> None:
    @app.post("/v1/images/generations", tags=["images"], response_model=schemas.Images, responses=_STREAMED)
    async def generate_images(body: schemas.Generation, request: Request) -> Any:
        """Generate images of a class.

        With `stream`, server-sent events: `image_generation.partial_image` and `image_generation.completed`, which also
        have `image_index`, `num_tokens` and `tokens`.
        """
        return await _respond(request, service.generate(body), body.stream)

    of_form: dict[str, Any] = {"tags": ["images"], "response_model": schemas.Images, "responses": _STREAMED}

    async def vary(request: Request, body: schemas.Variation) -> Any:
        if (body.image is None) == (body.tokens is None):
            raise refusals.ApiError(400, "give either image or tokens", "image", "invalid_value")

        async def start() -> Answer:
            return await service.vary(body, None if body.image is None else await uploads.open(body.image))

        answer = await unless_gone(request, start())
        return answer if isinstance(answer, Response) else await _respond(request, answer, body.stream)

    @app.post(
        "/v1/images/variations",
        dependencies=[takes_form(schemas.Variation, "the field image, a file, or tokens")],
        **of_form,
    )
    async def vary_image(body: Annotated[schemas.Variation, Form(media_type=FORM)], request: Request) -> Any:
        """Vary an image: its first tokens stay, and the model writes the others.

        With `stream`, the events are `image_variation.partial_image` (first of the kept tokens) and `….completed`.
        """
        return await vary(request, body)

    @app.post(
        "/v1/images/edits",
        dependencies=[takes_form(schemas.Edit, "the fields prompt and image, a file, or tokens in its place")],
        **of_form,
    )
    async def edit_image(body: Annotated[schemas.Edit, Form(media_type=FORM)], request: Request) -> Any:
        """Vary an image as a class, with the events `image_edit.partial_image` and `image_edit.completed`."""
        return await vary(request, body)


def _add_tokens(app: FastAPI, service: Service, uploads: Uploads) -> None:
    @app.post(
        "/v1/tokens/encode",
        tags=["tokens"],
        response_model=schemas.Encoded,
        responses=_RESPONSES,
        dependencies=[takes_form(schemas.Upload, "the field image, a file")],
    )
    async def encode_image(body: Annotated[schemas.Upload, Form(media_type=FORM)], request: Request) -> Any:
        """Encode an image as tokens."""
        service.check_model(body.model)

        async def encode() -> schemas.Encoded:
            return await service.encode(await uploads.open(body.image), body.num_tokens, body.whole, body.search)

        return await unless_gone(request, encode())

    @app.post("/v1/tokens/decode", tags=["tokens"], response_model=schemas.Images, responses=_RESPONSES)
    async def decode_tokens(body: schemas.Tokens, request: Request) -> Any:
        """Decode an image's first tokens, at one or several stages."""
        return await unless_gone(request, service.decode(body))


def _add_operations(app: FastAPI, service: Service) -> None:
    batcher = service.batcher
    health: dict[int | str, dict[str, Any]] = {503: {"model": schemas.Health}}

    @app.get("/healthz", tags=["operations"], response_model=schemas.Health, responses=health)
    async def is_alive() -> Any:
        """Say whether the server works; if not, restart it."""
        return _health("ok" if batcher.alive else "failed")

    @app.get("/readyz", tags=["operations"], response_model=schemas.Health, responses=health)
    async def is_ready() -> Any:
        """Say whether the server takes requests; it does not while it stops."""
        return _health("ok" if batcher.accepts else "stopping" if batcher.alive else "failed")

    @app.get("/metrics", tags=["operations"], response_class=Response, responses=_only(401))
    async def get_metrics() -> Response:
        """Return counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        has_classes = service.pipeline.gpt.config.num_classes > 0
        wants_key = service.config.api_key is not None
        page = reference_page(app.openapi(), service.config.model_name, has_classes, wants_key)
        return HTMLResponse(page, headers=policy)


def _health(status: str) -> JSONResponse:
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _RESPONSES[status] for status in statuses}


async def _respond(request: Request, answer: Answer, stream: bool | None) -> Any:
    if not stream:
        return await unless_gone(request, answer.whole())
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(answer.events(), media_type="text/event-stream", headers=headers)
