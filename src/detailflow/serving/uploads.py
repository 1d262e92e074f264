"""Uploaded images: raster formats only, decoded off the event loop, bounded in bytes and pixels."""

import asyncio
import logging
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, BinaryIO

from fastapi import Depends, Request, UploadFile
from PIL import Image
from pydantic import BaseModel

from detailflow.data.decode import image_size, load_rgb
from detailflow.errors import DetailFlowError
from detailflow.serving.config import ServeConfig
from detailflow.serving.errors import ApiError
from detailflow.serving.strict import refuse_twice

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # malformed forms are answered, and fill no log
NAME = "the upload"  # in messages
AT_ONCE = 2  # images that are decoded, each of which may take eight bytes a pixel

FORM = "multipart/form-data"


def takes_form(form: type[BaseModel], fields: str, several: str | None = None) -> Any:
    """Return the dependency of a route that takes a form: it refuses other kinds of body, and says `fields` then.

    Each field of the form may be there once, but for `several`. Unknown fields are refused when the form is read.
    """
    once = form.model_fields.keys() - {several}

    async def check(request: Request) -> None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in ("", FORM, "application/x-www-form-urlencoded"):
            message = f"the body must be a form ({FORM}) with {fields}, as curl -F image=@photo.png sends it"
            raise ApiError(400, message, "image", "invalid_form")
        refuse_twice(name for name, _ in (await request.form()).multi_items() if name in once)

    return Depends(check)


class Uploads:
    """Opens what clients send."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self._room = asyncio.Semaphore(AT_ONCE)

    async def open(self, upload: UploadFile) -> Image.Image:
        """Return an uploaded image as RGB.

        Raises:
            ApiError: if it is too large or not an image.
        """
        if upload.size is not None and upload.size > self.config.max_upload:
            raise ApiError(413, f"{NAME} is too large: {self.config.max_upload:,} bytes are the most", "image")
        await self._room.acquire()
        try:
            return await asyncio.wrap_future(self._start(upload.file, asyncio.get_running_loop()))
        except DetailFlowError as error:
            raise ApiError(400, str(error), "image", "invalid_image") from error

    def _start(self, file: BinaryIO, loop: asyncio.AbstractEventLoop) -> Future[Image.Image]:
        """Decode an image in a thread of its own, which no other answer waits for, nor the end of the process."""
        result: Future[Image.Image] = Future()
        result.set_running_or_notify_cancel()  # a client that leaves does not stop it
        thread = threading.Thread(target=self._work, args=(file, loop, result), name="upload", daemon=True)
        try:
            thread.start()
        except Exception:  # there are as many threads as there may be
            self._room.release()
            raise
        return result

    def _work(self, file: BinaryIO, loop: asyncio.AbstractEventLoop, result: Future[Image.Image]) -> None:
        try:
            result.set_result(self._decode(file.read()))
        except Exception as error:
            result.set_exception(error)
            del result  # a failure's traceback holds this frame
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(self._room.release)

    def _decode(self, content: bytes) -> Image.Image:
        width, height = image_size(content, NAME)
        if width * height > self.config.max_pixels:
            raise DetailFlowError(
                f"{NAME} is too large: it has {width}×{height} pixels, and {self.config.max_pixels:,} are the most"
            )
        return load_rgb(content, NAME)
