"""Read one image file, or its bytes, as RGB.

Pillow does all the decoding, in raster formats only: plug-ins that start programs are never asked. Reading takes at
most eight bytes of memory a pixel (sixteen for WebP and JPEG 2000), and an image may have `max_pixels()` pixels.
"""

import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from operator import methodcaller
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image, features
from PIL.TiffImagePlugin import TiffImageFile

from detailflow.errors import DetailFlowError, explained, first_line
from detailflow.words import printable

MAX_PIXELS = 178_956_970  # beyond that Pillow, too, takes a file for an attack
MAX_PIXELS_VARIABLE = "DETAILFLOW_MAX_PIXELS"  # reaches worker processes, however they are started

# Formats that only decode pixels. Not: EPS (starts Ghostscript), WMF (Windows draws it), IPTC (opens its content in any
# format), FITS (unpacks without a limit), DDS (decoded in Python, takes minutes), ICO, ICNS and BLP (icons and textures
# of images within images, which may have any size), nor what Pillow only knows by name.
_RASTER = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "MPO", "HEIF", "JXL", "CUR", "DCX",
    "DIB", "FLI", "FTEX", "GBR", "IM", "MSP", "PCD", "PCX", "PIXAR", "PSD", "QOI", "SGI", "SPIDER",
    "SUN", "TGA", "XBM", "XPM",
)  # fmt: skip
_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # formats that not every Pillow was built with

Read = TypeVar("Read")
_COST = {"WEBP": 2, "JPEG2000": 2}  # how often a pixel counts: these decoders take sixteen bytes for it

