"""From a request to what the model shall compute, and from that to an answer. Knows no HTTP."""

import asyncio
import base64
import io
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from pydantic import ValidationError

from detailflow.errors import DetailFlowError
from detailflow.pipeline import DetailFlowPipeline, fit
from detailflow.sampling import SamplingConfig, SamplingOptions
from detailflow.schedule import TokenSchedule
from detailflow.serving import runner, schemas
from detailflow.serving.batcher import Batcher, Job
from detailflow.serving.counters import Metrics
from detailflow.serving.options import ServeConfig
from detailflow.serving.refusals import ApiError, api_error, shortened

T = TypeVar("T")
SAMPLING = tuple(SamplingOptions.__annotations__)
MOST_STAGES = 1024  # images of one `decode`


class _Checked(NamedTuple):
    """What a request for images asks for."""

    class_id: int
    num_tokens: int
    sampling: SamplingConfig


class Service:
    """One model, its queue and its counters."""

    def __init__(self, pipeline: DetailFlowPipeline, config: ServeConfig) -> None:
        self.pipeline, self.config, self.metrics = pipeline, config, Metrics()
        self.batcher = Batcher(
            partial(runner.run, pipeline), config.max_batch, config.batch_window / 1000, config.max_queue, self.metrics
        )
        self.fingerprint, self.gpt_fingerprint = pipeline.tokenizer.fingerprint(), pipeline.gpt.fingerprint()
        self.created = int(time.time())

    @property
    def schedule(self) -> TokenSchedule:
        """The model's token schedule."""
        return self.pipeline.tokenizer.schedule

    @property
    def size(self) -> str:
        """The size of a full image."""
        return f"{self.schedule.image_size}x{self.schedule.image_size}"

    def describe(self) -> schemas.Model:
        """Return what clients may know about the model."""
        config, schedule = self.config, self.schedule
        return schemas.Model(
            id=config.model_name,
            created=self.created,
            num_classes=self.pipeline.gpt.config.num_classes,
            image_size=schedule.image_size,
            stages=[schemas.Stage(num_tokens=n, size=schedule.decode_size(n)) for n in schedule.valid_counts],
            codebook_size=self.pipeline.tokenizer.config.codebook_size,
            fingerprint=self.fingerprint,
            gpt_fingerprint=self.gpt_fingerprint,
            sampling={name: getattr(self.pipeline.gpt.config, name) for name in SAMPLING},
            limits={
                "n": config.max_images,
                "upload_bytes": config.max_upload,
                "upload_pixels": config.max_pixels,
                "timeout": config.timeout,
            },
        )

    def classes(self, search: str | None, limit: int) -> schemas.Classes:
        """Return the classes, or those with `search` in a name."""
        labels = self.pipeline.labels
        try:
            found = list(range(labels.count)) if not search else labels.search(search)
        except DetailFlowError:
            found = []
        data = [
            schemas.ImageClass(
                id=i,
                name=labels.name(i),
                names=labels.names[i] if labels.names else labels.name(i),
                wordnet_id=(labels.wnids[i] or None) if labels.wnids else None,
            )
            for i in found[:limit]
        ]
        return schemas.Classes(total=len(found), data=data)

    def check_model(self, name: str | None) -> None:
        """Raise an `ApiError` for the name of another model."""
        if name is not None and name != self.config.model_name:
            message = f"there is no model {shortened(repr(name))} here: this server has {self.config.model_name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def submit(self, key: Any, items: list[Any]) -> Job:
        """Queue work that has to be finished in the server's time limit."""
        return self.batcher.submit(key, items, self.config.timeout)

    # --- images of classes -------------------------------------------------------------------------------------

    def generate(self, body: schemas.Generation) -> "Answer":
        """Check a request and queue its images.

        Raises:
            ApiError: if something in it is wrong.
        """
        return self._answer(body, self._check(body), "image_generation", [])

    async def vary(self, body: schemas.Variation, image: Image.Image | None) -> "Answer":
        """Queue variations of an uploaded image, or of tokens.

        Raises:
            ApiError: if something in the request is wrong.
        """
        checked = self._check(body)
        with blamed_on(keep=body.keep):
            keep = self.schedule.check_count(self.schedule.quarter if body.keep is None else body.keep, "keep")
        if image is not None:
            tokens = (await self.encode(image)).tokens
        else:
            try:
                tokens = self.checked_tokens(schemas.CODES.validate_json(body.tokens or ""))
            except ValidationError as error:
                message = "tokens must be a JSON list of whole numbers, such as [1, 2, 3]"
                raise ApiError(400, message, "tokens", "invalid_value") from error
        if keep > len(tokens):
            message = f"keep must be at most the {len(tokens)} tokens given, not {keep}"
            if body.keep is None:
                message += ", a quarter of an image's, which stay if it is left out"
            raise ApiError(400, message, "keep", "invalid_value")
        if keep > checked.num_tokens:
            message = f"num_tokens must be at least keep, which is {keep}, not {checked.num_tokens}"
            raise ApiError(400, message, "num_tokens", "invalid_value")
        kind = "image_edit" if isinstance(body, schemas.Edit) else "image_variation"
        return self._answer(body, checked, kind, tokens[:keep])

    def _check(self, body: schemas.Request) -> "_Checked":
        self.check_model(body.model)
        if not 1 <= (body.n or 1) <= self.config.max_images:
            raise ApiError(
                400, f"n must be 1 to {self.config.max_images}, not {shortened(body.n)}", "n", "invalid_value"
            )
        if body.size not in (None, "auto", self.size):
            raise ApiError(
                400, f"size must be auto or {self.size}, not {shortened(repr(body.size))}", "size", "invalid_value"
            )
        with blamed_on("unknown_class", prompt=body.prompt):
            class_id = self._class_id(body)
        with blamed_on(num_tokens=body.num_tokens):
            num_tokens = self.schedule.check_count(body.num_tokens)
        given = {name: getattr(body, name) for name in SAMPLING}
        with blamed_on(**given):
            sampling = self.pipeline.gpt.sampling(**given)
        return _Checked(class_id, num_tokens, sampling)

    def _class_id(self, body: schemas.Request) -> int:
        labels = self.pipeline.labels
        if body.prompt is None and labels.count and isinstance(body, schemas.Generation):
            raise DetailFlowError("prompt must be one of this model's classes: `/v1/classes` lists them")
        if body.prompt is None or (body.prompt == "" and not labels.count):
            return labels.count  # the null class
        return labels.index(body.prompt)

    def checked_tokens(self, tokens: list[int]) -> list[int]:
        """Return tokens that may be those of an image, or the first of them."""
        codes, most = self.pipeline.tokenizer.config.codebook_size, self.schedule.num_tokens
        if len(tokens) > most:
            message = f"tokens must be at most {most}, as many as this model's images have, not {len(tokens)}"
            raise ApiError(400, message, "tokens", "invalid_value")
        if max(tokens) >= codes:
            raise ApiError(400, f"tokens must be 0 to {codes - 1}, not {max(tokens)}", "tokens", "invalid_value")
        return tokens

    def _answer(self, body: schemas.Request, checked: "_Checked", kind: str, prefix: list[int]) -> "Answer":
        class_id, n, sampling = checked
        seed = secrets.randbits(32) if body.seed is None else body.seed
        stages = self.stages(n, body.partial_images or 0, len(prefix)) if body.stream else frozenset()
        items = [runner.ImageItem(class_id, seed, i, n, stages, prefix) for i in range(body.n or 1)]
        return Answer(self, self.submit(runner.Generate(sampling, len(prefix)), items), kind, n, seed)

    def stages(self, num_tokens: int, count: int, kept: int = 0) -> frozenset[int]:
        """Return `count` numbers of tokens below `num_tokens` for partial images: early first, then evenly in time.

        The first is that of the tokens that are kept, or else two.
        """
        steps = [n for n in self.schedule.valid_counts if kept <= n < num_tokens]
        if count >= len(steps):
            return frozenset(steps)
        first = 0 if kept else 1
        return frozenset(steps[first + i * (len(steps) - first) // count] for i in range(count))

    # --- tokens ------------------------------------------------------------------------------------------------

    async def encode(
        self, image: Image.Image, num_tokens: int | None = None, whole: bool = False, search: int = 0
    ) -> schemas.Encoded:
        """Return an image's tokens."""
        with blamed_on(num_tokens=num_tokens):
            n = self.schedule.check_count(num_tokens)
            if search:
                self.schedule.check_all(n, "a search")
        fitted = np.asarray(await asyncio.to_thread(fit, self.schedule, image, whole))
        height, width = fitted.shape[:2]
        with self.submit(runner.Encode(height, width, search), [fitted]) as job:
            async for result in job:
                tokens = result.value[:n]
        return schemas.Encoded(
            model=self.config.model_name, fingerprint=self.fingerprint, tokens=tokens, height=height, width=width
        )

    async def decode(self, body: schemas.Tokens) -> schemas.Images:
        """Return the images that an image's first tokens show."""
        data = await self.decoded(body, image_data)
        return self.images(data, data[-1].size, len(body.tokens))

    async def decoded(self, body: schemas.Tokens, show: Callable[[runner.Picture], T]) -> list[T]:
        """Return what `show`, in a thread, makes of each image that an image's first tokens show."""
        self.check_model(body.model)
        self.checked_tokens(body.tokens)
        if body.num_tokens is None:
            with blamed_on(tokens=body.tokens):
                self.schedule.check_count(len(body.tokens), "the number of tokens")
        wanted = len(body.tokens) if body.num_tokens is None else body.num_tokens
        counts = wanted if isinstance(wanted, list) else [wanted]
        if not 1 <= len(counts) <= MOST_STAGES:
            raise ApiError(400, f"num_tokens must be 1 to {MOST_STAGES} numbers, not {len(counts)}", "num_tokens")
        for n in counts:
            with blamed_on(num_tokens=n):
                if self.schedule.check_count(n) > len(body.tokens):
                    raise DetailFlowError(f"num_tokens must be at most the {len(body.tokens)} tokens given, not {n}")
        height, width = self._full_size(body)
        by_count = {}
        with self.submit(runner.Decode(height, width), [runner.StagesItem(body.tokens, frozenset(counts))]) as job:
            async for _, picture, _ in job:
                by_count[len(picture.tokens)] = await asyncio.to_thread(show, picture)
        return [by_count[n] for n in counts]

    def _full_size(self, body: schemas.Tokens) -> tuple[int, int]:
        side = self.schedule.image_size
        if (body.height is None) != (body.width is None):
            missing = "width" if body.width is None else "height"
            message = f"{missing} is missing: give both height and width, as `encode` gives them, or neither"
            raise ApiError(400, message, missing, "invalid_value")
        height, width = (side if given is None else given for given in (body.height, body.width))
        if not self.schedule.is_full_shape(height, width):
            message = f"height and width must be as `encode` gives them, not {shortened(height)} and {shortened(width)}"
            raise ApiError(400, message, "height", "invalid_value")
        return height, width

    # --- answers -----------------------------------------------------------------------------------------------

    def images(self, data: list[schemas.ImageData], size: str, tokens: int, seed: int | None = None) -> schemas.Images:
        """Return the answer with these images."""
        return schemas.Images(
            created=int(time.time()), data=data, size=size, usage=usage(tokens), model=self.config.model_name, seed=seed
        )


class Answer:
    """The images of one request, as one answer or as server-sent events."""

    def __init__(self, service: Service, job: Job, kind: str, num_tokens: int, seed: int) -> None:
        self.service, self.job, self.kind, self.num_tokens, self.seed = service, job, kind, num_tokens, seed

    async def whole(self) -> schemas.Images:
        """Return all images in one answer."""
        data: dict[int, schemas.ImageData] = {}
        with self.job:
            async for result in self.job:
                data[result.image] = await asyncio.to_thread(image_data, result.value)
        ordered = [data[i] for i in sorted(data)]
        return self.service.images(ordered, ordered[0].size, self.num_tokens * len(ordered), self.seed)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield server-sent events: partial images, and each image when it is complete."""
        partial_images = [0] * len(self.job.items)
        with self.job:
            try:
                async for index, picture, final in self.job:
                    shown = await asyncio.to_thread(image_data, picture)
                    event = {
                        "type": f"{self.kind}.{'completed' if final else 'partial_image'}",
                        **shown.model_dump(),
                        "created_at": int(time.time()),
                        "background": "opaque",
                        "output_format": "png",
                        "quality": "auto",
                        "image_index": index,
                        "num_tokens": len(picture.tokens),
                        "model": self.service.config.model_name,
                        "seed": self.seed,
                    }
                    if final:
                        event["usage"] = usage(self.num_tokens).model_dump()
                    else:
                        event["partial_image_index"] = partial_images[index]
                        partial_images[index] += 1
                    yield _event(event["type"], event)
            except Exception as error:  # the status has been sent
                yield _event("error", api_error(error).content)


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def image_data(picture: runner.Picture) -> schemas.ImageData:
    """Return an image as answers have it."""
    height, width = picture.pixels.shape[:2]
    content = base64_png(Image.fromarray(picture.pixels))
    return schemas.ImageData(b64_json=content, tokens=picture.tokens, size=f"{width}x{height}")


def base64_png(image: Image.Image) -> str:
    """Return a PNG file of an image as base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def usage(tokens: int) -> schemas.Usage:
    """Return the tokens of an answer; a class is one token of input."""
    details = {"text_tokens": 1, "image_tokens": 0}
    return schemas.Usage(input_tokens=1, output_tokens=tokens, total_tokens=tokens + 1, input_tokens_details=details)


@contextmanager
def blamed_on(code: str = "invalid_value", /, **params: Any) -> Iterator[None]:
    """Say which parameter a `DetailFlowError` is about: the one that its message names, or else the first.

    The values of the parameters are shortened in the message.
    """
    try:
        yield
    except DetailFlowError as error:
        message = str(error)
        named = [name for name in params if message.startswith(name)]
        for text in map(repr, params.values()):
            message = message.replace(text, shortened(text))
        raise ApiError(400, message, (named or [*params])[0], code) from error
