"""The settings of the service."""

from dataclasses import dataclass

from detailflow.errors import DetailFlowError
from detailflow.schedule import require_not_negative, require_positive

LONGEST_WINDOW = 10_000  # ms


@dataclass(frozen=True)
class ServeConfig:
    """What the service allows and how it batches.

    Args:
        model_name: what requests and answers call the model; never a path.
        api_key: what clients must send as a bearer token; `None` asks for none.
        max_batch: images that are computed at once.
        batch_window: milliseconds to wait for a fuller batch while several clients ask; a single client never waits.
        max_queue: images that may wait; more are refused with status 429.
        max_images: images of one request.
        max_upload: bytes of an uploaded image.
        max_pixels: pixels of an uploaded image.
        timeout: seconds from a request's first byte to the last one of its answer.
        grace: seconds that a stopping server gives to what already runs.
    """

    model_name: str = "detailflow"
    api_key: str | None = None
    max_batch: int = 16
    batch_window: float = 10.0
    max_queue: int = 256
    max_images: int = 16
    max_upload: int = 10 * 2**20
    max_pixels: int = 25_000_000
    timeout: float = 120.0
    grace: float = 10.0

    def __post_init__(self) -> None:
        require_positive(
            max_batch=self.max_batch,
            max_queue=self.max_queue,
            max_images=self.max_images,
            max_upload=self.max_upload,
            max_pixels=self.max_pixels,
        )
        require_not_negative(batch_window=self.batch_window, grace=self.grace)
        if self.batch_window > LONGEST_WINDOW:
            raise DetailFlowError(f"batch_window must be at most {LONGEST_WINDOW} ms, not {self.batch_window:g}")
        if not 0 < self.timeout < float("inf"):
            raise DetailFlowError(f"timeout must be above 0 seconds, not {self.timeout:g}")
        if self.max_images > self.max_queue:
            raise DetailFlowError(
                f"max_queue must be at least max_images, or a request of {self.max_images} images would never be "
                f"accepted; it is {self.max_queue}"
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise DetailFlowError("the API key must be printable ASCII characters, at least one")