REMEDIES = {  # suffix of images that are not read → what to do about it
    **dict.fromkeys((".heic", ".heif", ".hif"), "needs pillow-heif: pip install pillow-heif"),
    ".jxl": "needs pillow-jxl-plugin: pip install pillow-jxl-plugin",
    **dict.fromkeys((".avif", ".avifs"), "needs pillow-avif-plugin: pip install pillow-avif-plugin"),
    **dict.fromkeys(
        (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"),
        "convert these to JPEG first",
    ),
    ".dds": "convert these to PNG first",
    **dict.fromkeys(
        (".svg", ".eps", ".ps", ".pdf", ".ai", ".wmf", ".emf"), "no raster image: convert these to PNG first"
    ),
}
_MODULES = (("pillow_heif", "register_heif_opener"), ("pillow_jxl", ""), ("pillow_avif", ""))

_TURNS = {  # EXIF orientation → what shows the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 256, 257, 258, 262, 284, 339  # tags of TIFF files
_PNG = b"\x89PNG\r\n\x1a\n"
_LONGEST_EXIF = 2**20  # bytes
_MOST_SCANS = 100  # of a JPEG; progressive ones have about ten, and each is work for all pixels, however few its bytes
_MOST_METADATA = 2**24  # bytes; a JPEG's scans have less than four a pixel
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # those of JPEG that a length follows, and its end
_SOS, _EOI, _SINGLE_PASS = 0xDA, 0xD9, (0xC0, 0xC1)
_STRIPE = 2**17  # pixels that are converted at once
_OPENING = threading.Lock()


@cache
def raster_formats() -> tuple[str, ...]:
    """Return the formats that are read, by Pillow's names, including those of installed plug-ins."""
    Image.init()
    for name, register in _MODULES:
        with suppress(Exception):  # not installed, or not for this Pillow: then its files are left aside
            module = import_module(name)
            if register:
                getattr(module, register)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow does not know the names of all features
        missing = {name for name, feature in _OPTIONAL.items() if not features.check(feature)}
    if "pillow_avif" in sys.modules:
        missing.discard("AVIF")
    return tuple(name for name in _RASTER if name in Image.OPEN and name not in missing)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of files that are read, in lower case."""
    formats = {*raster_formats(), "MPO"}  # which Pillow opens as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def max_pixels() -> int:
    """Return how many pixels an image may have: DETAILFLOW_MAX_PIXELS in the environment, else 178,956,970."""
    text = os.environ.get(MAX_PIXELS_VARIABLE, str(MAX_PIXELS))
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 19 and int(text)):
        raise DetailFlowError(
            f"the limit on pixels ({MAX_PIXELS_VARIABLE}) is {text!r}: it must be a positive whole number"
        )
    return int(text)


def load_rgb(source: str | os.PathLike[str] | bytes, name: str | None = None, least: int | None = None) -> Image.Image:
    """Read an image file (path) or its bytes as RGB: upright, transparency over white, 16 bits scaled to 8.

    Args:
        name: the image in messages; by default its path.
        least: a JPEG is decoded straight to 1/2, 1/4 or 1/8 of its size if its shorter side stays at least that long,
            which takes a fraction of the time.
    """
    name = printable(name or ("image" if isinstance(source, bytes) else os.fspath(source)))
    with _opened(source, name) as file:
        return _in_any_png(lambda content: _decode(content, name, least), file)


def image_size(source: str | os.PathLike[str] | bytes, name: str) -> tuple[int, int]:
    """Return the width and height of an image as it will be shown, from its header."""
    with _opened(source, name) as file:
        return _in_any_png(_size, file)


def _in_any_png(read: Callable[[BinaryIO], Read], file: BinaryIO) -> Read:
    """Return what `read` makes of a file, or, if it is a PNG that cannot be read, of what its pixels need of it."""
    try:
        return read(file)
    except DetailFlowError:
        raise
    except Exception:
        if (stripped := _strip_png(file)) is None:
            raise
        return read(stripped)


def _size(file: BinaryIO) -> tuple[int, int]:
    with _open_image(file) as image:
        if image.format == "PNG":  # else Pillow decodes all of it to see if EXIF data follow the pixels
            image.info.setdefault("exif", _png_exif(file))
        width, height = image.size
        if isinstance(image, TiffImageFile):  # not all versions of Pillow give its size as stored
            width, height = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
        return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as `load_rgb` would; `image` itself stays as it is."""
    with explained("the image cannot be read", Exception, hint="it is damaged, or was closed too early"):
        image.load()  # in which Pillow turns a TIFF upright itself
        return _upright(_to_rgb(image), _orientation(image))


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes, name: str) -> Iterator[BinaryIO]:
    """Open an image file and turn whatever decoding it runs into into a sentence."""
    with io.BytesIO(source) if isinstance(source, bytes) else _open_file(Path(source), name) as file:
        try:
            yield file
        except DetailFlowError:
            raise
        except Image.UnidentifiedImageError as error:
            if not file.seek(0, os.SEEK_END):
                raise DetailFlowError(f"{name} is empty: it has 0 bytes") from error
            raise DetailFlowError(
                f"{name} is not an image: its contents are in no raster format that is read"
            ) from error
        except Exception as error:  # damaged files raise all kinds of errors
            raise DetailFlowError(f"{name} is damaged and cannot be decoded ({first_line(error)})") from error


def _open_file(path: Path, name: str) -> BinaryIO:
    with explained(f"{name} cannot be opened"):
        if path.is_dir():
            raise DetailFlowError(f"{name} is a folder: give the path of one image file")
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise DetailFlowError(f"{name} is not a regular file: give the path of an image file")
        try:
            return open(path, "rb", buffering=2**16)
        except FileNotFoundError as error:
            raise DetailFlowError(f"{name} does not exist: give the path of an image file") from error


def _open_image(file: BinaryIO) -> Image.Image:
    """Read an image's header; the limit on its pixels is ours, as Pillow's is one number for all threads."""
    file.seek(0)
    if isinstance(file, io.BufferedReader):
        file.peek()  # so that nobody waits for the disk while holding the lock
    with _OPENING:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=raster_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _decode(file: BinaryIO, name: str, least: int | None) -> Image.Image:
    image = _open_image(file)
    _check_pixels(image, name, max_pixels())
    tags = _tags(image)
    bits = tags.get(_BITS, ())
    if tags.get(_PLANES) == 2 and bits and max(bits) > 8:  # Pillow takes their bytes for numbers, also of one band
        raise DetailFlowError(f"{name} has {max(bits)} bits in separate planes: save it with interleaved channels")
    if image.format in ("JPEG", "MPO"):
        _check_scans(file, name, *image.size)
    if least:
        image.draft(None, (least, least))
    image.load()
    orientation, rgb = _orientation(image), _to_rgb(image)
    del image  # frees its pixels before the transposed copy is made
    return _upright(rgb, orientation)


def _check_pixels(image: Image.Image, name: str, limit: int) -> None:
    pixels = image.width * image.height * _COST.get(image.format or "", 1)
    if pixels > limit:
        twice = f", which in {image.format} count twice" if image.format in _COST else ""
        raise DetailFlowError(
            f"{name} is too large an image: it has {image.width}×{image.height} pixels{twice}, and {limit:,} are the "
            f"most; raise that limit with --max-pixels {pixels} if you trust the file"
        )


def _check_scans(file: BinaryIO, name: str, width: int, height: int) -> None:
    """Count a JPEG's scans: thousands of them fit into a small file and would take minutes."""
    position = file.tell()
    file.seek(0)
    most = _MOST_METADATA + 4 * width * height
    content = file.read(most)
    file.seek(position)
    start = scans = 0
    components = None  # of a frame that may have all it has in one scan
    while (found := _MARKER.search(content, start)) and (marker := found[1][0]) != _EOI:
        start = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
        if marker in _SINGLE_PASS:
            components = content[found.end() + 7 : found.end() + 8]
        elif marker == _SOS:
            if not scans and components == content[found.end() + 2 : found.end() + 3]:
                break  # all is in this scan, and no other is read
            scans += 1
    if not found and len(content) == most:
        raise DetailFlowError(f"{name} is a JPEG that does not end within {most:,} bytes: save it in another program")
    if scans > _MOST_SCANS:
        raise DetailFlowError(
            f"{name} is a JPEG of {scans:,} scans, which could take minutes to decode: {_MOST_SCANS} are the most; "
            "save it again in another program"
        )


def _strip_png(file: BinaryIO) -> BinaryIO | None:
    """Return a PNG file with only what its pixels need: Pillow gives up at long or damaged texts and profiles."""
    try:
        file.seek(0)
        content = file.read() if file.read(len(_PNG)) == _PNG else b""
    except OSError:  # the reason why it could not be decoded
        return None
    kept, start = [_PNG], 0
    while start + 8 <= len(content):
        kind = content[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if not kind[0] & 0x20 or kind in (b"tRNS", b"eXIf"):  # a capital letter: a chunk that is needed
            kept.append(content[start:end])
        start = end
    return io.BytesIO(b"".join(kept)) if content else None


def _png_exif(file: BinaryIO) -> bytes:
    """Return the EXIF data of a PNG file in Pillow's form, reading only the heads of its chunks."""
    position = file.tell()
    start, found = len(_PNG), b""
    while not found and file.seek(start) == start and len(head := file.read(8)) == 8:
        size = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            found = b"Exif\0\0" + file.read(min(size, _LONGEST_EXIF))
        start += 12 + size
    file.seek(position)
    return found


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # damaged EXIF data: the pixels may be sound and are taken as they are stored
        value = image.getexif().get(_ORIENTATION)
        return value if isinstance(value, int) else 1
    return 1


def _upright(rgb: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    if turn is None:
        return rgb
    upright = rgb.transpose(turn)
    upright.info = {}  # in which EXIF, XMP or text would have it turned again
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to RGB in stripes, so that no step needs a copy of all of it."""
    if not image.width * image.height:
        raise DetailFlowError(
            f"the image has no pixels: it is {image.width}×{image.height}, and each side must be at least 1"
        )
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    convert = _conversion(image)
    if image.width * image.height <= _STRIPE:
        return convert(image)
    result = Image.new("RGB", image.size)
    for top, stripe in _stripes(image):
        result.paste(convert(stripe), (0, top))
    return result


def _stripes(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, _STRIPE // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return what converts a stripe of an image to RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        tags, unsigned = _tags(image), _is_unsigned(image)
        negative = tags.get(_PHOTOMETRIC) == 0  # 8 bits Pillow inverts itself
        white, clear = _white(image, unsigned), image.info.get("transparency")
        return partial(_numbers_to_rgb, white=white, unsigned=unsigned, negative=negative, clear=clear)
    if image.has_transparency_data:
        return partial(_over_white, clear=_clear(image))
    return methodcaller("convert", "RGB")


def _numbers_to_rgb(image: Image.Image, white: float, unsigned: bool, negative: bool, clear: Any) -> Image.Image:
    stored = _numbers(image, unsigned)
    with np.errstate(all="ignore"):
        values = np.nan_to_num(stored.astype(np.float64), posinf=white)
    if negative:
        values = white - values
    if isinstance(clear, int):
        values[stored == clear] = white
    return Image.fromarray((values * (255 / white) + 0.5).clip(0, 255).astype(np.uint8)).convert("RGB")


def _over_white(image: Image.Image, clear: Any) -> Image.Image:
    if clear != image.info.get("transparency"):
        image = image.copy()  # the caller's stays as it is
        image.info["transparency"] = clear
    if image.mode == "La":  # from which Pillow converts to nothing else
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _clear(image: Image.Image) -> Any:
    """Return an image's transparent value on the scale of its pixels: of a PNG file, Pillow gives it as stored.

    A loaded image does not say how many bits were stored, but if it was grey of 2 or 4, all its pixels are multiples of
    85 or 17. Of 16 bits Pillow keeps the upper 8.
    """
    clear = image.info.get("transparency")
    if image.format not in ("PNG", None):  # None: part of another image
        return clear
    if isinstance(clear, tuple) and max(clear) > 255:
        return tuple(value >> 8 for value in clear)
    if isinstance(clear, int) and image.mode == "L":
        steps = (step for step in (85, 17) if clear * step <= 255)
        shades = [shade for shade, count in enumerate(image.histogram()) if count]
        return clear * next((step for step in steps if not any(shade % step for shade in shades)), 1)
    return clear


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of a TIFF file; others have none."""
    return getattr(image, "tag_v2", {})


def _is_unsigned(image: Image.Image) -> bool:
    """Return whether a TIFF file has numbers of 32 bits without a sign, which Pillow gives one."""
    tags = _tags(image)
    return image.mode == "I" and tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,)


def _numbers(image: Image.Image, unsigned: bool) -> np.ndarray:
    values = np.asarray(image)
    return values.astype(np.uint32) if unsigned else values


def _white(image: Image.Image, unsigned: bool) -> float:
    """Return the value of white in an image of one channel of 16 bits, 32 bits or floating-point numbers.

    Pillow would clip all of them to 0 to 255. Up to 16 bits the file gives it; PGM files are scaled to 16 by Pillow.
    Floating-point white is 1 by convention, but 255 and 65535 are common too: the brightest pixel decides.
    """
    tags = _tags(image)
    if image.mode.startswith("I;16"):
        return float(2 ** tags.get(_BITS, (16,))[0] - 1)
    if image.mode == "I" and image.format == "PPM":
        return 65535
    if image.mode == "I" and (tags.get(_BITS), tags.get(_SAMPLE_FORMAT)) == ((16,), (2,)):  # with a sign
        return 32767
    brightest = 0.0
    for _, stripe in _stripes(image):
        values = _numbers(stripe, unsigned)
        brightest = max(brightest, float(values.max(initial=0, where=np.isfinite(values))))
    if image.mode == "F" and brightest <= 2:  # resizing and sharpening exceed 1 a little
        return 1
    return next((white for white in (255.0, 65535.0) if brightest <= white), brightest)
