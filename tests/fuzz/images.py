"""Cases of one image: every format that Pillow writes, in odd modes and sizes, and then changed."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from random import Random

from PIL import Image

from .mutate import HUGE, misplace, mutate_bytes
from .stock import photo

MODES = (
    "RGB",
    "RGB",
    "L",
    "1",
    "P",
    "RGBA",
    "LA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
    "PA",
    "La",
    "RGBa",
    "RGBX",
)
SUFFIXES = (
    ".png",
    ".jpg",
    ".tif",
    ".webp",
    ".bmp",
    ".gif",
    ".eps",
    ".pdf",
    ".ico",
    ".psd",
    ".wmf",
    ".avif",
    ".jp2",
    ".heic",
    "",
    ".txt",
)


def write_image(path: Path, rng: Random) -> Path:
    """An image file in the place of `path`, of a random format and mode, mostly changed after that. → where it is"""
    Image.init()
    way = rng.random()
    if way < 0.08:
        content, form = _crafted(rng), "PNG"
    else:
        form = rng.choice(sorted(Image.SAVE))
        content = _saved(form, rng)
    if 0.2 < way < 0.75:
        content = mutate_bytes(content, rng, near=rng.choice((32, 200, 1000)))
    elif 0.75 < way < 0.9:
        content = _larger(content, rng)
    suffix = f".{form.lower()}" if rng.random() < 0.6 else rng.choice(SUFFIXES)
    path = path.with_suffix(suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if way > 0.97:
        misplace(path, rng)
    return path


def _saved(form: str, rng: Random) -> bytes:
    """A small image in that format, in a mode that it takes."""
    size = rng.choice(((37, 29), (37, 29), (16, 16), (1, 1), (1, 300), (300, 1), (64, 64), (3, 2)))
    image = photo(rng.randrange(12), size)
    modes = [rng.choice(MODES), "RGB", "L", "1", "P", "RGBA", "F", "I;16"]
    for mode in modes:
        content = io.BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _converted(image, mode).save(content, format=form, **_options(form, image, rng))
            return content.getvalue()
        except Exception:  # Pillow has an exception for each mode, size and option that a format cannot have
            continue
    return rng.choice((b"GRIB", b"BUFR", b"\x89HDF\r\n\x1a\n", b"\xd7\xcd\xc6\x9a\0\0")) + rng.randbytes(
        100
    )  # read by plug-ins only


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if mode in ("I;16", "I;16B"):
        return image.convert("I").point(lambda value: value * 200).convert("I;16")
    if mode in ("LAB",):
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    if mode in ("PA", "La"):
        return image.convert("LA").convert(mode)
    return image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)


def _options(form: str, image: Image.Image, rng: Random) -> dict:
    """What some formats can be told: several frames, turned by EXIF, tags, compression."""
    options: dict = {}
    if (
        form in ("GIF", "PNG", "WEBP", "TIFF", "MPO", "PDF") and rng.random() < 0.3
    ):  # not AVIF, whose frames crash Pillow
        options |= {"save_all": True, "append_images": [photo(k, image.size) for k in range(rng.choice((1, 5)))]}
    if form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") and rng.random() < 0.4:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((1, 6, 8, 0, 9, 65535))
        exif[0x010E] = "x" * rng.choice((0, 10, 60_000))
        options["exif"] = exif
    if form == "TIFF":
        kinds = (
            None,
            "tiff_lzw",
            "jpeg",
            "tiff_adobe_deflate",
            "packbits",
            "group4",
            "group3",
            "tiff_ccitt",
            "zstd",
            "lzma",
        )
        options["compression"] = rng.choice(kinds)
        options["big_tiff"] = rng.random() < 0.2
    if form == "PNG" and rng.random() < 0.3:
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_text("a", "x" * rng.choice((10, 3_000_000)), zip=True)
        text.add_itxt("b", "é" * 100, zip=True)
        options |= {"pnginfo": text, "icc_profile": bytes(rng.choice((0, 10, 10_000)))}
    if form == "DDS":
        options["pixel_format"] = rng.choice((None, "DXT1", "DXT5", "BC5", "BC3"))
    if form in ("JPEG", "WEBP", "JPEG2000", "MPO"):
        options |= rng.choice(({}, {"progressive": True}, {"lossless": True}, {"irreversible": True}, {"quality": 1}))
    return options


def _larger(content: bytes, rng: Random) -> bytes:
    """The width and height in its header made huge, wherever it has them; a PNG with the checksum that fits."""
    new = rng.choice(HUGE), rng.choice(HUGE)
    for old in ((37, 29), (16, 16), (1, 300), (300, 1), (64, 64)):
        for form in ("<II", ">II", "<HH", ">HH"):
            least = 8 if form[1] == "I" or old[0] > 30 else 10**9  # short numbers of two bytes are found anywhere
            packed = struct.pack(form, *old)
            if (at := content.find(packed)) >= 0 and at < 1000 + least:
                size = 256 ** (len(packed) // 2)
                content = content[:at] + struct.pack(form, *(n % size for n in new)) + content[at + len(packed) :]
    for text in (b"37 29", b"1 300", b"300 1", b"64 64"):
        content = content.replace(text, f"{new[0]} {new[1]}".encode(), 1)
    if content[12:16] == b"IHDR":
        content = content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]
    return content


def _crafted(rng: Random) -> bytes:
    """A PNG of a few kilobytes that is large when decoded, or whose chunks are."""
    side = rng.choice((3000, 9000, 13_000, 20_000, 60_000))
    bits, colour, samples = rng.choice(
        ((1, 0, 1), (8, 0, 1), (16, 0, 1), (8, 2, 3), (16, 6, 4), (8, 3, 1), (16, 2, 3), (8, 4, 2))
    )
    row = 1 + (side * bits * samples + 7) // 8
    packer = zlib.compressobj(1)
    height = side if row * side < 200_000_000 else max(1, 200_000_000 // row)  # any more would take seconds to write
    pixels = b"".join([*(packer.compress(bytes(row)) for _ in range(min(height, 3000))), packer.flush()])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, height, bits, colour, 0, 0, 0))]
    if colour == 3:
        chunks.append((b"PLTE", bytes(range(255)) + b"\0\0\0"[:0]))
    extra = rng.choice(("", "zTXt", "iCCP", "acTL", "tRNS", "eXIf", "iTXt"))
    if extra in ("zTXt", "iCCP", "iTXt"):
        bomb = zlib.compress(bytes(rng.choice((100, 50_000_000))))
        chunks.append((extra.encode(), b"a\0\0" + bomb if extra != "iTXt" else b"a\0\1\0\0\0" + bomb))
    elif extra:
        chunks.append((extra.encode(), rng.randbytes(rng.choice((0, 2, 6, 8, 40)))))
    chunks += [(b"IDAT", pixels), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def reconstruct(rng: Random) -> list[str]:
    """`detailflow reconstruct` of one to three such images."""
    files = [write_image(Path("in") / f"image{k}", rng) for k in range(rng.choice((1, 1, 1, 2, 3)))]
    whole = ["--whole"] if rng.random() < 0.3 else []
    return ["reconstruct", *map(str, files), "--model", "in/model", *whole, "--device", "cpu", "--output", "out"]
