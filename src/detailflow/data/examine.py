"""All that can be found out about a set of images by reading every one of them: for `detailflow data`."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from detailflow.data.decode import image_size, load_rgb
from detailflow.data.source import ImageSource, tolerated
from detailflow.errors import DetailFlowError

_READERS = 4  # threads; Pillow lets them run at once
_AHEAD = 64  # images that are read before they are asked for


@dataclass(frozen=True)
class Examined:
    """What reading every image of a set has shown.

    Attributes:
        sizes: (width, height) → images.
        unreadable: name → what is wrong with it.
        duplicates: the names of images whose files are the same, a group each.
    """

    total: int
    sizes: Counter[tuple[int, int]]
    unreadable: dict[str, str]
    duplicates: list[list[str]]

    @property
    def usable(self) -> bool:
        """Whether so few are unreadable that training, extraction and evaluation go on without them."""
        return len(self.unreadable) <= tolerated(self.total) and len(self.unreadable) < self.total


class _Image(NamedTuple):
    name: str
    content: bytes  # a checksum of what is stored
    size: tuple[int, int]
    problem: str


def examine(source: ImageSource) -> Examined:
    """Read every image, with a progress bar if that takes more than two seconds."""
    from tqdm import tqdm

    sizes: Counter[tuple[int, int]] = Counter()
    unreadable: dict[str, str] = {}
    names: dict[bytes, list[str]] = {}
    with tqdm(
        _images(source), desc="reading", total=len(source), delay=2, leave=False, unit="img", dynamic_ncols=True
    ) as bar:
        for image in bar:
            if image.problem:
                unreadable[image.name] = image.problem
            else:
                sizes[image.size] += 1
                names.setdefault(image.content, []).append(image.name)
    return Examined(len(source), sizes, unreadable, [group for group in names.values() if len(group) > 1])


def _images(source: ImageSource) -> Iterator[_Image]:
    with ThreadPoolExecutor(_READERS) as pool:
        ahead = [pool.submit(_read, source, index) for index in range(min(_AHEAD, len(source)))]
        for index in range(len(source)):
            yield ahead[index % _AHEAD].result()
            if index + _AHEAD < len(source):
                ahead[index % _AHEAD] = pool.submit(_read, source, index + _AHEAD)


def _read(source: ImageSource, index: int) -> _Image:
    name = source.name(index)
    try:
        content = source.stored_bytes(index)
        load_rgb(content, name, least=1)  # a JPEG as small as can be: all of it is read, which shows damage
        return _Image(name, hashlib.sha256(content).digest(), image_size(content, name), "")
    except DetailFlowError as error:
        return _Image(name, b"", (0, 0), str(error))
