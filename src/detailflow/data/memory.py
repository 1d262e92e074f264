"""Decoded images that stay in memory, so that a small set is decoded once and not in every epoch."""

import numpy as np
from PIL import Image

from detailflow.data.source import ImageSource
from detailflow.data.transforms import center_crop, zooms

BYTES_PER_PIXEL = 4  # of an image in Pillow's memory


class KeptImages:
    """Images of a set as they were decoded, or whole crops; those that were used once, up to some bytes.

    If crops of square images are the images themselves (no zoom), a batch of them is one look-up.

    Attributes:
        room: bytes that are left.
    """

    def __init__(self, source: ImageSource, size: int, max_scale: float, room: float) -> None:
        self.source, self.size, self.max_scale, self.room = source, size, max_scale, room
        needed = len(source) * size * size * 3
        self._images: dict[int, Image.Image] = {}
        self._is_whole = np.zeros(len(source), bool)
        self._whole: np.ndarray | None = None
        if room >= needed and not zooms(size, max_scale):
            self._whole = np.empty((len(source), size, size, 3), np.uint8)  # takes memory as it is filled
            self.room -= needed

    def fill(self, crops: np.ndarray, items: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """Put the whole crops that are known into (B, size, size, 3) bytes; return the rows of the others."""
        if self._whole is None:
            return np.arange(len(items))
        known = self._is_whole[items]
        crops[known] = self._whole[items[known]]
        crops[known & flipped] = crops[known & flipped][:, :, ::-1]
        return np.flatnonzero(~known)

    def image(self, item: int, least: int) -> Image.Image:
        """Return an image; it is read if it is not known yet, and kept if there is room."""
        if item in self._images:
            return self._images[item]
        image = self.source.image(item, least)
        if self._whole is not None and image.width == image.height:
            self._whole[item] = center_crop(image, self.size)
            self._is_whole[item] = True  # last, as another thread may look
        elif self.room >= (needed := image.width * image.height * BYTES_PER_PIXEL):
            self.room -= needed
            self._images[item] = image
        return image


def kept_images(source: ImageSource, size: int, max_scale: float, room: float) -> KeptImages:
    """Return the kept images of a set, the same for all that train on it with crops of one kind."""
    if not room:
        return KeptImages(source, size, max_scale, 0)
    kept = source.kept
    if not isinstance(kept, KeptImages) or (kept.size, kept.max_scale) != (size, max_scale):
        kept = source.kept = KeptImages(source, size, max_scale, room)
    return kept
