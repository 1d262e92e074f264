"""The settings of the service."""

from dataclasses import dataclass
from typing import Annotated

from detailflow.errors import DetailFlowError
from detailflow.settings import BatchSize, Must, NotNegative, PositiveInt, Settings

Window = Annotated[float, Must("0 or more", lambda value: value >= 0), Must("at most 10,000 ms", lambda ms: ms <= 1e4)]
Timeout = Annotated[
    float,
    Must("above 0 seconds", lambda seconds: seconds > 0),
    Must("a finite number of seconds", lambda seconds: seconds < float("inf")),
]


def check_queue(most: int, asked: int, queue: str = "max_queue", images: str = "max_images") -> None:
    """Raise a `DetailFlowError`, which calls the two limits `queue` and `images`, if one request may ask for too many.

    Args:
        most: images that may wait.
        asked: images of one request.
    """
    if asked > most:
        raise DetailFlowError(
            f"{queue} must be at least {images}, or a request of {asked} images would never be accepted; it is {most}"
        )


@dataclass(frozen=True)
class ServeConfig(Settings):
    """What the service allows and how it batches.

    Args:
        model_name: what requests and answers call the model; never a path.
        api_key: what clients must send as a bearer token; `None` asks for none.
        max_batch: images that are computed at once.
        batch_window: milliseconds to wait for a fuller batch while several clients ask.
        max_queue: images that may wait; more are refused with status 429.
        max_images: images of one request.
        max_upload: bytes of an uploaded image.
        max_pixels: pixels of an uploaded image.
        timeout: seconds from a request's first byte to the last one of its answer.
        cross_site: whether pages of other sites may ask a server without a key for work, in a browser of this machine.
        grace: seconds that a stopping server gives to what already runs.
    """

    model_name: str = "detailflow"
    api_key: str | None = None
    max_batch: BatchSize = 16
    batch_window: Window = 10.0
    max_queue: PositiveInt = 256
    max_images: PositiveInt = 16
    max_upload: PositiveInt = 10 * 2**20
    max_pixels: PositiveInt = 25_000_000
    timeout: Timeout = 120.0
    cross_site: bool = False
    grace: NotNegative = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_queue(self.max_queue, self.max_images)
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key and key == key.strip()):
            raise DetailFlowError(
                "the API key must be printable ASCII characters, at least one, without a space at either end"
            )
