"""Sets of images, their batches and their tokens; `open_images` opens a set."""

from detailflow.data.images import open_images

__all__ = ["open_images"]
