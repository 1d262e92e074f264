"""One image file: formats, metadata, memory, and what is refused."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from PIL.IcoImagePlugin import IcoImageFile
from PIL.PngImagePlugin import PngImageFile

from detailflow.data.image_files import _TURNS, image_size, image_suffixes, load_rgb, max_pixels, raster_formats, to_rgb
from detailflow.data.notes import why
from detailflow.errors import DetailFlowError
from detailflow.words import printable

QUARTER_TURN = 6  # the EXIF orientation of a phone held upright


def noise(height: int = 24, width: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("scale", [1, 255, 65535, 1e6])
def test_floating_point_images_are_as_bright_as_they_are(scale):
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(4, 0)
    pixels = np.asarray(load_rgb(saved(Image.fromarray(ramp * np.float32(scale)), "TIFF")))
    np.testing.assert_array_equal(pixels[..., 0], np.arange(256, dtype=np.uint8)[None].repeat(4, 0))


def test_numbers_beyond_the_scale_are_clipped():
    values = np.array([[-1, 0, 0.5, 1, 1.25, np.nan]], np.float32)
    assert np.asarray(load_rgb(saved(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]
    large = Image.fromarray(np.array([[0, 500_000, 1_000_000]], np.int32))
    assert np.asarray(to_rgb(large))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "options",
    [
        {"icc_profile": b"p" * 3_000_000},
        {"pnginfo": ("zTXt", "x" * 3_000_000)},
        {"pnginfo": ("iTXt", "x" * 3_000_000)},
        {"pnginfo": ("tEXt", "x" * 70_000_000)},
    ],
)
def test_metadata_of_any_length_is_not_looked_at(options):
    if "pnginfo" in options:
        kind, text = options["pnginfo"]
        info = PngImagePlugin.PngInfo()
        if kind == "iTXt":
            info.add_itxt("XML:com.adobe.xmp", text, zip=True)
        else:
            info.add_text("parameters", text, zip=kind == "zTXt")
        options = {"pnginfo": info}
    exif = Image.Exif()
    exif[0x0112] = QUARTER_TURN
    content = saved(noise(), "PNG", exif=exif, **options)
    np.testing.assert_array_equal(np.asarray(load_rgb(content)), np.rot90(np.asarray(noise()), -1))
    assert image_size(content, "a") == load_rgb(content).size  # which `data`, summaries and the service ask for first


def test_damaged_metadata_is_no_reason_to_leave_an_image_out():
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "some text", zip=True)
    content = bytearray(saved(noise(), "PNG", pnginfo=info))
    content[content.index(b"zTXt") + 20] ^= 255
    np.testing.assert_array_equal(np.asarray(load_rgb(bytes(content))), np.asarray(noise()))
    assert image_size(bytes(content), "a") == noise().size
    content[content.index(b"IDAT") + 20] ^= 255
    with pytest.raises(DetailFlowError, match="is damaged"):
        load_rgb(bytes(content))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_profiles_of_several_megabytes_in_any_format(form):
    assert load_rgb(saved(noise(), form, icc_profile=b"p" * 3_000_000)).size == (32, 24)


def test_the_callers_image_stays_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = QUARTER_TURN
    for form in ("JPEG", "PNG"):
        image = Image.open(io.BytesIO(saved(noise(), form, exif=exif)))
        image.load()
        before = image.tobytes()
        assert to_rgb(image).size == (24, 32)
        assert image.size == (32, 24) and image.tobytes() == before and image.getexif()[0x0112] == QUARTER_TURN
    assert image_size(saved(noise(), "JPEG", exif=exif), "a") == (24, 32)


def test_only_raster_formats_are_opened_and_no_program_is_started(tmp_path, monkeypatch):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "postscript.jpg").write_bytes(saved(noise(), "EPS"))
    (tmp_path / "pdf.png").write_bytes(saved(noise(), "PDF"))
    for name in ("postscript.jpg", "pdf.png"):
        with pytest.raises(DetailFlowError, match=f"{name} is not an image"):
            load_rgb(tmp_path / name)
    assert not (tmp_path / "started").exists()
    assert not {"EPS", "WMF", "PDF", "IPTC", "FITS", "HDF5", "ICO", "ICNS"} & set(raster_formats())
    assert {".jpg", ".jfif", ".png", ".webp", ".tga", ".qoi"} <= image_suffixes()
    assert not {".eps", ".ps", ".pdf", ".wmf", ".h5", ".mpg"} & image_suffixes()


def test_every_format_that_pillow_writes_is_read():
    for form in set(raster_formats()) & set(Image.SAVE):
        image = noise().convert("1" if form in ("MSP", "XBM") else "F" if form == "SPIDER" else "RGB").resize((32, 32))
        if form in ("GBR", "IM"):  # palettes alone, or a name with it
            continue
        assert load_rgb(saved(image, form)).mode == "RGB", form


MEASURE = """
import os, resource, sys
from detailflow.data.image_files import load_rgb
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
for small, large in zip(sys.argv[1::2], sys.argv[2::2]):
    load_rgb(small)  # what is loaded once
