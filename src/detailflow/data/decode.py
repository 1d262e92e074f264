"""One image file, or its bytes, as RGB.

Pillow does all the decoding, in raster formats alone: those of its plug-ins that start programs are never asked. An image costs
at most eight bytes a pixel while it is read (in WebP and JPEG 2000 sixteen), and may have `max_pixels()` of them.
"""

import io
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, features
from PIL.TiffImagePlugin import TiffImageFile

from detailflow.errors import DetailFlowError, printable

MAX_PIXELS = 178_956_970  # beyond that Pillow, too, takes a file for an attack
MAX_PIXELS_VARIABLE = "DETAILFLOW_MAX_PIXELS"  # which reaches worker processes, however they are started

# What only decodes pixels. Not: EPS (starts Ghostscript), WMF (Windows draws it), IPTC (opens what is in it in any format),
# FITS (unpacks without a limit), DDS (decoded in Python, which takes minutes), and those of which Pillow knows only the name.
_RASTER = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "MPO", "HEIF", "JXL", "BLP", "CUR", "DCX", "DIB",
    "FLI", "FTEX", "GBR", "ICNS", "ICO", "IM", "MSP", "PCD", "PCX", "PIXAR", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA",
    "XBM", "XPM",
)  # fmt: skip
_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # formats that not every Pillow was built with

# Images within images, whose own headers may say another size. Pillow reads that of an ICO file when it is opened.
_NESTED = ("ICO", "ICNS", "BLP")
_ICO = b"\0\0\1\0"

_COST = {"WEBP": 2, "JPEG2000": 2}  # how often a pixel counts: these decoders take sixteen bytes for it

