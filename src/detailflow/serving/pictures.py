"""What people look at: their own image stage by stage, and how an image takes shape as an animation."""

import asyncio
import base64
import io
import math
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, File, Form, UploadFile
from fastapi.responses import Response
from PIL import Image
from pydantic import Field

from detailflow.pipeline import fit, stage_counts
from detailflow.psnr import psnr
from detailflow.serving import schemas
from detailflow.serving.errors import ApiError
from detailflow.serving.service import Service
from detailflow.serving.uploads import Uploads

MOST_PIXELS = 16_000_000  # of all frames of an animation
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
    size: int | None = Field(None, ge=1, le=2048, description="Side in pixels; at least 256 if left out.")
    milliseconds: int = Field(120, ge=20, le=5000, description="For a frame; the last one stays longer.")
    model: str | None = None


def add_pictures(app: FastAPI, service: Service, uploads: Uploads, responses: dict[int | str, dict[str, Any]]) -> None:
    """Add the routes."""

    @app.post("/v1/tokens/reconstruct", tags=["tokens"], response_model=Reconstruction, responses=responses)
    async def reconstruct_image(
        image: Annotated[UploadFile, File(description="A raster image; its centre square is taken.")],
        num_tokens: Annotated[
            list[int] | None, Form(description="Once for each stage; 1, 2, 4, … and all if left out.")
        ] = None,
        model: Annotated[str | None, Form()] = None,
    ) -> Any:
        """Show an image from its first tokens, with PSNR, as `detailflow reconstruct` does."""
        service.check_model(model)
        return await _reconstruct(service, await uploads.open(image), num_tokens)

    files: dict[str, Any] = {kind: {} for kind in ("image/gif", "image/webp")}
    success: dict[int | str, dict[str, Any]] = {200: {"content": files, "description": "The animation."}}

    @app.post("/v1/tokens/animate", tags=["tokens"], response_class=Response, responses=responses | success)
    async def animate_tokens(body: Animation) -> Response:
        """Return an animation of an image that takes shape, a frame for each stage of its tokens."""
        content = await _animate(service, body)
        return Response(content, media_type=f"image/{body.format}")


async def _reconstruct(service: Service, image: Image.Image, counts: list[int] | None) -> Reconstruction:
    original = await asyncio.to_thread(fit, service.schedule, image)
    encoded = await service.encode(original, None, whole=False)
    counts = counts or stage_counts(service.schedule)
    decoded = await service.decode(schemas.Tokens(tokens=encoded.tokens, num_tokens=counts, height=None, width=None))
    data = await asyncio.to_thread(_compare, decoded.data, original)
    return Reconstruction(**encoded.model_dump(), original=_png(original), data=data)


def _compare(stages: list[schemas.ImageData], original: Image.Image) -> list[Seen]:
    pixels = np.asarray(original)
    shown = [_opened(stage).resize(original.size, Image.Resampling.BICUBIC) for stage in stages]
    distances = [psnr(np.asarray(image), pixels).item() for image in shown]
    return [
        Seen(**stage.model_dump(), psnr=value if math.isfinite(value) else None)
        for stage, value in zip(stages, distances, strict=True)
    ]


async def _animate(service: Service, body: Animation) -> bytes:
    side = service.schedule.image_size
    size = body.size or side * math.ceil(SMALLEST_SIDE / side)
    counts = [n for n in service.schedule.valid_counts if n <= len(body.tokens)]
    if size**2 * len(counts) > MOST_PIXELS:
        most = math.isqrt(MOST_PIXELS // len(counts))
        raise ApiError(400, f"size must be at most {most} for {len(counts)} frames, not {size}", "size")
    decoded = await service.decode(
        schemas.Tokens(tokens=body.tokens, num_tokens=counts, height=None, width=None, model=body.model)
    )
    return await asyncio.to_thread(_animation, decoded.data, size, body)


def _animation(stages: list[schemas.ImageData], size: int, body: Animation) -> bytes:
    frames = [_enlarged(_opened(stage), size) for stage in stages]
    duration = [body.milliseconds] * (len(frames) - 1) + [LAST_FRAME * body.milliseconds]
    options: dict[str, Any] = {"lossless": True} if body.format == "webp" else {"optimize": False}
    file = io.BytesIO()
    frames[0].save(file, body.format, save_all=True, append_images=frames[1:], duration=duration, loop=0, **options)
    return file.getvalue()


def _enlarged(image: Image.Image, size: int) -> Image.Image:
    """Return an image with crisp pixels if it is small, or else smooth ones."""
    few = 2 * image.width <= size
    return image.resize((size, size), Image.Resampling.NEAREST if few else Image.Resampling.BICUBIC)


def _opened(data: schemas.ImageData) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.b64_json)))


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()