for small, large in zip(sys.argv[1::2], sys.argv[2::2]):
    if os.fork() == 0:  # a process has only one peak
        before, image = peak(), load_rgb(large)
        print(large, (peak() - before) / (image.width * image.height), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes as in POSIX")
def test_memory_of_a_large_image(tmp_path):
    side, exif = 3000, Image.Exif()
    exif[0x0112] = QUARTER_TURN
    images = {
        "uint16.png": Image.fromarray(np.zeros((side, side), np.uint16)),
        "int32.tif": Image.fromarray(np.zeros((side, side), np.int32)),
        "float32.tif": Image.fromarray(np.zeros((side, side), np.float32)),
        "transparent.png": Image.new("RGBA", (side, side)),
        "turned.jpg": Image.new("RGB", (side, side)),
    }
    paths = []
    for name, image in images.items():
        options = (
            {"compression": "tiff_lzw"} if name.endswith("tif") else {"exif": exif} if name.endswith("jpg") else {}
        )
        for path, saved_image in ((tmp_path / f"small-{name}", image.resize((8, 8))), (tmp_path / name, image)):
            saved_image.save(path, **options)
            paths.append(str(path))
    result = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    measured = dict(line.rsplit(" ", 1) for line in result.stdout.splitlines())
    assert len(measured) == 5 and all(float(value) < 10 for value in measured.values()), (
        measured
    )  # eight, and the decoder's own


def test_the_limit_on_pixels_has_a_sentence_of_its_own(tmp_path, monkeypatch):
    noise().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of which Pillow would warn, or raise an error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_rgb(tmp_path / "a.png").size == (32, 24)
        assert Image.MAX_IMAGE_PIXELS == 100
        monkeypatch.setenv("DETAILFLOW_MAX_PIXELS", "767")
        with pytest.raises(
            DetailFlowError, match=r"a\.png is too large an image: it has 32×24 pixels, and 767 are the most"
        ):
            load_rgb(tmp_path / "a.png")
        monkeypatch.setenv("DETAILFLOW_MAX_PIXELS", "700")
        with pytest.raises(DetailFlowError, match="--max-pixels 768"):
            load_rgb(tmp_path / "a.png")
        monkeypatch.setenv("DETAILFLOW_MAX_PIXELS", "768")
        assert load_rgb(tmp_path / "a.png").size == (32, 24)
    noise().save(tmp_path / "a.webp")
    with pytest.raises(
        DetailFlowError, match="32×24 pixels, which in WEBP count twice, and 768 are the most.*--max-pixels 1536"
    ):
        load_rgb(tmp_path / "a.webp")
    monkeypatch.setenv("DETAILFLOW_MAX_PIXELS", "many")
    with pytest.raises(DetailFlowError, match="the limit on pixels .* is 'many'"):
        max_pixels()


def test_an_empty_file(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(DetailFlowError, match=r"a\.png is empty: it has 0 bytes"):
        load_rgb(tmp_path / "a.png")


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "device.png"):
        with pytest.raises(DetailFlowError, match=f"{name} is not a regular file"):
            load_rgb(tmp_path / name)
    for name in ("a" * 300 + ".png", "a\0b.png"):
        with pytest.raises(DetailFlowError, match="cannot be opened|does not exist"):
            load_rgb(name)


def test_names_that_are_not_utf8_are_printable(tmp_path):
    assert (
        printable("photos/café") == "photos/café"
        and printable(os.fsdecode(b"caf\xe9")) == "caf\N{REPLACEMENT CHARACTER}"
    )
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    file.write_text("no image")
    with pytest.raises(DetailFlowError, match="caf\N{REPLACEMENT CHARACTER}.png is not an image") as caught:
        load_rgb(file)
    str(caught.value).encode()


# ------------------------------------------------------------------------------------------------- headers


def decoded_formats(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The formats that are decoded from now on."""
    decoded = []
    for plugin in (PngImageFile, IcoImageFile):
        load = plugin.load

        def spy(self: Image.Image, load: Callable = load) -> object:
            decoded.append(self.format)
            return load(self)

        monkeypatch.setattr(plugin, "load", spy)
    return decoded


def test_the_size_of_a_png_is_read_without_its_pixels(monkeypatch):
    content = saved(Image.new("1", (4000, 3000)), "PNG")
    exif = Image.Exif()
    exif[0x0112] = QUARTER_TURN
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    late = (
        content[:-12] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[-12:]
    )
    decoded = decoded_formats(monkeypatch)
    assert image_size(content, "a.png") == (4000, 3000)
    assert image_size(saved(Image.new("1", (4000, 3000)), "PNG", exif=exif), "a.png") == (3000, 4000)
    assert image_size(late, "a.png") == (3000, 4000)
    assert not decoded
    assert load_rgb(late).size == (3000, 4000)


def turned(form: str, orientation: int) -> bytes:
    """A file of 32×24 pixels with this EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(noise(), form, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("form", ["TIFF", "JPEG", "PNG", "WEBP"])
def test_the_size_is_that_of_the_image_as_shown(form, orientation):
    content = turned(form, orientation)
    assert image_size(content, "a") == load_rgb(content).size == ((24, 32) if 5 <= orientation <= 8 else (32, 24))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["TIFF", "JPEG", "PNG", "WEBP"])
def test_an_opened_image_is_turned_as_its_file_is(form, orientation):
    content = turned(form, orientation)
    image, expected = Image.open(io.BytesIO(content)), np.asarray(load_rgb(content))
    for _ in ("not loaded yet", "loaded"):
        np.testing.assert_array_equal(np.asarray(to_rgb(image)), expected)


def stored_in_xmp(form: str, orientation: int) -> bytes:
    """The same, as some programs write it: in XMP alone."""
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    if form != "PNG":
        return saved(noise(), form, **{"tiffinfo": {700: xmp.encode()}} if form == "TIFF" else {"xmp": xmp.encode()})
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    return saved(noise(), form, pnginfo=info)


def stored_as_text(form: str, orientation: int) -> bytes:
    """The same, as ImageMagick wrote it into PNG files: EXIF as a text of hexadecimal digits."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = exif.tobytes()
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(content):8}\n{content.hex()}\n")
    return saved(noise(), form, pnginfo=info)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(
    ("store", "form"),
    [
        *((turned, form) for form in ("JPEG", "PNG", "WEBP", "TIFF")),
        *((stored_in_xmp, form) for form in ("JPEG", "PNG", "WEBP", "TIFF")),
        (stored_as_text, "PNG"),
    ],
)
def test_an_image_is_turned_once(store, form, orientation):
    """An image that `load_rgb` returned is upright: whoever is given it turns it no more."""
    upright = load_rgb(store(form, orientation))
    assert upright.size == ((24, 32) if orientation >= 5 else (32, 24))
    if form in ("PNG", "TIFF"):  # which keep all pixels
        expected = np.asarray(noise().transpose(_TURNS[orientation]))
        np.testing.assert_array_equal(np.asarray(upright), expected)
    for image in (upright, to_rgb(upright), to_rgb(Image.open(io.BytesIO(store(form, orientation))))):
        np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(upright))


def with_scans(content: bytes, more: int) -> bytes:
    """A JPEG with its last scan that many times more, which a decoder takes as it comes."""
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + more * last + content[-2:]


def test_a_jpeg_has_no_more_scans_than_any_real_one():
    """Each is work for all pixels, and takes a few bytes: thousands of them keep a processor busy for minutes."""
    content = saved(noise(), "JPEG", progressive=True)
    upright = np.asarray(load_rgb(content))
    assert load_rgb(with_scans(content, 50)).size == (32, 24)
    for more in (100, 1000):
        with pytest.raises(DetailFlowError, match=r"^a\.jpg is a JPEG of 1,?\d\d\d? scans, .+: 100 are the most; "):
            load_rgb(with_scans(content, more), "a.jpg")
    scan = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"
    single = b"\xff\xc0\0\x11\x08\0\x18\0\x20\x03" + bytes(9) + b"\xff\xda\0\x0c\x03" + bytes(9)
    with pytest.raises(DetailFlowError, match="scans"):  # ends as if all were in one scan
        load_rgb(with_scans(content, 1000)[:-2] + single + content[-2:], "a.jpg")
    plain = saved(noise(), "JPEG")
    start, end = plain.index(b"\xff\xda"), plain.rindex(b"\xff\xd9")
    partial = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0\0"
    with pytest.raises(DetailFlowError, match="scans"):  # one before that which has all has others read after it
        load_rgb(plain[:start] + partial + plain[start:end] + 1000 * partial + plain[end:], "a.jpg")
    comment = b"\xff\xfe\xff\xff" + bytes(65533)
    with pytest.raises(DetailFlowError, match=r"^a\.jpg is a JPEG that does not end within 16,\d+,\d+ bytes"):
        load_rgb(content[:2] + 300 * comment + content[2:], "a.jpg")
    assert load_rgb(plain[:2] + 10 * comment + plain[2:]).size == (32, 24)
    profile = saved(noise(), "JPEG", progressive=True, icc_profile=1000 * scan)
    for harmless in (profile, content + 1000 * scan):  # no scans: they are in metadata, or behind the image
        np.testing.assert_array_equal(np.asarray(load_rgb(harmless)), upright)


def test_images_that_cannot_be_read_have_a_sentence(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(noise(), "PNG"))
    with Image.open(tmp_path / "a.png") as left:  # its pixels are not read here
        pass
    closed = noise()
    closed.close()
    cut = Image.open(io.BytesIO(saved(noise(), "PNG")[:1000]))
    for image in (left, closed, cut):
        with pytest.raises(
            DetailFlowError, match=r"^the image cannot be read \(.+\): it is damaged, or was closed too"
        ):
            to_rgb(image)
    for size in ((0, 5), (5, 0)):
        with pytest.raises(DetailFlowError, match=r"^the image has no pixels: it is \d×\d, and each side must be at"):
            to_rgb(Image.new("RGB", size))
    assert to_rgb(Image.new("La", (1, 1))).getpixel((0, 0)) == (255, 255, 255)


def test_textures_of_games_are_not_read():
    """Pillow decodes them pixel by pixel in Python."""
    with pytest.raises(DetailFlowError, match="is not an image"):
        load_rgb(saved(noise(), "DDS"))
    assert ".dds" not in image_suffixes() and why(".dds")


# ------------------------------------------------------------------------------------------------- scales


def grey(content: bytes) -> list[int]:
    image = load_rgb(content)
    return np.asarray(image)[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("dtype", "values"),
    [(np.uint16, (0, 257, 25700, 65535)), (np.float32, (0, 1 / 255, 100 / 255, 1))],
)
def test_tiff_files_in_which_0_is_white(dtype, values):
    image = Image.fromarray(np.array([values], dtype))
    assert grey(saved(image, "TIFF")) == [0, 1, 100, 255]
    assert grey(saved(image, "TIFF", tiffinfo={262: 0})) == [255, 254, 155, 0]


def test_tiff_files_of_12_bits():
    values = np.array([0, 16, 1606, 4095])
    bits = "".join(f"{value:012b}" for value in values)
    packed = int(bits, 2).to_bytes(6, "big")
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 1, 279: 6}
    content = b"II*\0" + struct.pack("<IH", 8, len(tags))
    content += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()) + bytes(4) + packed
    assert grey(content) == [0, 1, 100, 255]


@pytest.mark.parametrize("maxval", [65535, 1000])
def test_a_pgm_file_says_its_scale(maxval):
    values = [0, round(maxval / 10), round(maxval / 20)]
    content = b"P5 3 1 %d\n" % maxval + struct.pack(">3H", *values)
    assert grey(content) == [0, 26, 13]


def test_tiff_files_of_32_bits_without_a_sign():
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))
    content = saved(Image.fromarray(values.view(np.int32)), "TIFF")
    assert content.count(signed) == 1
    assert grey(content.replace(signed, unsigned)) == [0, 128, 255]
    assert grey(saved(Image.fromarray(np.array([[-1, 0, 255]], np.int32)), "TIFF")) == [0, 0, 255]


def tiff(pixels: np.ndarray, sample_format: int = 1) -> bytes:
    """A TIFF file of (H, W) or, in planes, (3, H, W) numbers of 16 bits."""
    planes, (height, width) = len(pixels) if pixels.ndim == 3 else 1, pixels.shape[-2:]
    kind, size = min(planes, 2), 2 * width * height
    values = {256: [width], 257: [height], 258: [16] * planes, 259: [1], 262: [kind], 273: [], 277: [planes]}
    values |= {278: [height], 279: [size] * planes, 284: [pixels.ndim - 1], 339: [sample_format] * planes}
    start = 8 + 2 + 12 * len(values) + 4
    values[273] = [start + 4 * 4 * planes + i * size for i in range(planes)]
    entries, extra = b"", b""
    for tag, numbers in sorted(values.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, extra = struct.pack("<I", start + len(extra)), extra + packed
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + packed
    head = b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4)
    assert len(extra) <= 4 * 4 * planes
    return head + extra.ljust(4 * 4 * planes, b"\0") + pixels.astype("<u2").tobytes()


def test_tiff_files_of_16_bits_with_a_sign():
    values = np.array([[0, 16384, 32767]])
    assert grey(tiff(values)) == [0, 64, 127] and grey(tiff(values, sample_format=2)) == [0, 128, 255]


def test_tiff_files_of_16_bits_in_planes():
    """Pillow takes their bytes for numbers of 8 bits."""
    for planes in (3, 1):
        with pytest.raises(
            DetailFlowError, match="a has 16 bits in separate planes: save it with interleaved channels"
        ):
            load_rgb(tiff(np.full((planes, 7, 13), 65535)), "a")


# ------------------------------------------------------------------------------------------------- transparent values


def png(width: int, bits: int, kind: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG file of one row, with a transparent value; `kind` is 0 for grey and 2 for RGB."""
    header = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize(
    ("bits", "row", "transparent", "shown"),
    [
        (1, bytes([0b01000000]), 1, [0, 255, 0]),
        (2, bytes([0b01101100]), 1, [255, 170, 255]),
        (4, bytes([0x7A, 0x10]), 7, [255, 170, 17]),
        (8, bytes([7, 100, 200]), 7, [255, 100, 200]),
        (8, bytes([7, 119, 0]), 7, [255, 119, 0]),  # 7 × 17 = 119
        (16, struct.pack(">3H", 1000, 30000, 30001), 30000, [4, 255, 117]),
    ],
)
def test_the_transparent_grey_of_a_png_file_is_white(bits, row, transparent, shown):
    content = png(3, bits, 0, row, struct.pack(">H", transparent))
    image = Image.open(io.BytesIO(content))
    assert grey(content) == shown
    for _ in ("not loaded yet", "loaded"):
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == shown
    part = image.crop((0, 0, 2, 1))
    assert np.asarray(to_rgb(part))[0, :, 0].tolist() == shown[:2]


def test_the_transparent_colour_of_a_png_file_of_16_bits_is_white():
    row = struct.pack(">9H", 65535, 0, 0, 0, 0, 65535, 0x0102, 0x0304, 0x0506)
    image = Image.open(io.BytesIO(png(3, 16, 2, row, struct.pack(">3H", 65535, 0, 0))))
    before = image.info["transparency"]
    assert np.asarray(to_rgb(image))[0].tolist() == [[255, 255, 255], [0, 0, 255], [1, 3, 5]]
    assert image.info["transparency"] == before
    content = png(3, 16, 2, row, struct.pack(">3H", 0x0102, 0x0304, 0x0506))
    assert np.asarray(load_rgb(content))[0].tolist() == [[255, 0, 0], [0, 0, 255], [255, 255, 255]]