PLUGINS = {  # suffix → the package that reads such files
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    ".jxl": "pillow-jxl-plugin",
    **dict.fromkeys((".avif", ".avifs"), "pillow-avif-plugin"),
    **dict.fromkeys(
        (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"),
        "rawpy, which converts them",
    ),
    ".dds": "nothing here: convert them to PNG",
    **dict.fromkeys((".svg", ".eps", ".ps", ".pdf", ".ai", ".wmf", ".emf"), "nothing here: no raster image"),
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
_ORIENTATION = 0x0112
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC = 256, 257, 258, 262  # tags of TIFF files
_LONGEST_EXIF = 2**20  # bytes
_STRIPE = 2**17  # pixels that are converted at once
_OPENING = threading.Lock()


@cache
def raster_formats() -> tuple[str, ...]:
    """Return the formats that are read, by Pillow's names, with those of plug-ins that are installed."""
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
    """Return how many pixels an image may have: DETAILFLOW_MAX_PIXELS in the environment, else 178,956,970.

    Raises:
        DetailFlowError: if the variable is no positive whole number.
    """
    text = os.environ.get(MAX_PIXELS_VARIABLE, str(MAX_PIXELS))
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 19 and int(text)):
        raise DetailFlowError(
            f"the limit on pixels ({MAX_PIXELS_VARIABLE}) is {text!r}: it must be a positive whole number"
        )
    return int(text)


def load_rgb(
    source: str | os.PathLike[str] | bytes,
    name: str | None = None,
    least: int | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Read one image file (path) or its bytes as RGB.

    EXIF orientation is applied, transparency is laid over white, and palettes, CMYK, greyscale, 16 bits and floating-point
    numbers are converted. Other metadata is not looked at.

    Args:
        name: the image in messages; its path if left out.
        least: a JPEG is decoded straight to 1/2, 1/4 or 1/8 of its size if its shorter side stays that long, which takes a
            fraction of the time.
        max_pixels: the limit on pixels, in place of `decode.max_pixels()`.

    Raises:
        DetailFlowError: naming the image, if it cannot be read.
    """
    name = printable(name or ("image" if isinstance(source, bytes) else os.fspath(source)))
    with _opened(source, name) as file:
        try:
            return _decode(file, name, least, max_pixels)
        except DetailFlowError:
            raise
        except Exception as error:  # damaged files raise whatever the decoder ran into
            bare = _bare_png(file)
            if bare is None:
                raise _unreadable(name, error) from error
        try:
            return _decode(bare, name, least, max_pixels)
        except Exception as error:
            raise _unreadable(name, error) from error


def image_size(source: str | os.PathLike[str] | bytes, name: str) -> tuple[int, int]:
    """Return the width and height of an image as it will be shown, from its header.

    Raises:
        DetailFlowError: naming the image, if its header cannot be read.
    """
    with _opened(source, name) as file:
        try:
            with _open(file, max_pixels()) as image:
                if (
                    image.format == "PNG"
                ):  # whose whole content Pillow would decode to see if EXIF data come after the pixels
                    image.info.setdefault("exif", _png_exif(file))
                turned = _orientation(image) >= 5
                width, height = image.size
                if isinstance(image, TiffImageFile):  # not all versions of Pillow give its size as stored
                    width, height = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
                return (height, width) if turned else (width, height)
        except Exception as error:
            raise _unreadable(name, error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB: upright by its EXIF data, transparency over white, 16 bits scaled to 8.

    `image` itself stays as it is.
    """
    turn = _TURNS.get(_orientation(image))
    rgb = _converted(image)
    return rgb if turn is None else rgb.transpose(turn)


def first_line(error: BaseException) -> str:
    """Return what a library's error says, short enough for a sentence of ours."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _opened(source: str | os.PathLike[str] | bytes, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = Path(source)
    try:
        if path.is_dir():
            raise DetailFlowError(f"{name} is a folder: give the path of one image file")
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise DetailFlowError(f"{name} is no regular file: give the path of an image file")
        return open(path, "rb", buffering=2**16)
    except PermissionError as error:
        raise DetailFlowError(f"{name} cannot be opened: you have no permission to read it") from error
    except FileNotFoundError as error:
        raise DetailFlowError(f"{name} does not exist: give the path of an image file") from error
    except (OSError, ValueError) as error:
        raise DetailFlowError(
            f"{name} cannot be opened ({getattr(error, 'strerror', None) or first_line(error)})"
        ) from error


def _open(file: BinaryIO, limit: int) -> Image.Image:
    """Read an image's header, whatever its size; of what is decoded for that, the limit holds."""
    file.seek(0)
    if isinstance(file, io.BufferedReader):
        file.peek()  # so that nobody waits for the disk below
    nested = file.read(len(_ICO)) == _ICO
    file.seek(0)
    with _pillows_limit(limit if nested else None):
        return Image.open(file, formats=raster_formats())


@contextmanager
def _pillows_limit(limit: int | None) -> Iterator[None]:
    """Set Pillow's own limit, which is one number for all threads; above it Pillow warns, above twice that it stops."""
    with _OPENING:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limit
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _decode(file: BinaryIO, name: str, least: int | None, limit: int | None) -> Image.Image:
    limit = limit or max_pixels()
    image = _open(file, limit)
    _check_pixels(image, name, limit)
    if least:
        image.draft(None, (least, least))
    if image.format in _NESTED:
        with _pillows_limit(limit):
            image.load()
        _check_pixels(image, name, limit)
    else:
        image.load()
    turn = _TURNS.get(_orientation(image))
    rgb = _converted(image)
    del image  # its pixels, before they are needed twice
    return rgb if turn is None else rgb.transpose(turn)


def _check_pixels(image: Image.Image, name: str, limit: int) -> None:
    pixels = image.width * image.height * _COST.get(image.format or "", 1)
    if pixels > limit:
        twice = f", which in {image.format} count twice" if image.format in _COST else ""
        raise DetailFlowError(
            f"{name} is too large an image: it has {image.width}×{image.height} pixels{twice}, and {limit:,} are the most; "
            f"raise that limit with --max-pixels {pixels} if you trust the file"
        )


def _unreadable(name: str, error: Exception) -> DetailFlowError:
    if isinstance(error, DetailFlowError):
        return error
    if isinstance(error, Image.UnidentifiedImageError):
        return DetailFlowError(f"{name} is not an image: its contents are in no raster format that is read")
    if isinstance(error, Image.DecompressionBombError):
        return DetailFlowError(f"{name} is too large an image: one within it has more pixels than --max-pixels allows")
    return DetailFlowError(f"{name} is damaged and cannot be decoded ({first_line(error)})")


def _bare_png(file: BinaryIO) -> BinaryIO | None:
    """A PNG file with nothing but what its pixels need: Pillow gives up at long or damaged texts and profiles."""
    try:
        file.seek(0)
        content = file.read() if file.read(8) == b"\x89PNG\r\n\x1a\n" else b""
    except OSError:  # which was why it could not be decoded
        return None
    kept, start = [b"\x89PNG\r\n\x1a\n"], 0
    while start + 8 <= len(content):
        kind = content[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if not kind[0] & 0x20 or kind in (b"tRNS", b"eXIf"):  # a capital letter: needed
            kept.append(content[start:end])
        start = end
    return io.BytesIO(b"".join(kept)) if content else None


def _png_exif(file: BinaryIO) -> bytes:
    """Return the EXIF data of a PNG file, as Pillow has them, without decoding it; only the heads of its chunks are read."""
    place = file.tell()
    start, found = 8, b""
    while not found and file.seek(start) == start and len(head := file.read(8)) == 8:
        size = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            found = b"Exif\0\0" + file.read(min(size, _LONGEST_EXIF))
        start += 12 + size
    file.seek(place)
    return found


def _orientation(image: Image.Image) -> int:
    # The pixels may be sound if only the EXIF block is not: then they are taken as they are stored.
    with suppress(Exception):
        value = image.getexif().get(_ORIENTATION)
        return value if isinstance(value, int) else 1
    return 1


def _converted(image: Image.Image) -> Image.Image:
    """RGB of a loaded image, by stripes, so that no step needs a copy of all of it."""
    transparent = image.has_transparency_data
    if image.mode == "RGB" and not transparent:
        return image
    white = _white(image) if image.mode == "F" or image.mode.startswith("I") else None
    negative = white is not None and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0  # 8 bits Pillow inverts itself
    if image.width * image.height <= _STRIPE:
        return _stripe_to_rgb(image, transparent, white, negative)
    result = Image.new("RGB", image.size)
    for top, stripe in _stripes(image):
        result.paste(_stripe_to_rgb(stripe, transparent, white, negative), (0, top))
    return result


def _stripes(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, _STRIPE // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _stripe_to_rgb(image: Image.Image, transparent: bool, white: float | None, negative: bool) -> Image.Image:
    if white is not None:
        with np.errstate(all="ignore"):
            values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=white)
        if negative:
            values = white - values
        return Image.fromarray((values * (255 / white) + 0.5).clip(0, 255).astype(np.uint8)).convert("RGB")
    if not transparent:
        return image.convert("RGB")
    image = image.convert("RGBA")
    below = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(below, image).convert("RGB")


def _white(image: Image.Image) -> float:
    """The number that is white in an image of one channel of 16 bits, 32 bits or floating-point numbers.

    Pillow would clip all of them to 0 to 255. Up to 16 bits their number says it; PGM files Pillow scales to 16. By convention
    floating-point white is 1, but files of 0 to 255 and of 0 to 65535 are common: the brightest pixel tells.
    """
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS, (16,))
        return float(2 ** bits[0] - 1)
    if image.mode == "I" and image.format == "PPM":
        return 65535
    brightest = 0.0
    for _, stripe in _stripes(image):
        values = np.asarray(stripe)
        brightest = max(brightest, float(values.max(initial=0, where=np.isfinite(values))))
    if image.mode == "F" and brightest <= 2:  # a little more than 1 comes of resizing and sharpening
        return 1
    return next((white for white in (255.0, 65535.0) if brightest <= white), brightest)
