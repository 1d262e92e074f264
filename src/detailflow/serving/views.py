"""What people look at: their own image stage by stage, and how an image takes shape as an animation."""

import asyncio
import io
import math
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Form, Request
from fastapi.responses import Response
from PIL import Image
from pydantic import Field

from detailflow.pipeline import enlarged, fit
from detailflow.serving import schemas
from detailflow.serving.leaving import unless_gone
from detailflow.serving.refusals import ApiError
from detailflow.serving.runner import Picture
from detailflow.serving.service import Service, base64_png, blamed_on, image_data
from detailflow.serving.threads import Threads
from detailflow.serving.uploads import FORM, Uploads, takes_form

MOST_PIXELS = 16_000_000  # of all frames of an animation
AT_ONCE = 2  # animations that are made, each of up to `MOST_PIXELS`
LAST_FRAME = 4  # times as long as the others
SMALLEST_SIDE = 256  # pixels of an animation, if its size is left out


class Seen(schemas.ImageData):
    """What the first tokens show of an image."""

    psnr: float | None = Field(description="In dB, enlarged to the full size; null if it equals the original.")


class Reconstruction(schemas.Encoded):
    """An image's tokens, what they show, and the image itself as it was encoded."""

    original: str = Field(description="A PNG image, as base64.")
    data: list[Seen]


class Animation(schemas.Body):
    """`POST /v1/tokens/animate`."""

    tokens: list[schemas.Code] = Field(min_length=1, max_length=100_000, description="The codes of one image.")
    format: Literal["gif", "webp"] = Field("gif", description="`webp` has all colours, `gif` opens everywhere.")
    size: int | None = Field(
        None, ge=1, le=2048, description="Side in pixels; if left out at least 256, less only if the frames are many."
    )
    milliseconds: int = Field(120, ge=20, le=5000, description="For a frame; the last one stays longer.")
    model: str | None = None


def add_pictures(app: FastAPI, service: Service, uploads: Uploads, responses: dict[int | str, dict[str, Any]]) -> None:
    """Add the routes."""

    @app.post(
        "/v1/tokens/reconstruct",
        tags=["tokens"],
        response_model=Reconstruction,
        responses=responses,
        dependencies=[takes_form(schemas.Look, "the field image, a file", several="num_tokens")],
    )
    async def reconstruct_image(body: Annotated[schemas.Look, Form(media_type=FORM)], request: Request) -> Any:
        """Show an image from its first tokens, with PSNR, as `detailflow reconstruct` does."""
        service.check_model(body.model)

        async def reconstruct() -> Reconstruction:
            return await _reconstruct(service, await uploads.open(body.image), body)

        return await unless_gone(request, reconstruct())

    threads = Threads("animation", AT_ONCE)
    files: dict[str, Any] = {kind: {} for kind in ("image/gif", "image/webp")}
    success: dict[int | str, dict[str, Any]] = {200: {"content": files, "description": "The animation."}}

    @app.post("/v1/tokens/animate", tags=["tokens"], response_class=Response, responses=responses | success)
    async def animate_tokens(body: Animation, request: Request) -> Response:
        """Return an animation of an image that takes shape, a frame for each stage of its tokens."""
        return await unless_gone(request, _animate(service, threads, body))


async def _reconstruct(service: Service, image: Image.Image, body: schemas.Look) -> Reconstruction:
    original = await asyncio.to_thread(fit, service.schedule, image)
    encoded = await service.encode(original, search=body.search)
    counts = body.num_tokens or service.schedule.stages()
    tokens = schemas.Tokens(tokens=encoded.tokens, num_tokens=counts, height=None, width=None)
    data = await service.decoded(tokens, partial(_seen, original=original))
    return Reconstruction(**encoded.model_dump(), original=base64_png(original), data=data)


def _seen(picture: Picture, original: Image.Image) -> Seen:
    _, psnr = enlarged(Image.fromarray(picture.pixels), original)
    return Seen(**image_data(picture).model_dump(), psnr=psnr if math.isfinite(psnr) else None)


async def _animate(service: Service, threads: Threads, body: Animation) -> Response:
    side = service.schedule.image_size
    with blamed_on(tokens=body.tokens):
        last = service.schedule.check_count(len(service.checked_tokens(body.tokens)), "the number of tokens")
    counts = [n for n in service.schedule.valid_counts if n <= last]
    most = math.isqrt(MOST_PIXELS // len(counts))
    size = body.size or min(side * math.ceil(SMALLEST_SIDE / side), most)
    if size > most:
        raise ApiError(400, f"size must be at most {most} for {len(counts)} frames, not {size}", "size")
    tokens = schemas.Tokens(tokens=body.tokens, num_tokens=counts, height=None, width=None, model=body.model)
    pictures = await service.decoded(tokens, lambda picture: picture)
    content = await threads.run(partial(_animation, pictures, size, body))
    return Response(content, media_type=f"image/{body.format}")


def _animation(pictures: list[Picture], size: int, body: Animation) -> bytes:
    frames = [_frame(picture, size) for picture in pictures]
    duration = [body.milliseconds] * (len(frames) - 1) + [LAST_FRAME * body.milliseconds]
    options: dict[str, Any] = {"lossless": True} if body.format == "webp" else {"optimize": False}
    file = io.BytesIO()
    frames[0].save(file, body.format, save_all=True, append_images=frames[1:], duration=duration, loop=0, **options)
    return file.getvalue()


def _frame(picture: Picture, size: int) -> Image.Image:
    """Return an image with crisp pixels if it is small, or else smooth ones."""
    image = Image.fromarray(picture.pixels)
    few = 2 * image.width <= size
    return image.resize((size, size), Image.Resampling.NEAREST if few else Image.Resampling.BICUBIC)
