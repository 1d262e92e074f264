"""Uploaded images: raster formats only, decoded off the event loop, bounded in bytes and pixels."""

import logging
import traceback
from functools import partial
from typing import Any, BinaryIO

from fastapi import Depends, Request, UploadFile
from PIL import Image

from detailflow.data.image_files import image_size, load_rgb
from detailflow.errors import DetailFlowError
from detailflow.serving.options import ServeConfig
from detailflow.serving.refusals import ApiError
from detailflow.serving.schemas import LISTED_IMAGE, ImageForm
from detailflow.serving.strict import refuse_twice
from detailflow.serving.threads import Threads

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # malformed forms are answered, and fill no log
NAME = "the upload"  # in messages
AT_ONCE = 2  # images that are decoded: each may take eight bytes a pixel

FORM = "multipart/form-data"


def takes_form(form: type[ImageForm], fields: str, several: str | None = None) -> Any:
    """Return the dependency of a route that takes a form: it refuses other kinds of body, and says `fields` then.

    Each field of the form may be there once, but for `several`, and none but the prompt is empty, which FastAPI
    would take for one that is left out. Unknown fields are refused when the form is read.
    """
    once = form.model_fields.keys() - {several}
    filled = form.model_fields.keys() - {"prompt"}  # which clients must send, of no class too

    async def check(request: Request) -> None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in ("", FORM, "application/x-www-form-urlencoded"):
            message = f"the body must be a form ({FORM}) with {fields}, as curl -F image=@photo.png sends it"
            raise ApiError(400, message, "image", "invalid_form")
        given = (await request.form()).multi_items()
        listed = sum(name == LISTED_IMAGE for name, _ in given)
        if listed > 1:
            raise ApiError(400, f"image must be one image, not {listed}", "image", "invalid_value")
        names = ("image" if name == LISTED_IMAGE else name for name, _ in given)
        refuse_twice(name for name in names if name in once)
        for name, value in given:
            if value == "" and name in filled:
                advice = "" if form.model_fields[name].is_required() else "leave it out or "
                raise ApiError(400, f"{name} is empty: {advice}give it a value", name, "invalid_value")

    return Depends(check)


def _clear_frames(error: BaseException | None) -> None:
    """Clear the frames of an error's traceback, which would keep an image in memory as long as the error."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Uploads:
    """Opens what clients send."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self._threads = Threads("upload", AT_ONCE)

    async def open(self, upload: UploadFile) -> Image.Image:
        """Return an uploaded image as RGB.

        Raises:
            ApiError: if it is too large or not an image.
        """
        if upload.size is not None and upload.size > self.config.max_upload:
            raise ApiError(413, f"{NAME} is too large: {self.config.max_upload:,} bytes are the most", "image")
        try:
            return await self._threads.run(partial(self._decode, upload.file))
        except DetailFlowError as error:
            _clear_frames(error)
            raise ApiError(400, str(error), "image", "invalid_image") from None

    def _decode(self, file: BinaryIO) -> Image.Image:
        content = file.read()
        width, height = image_size(content, NAME)
        if width * height > self.config.max_pixels:
            raise DetailFlowError(
                f"{NAME} is too large: it has {width}×{height} pixels, and {self.config.max_pixels:,} are the most"
            )
        return load_rgb(content, NAME)
