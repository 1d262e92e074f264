"""Pictures to look at: grids of images, strips from coarse to fine, and how PNG files are written. Pillow only."""

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from detailflow.errors import DetailFlowError
from detailflow.files import writing
from detailflow.words import several

SMALLEST_TILE = 128  # pixels; smaller images are enlarged by the smallest whole factor that reaches it
GAP = 4
FONT_SIZE = 12
LINE = 16  # pixels from one line of a caption to the next
LEAST_CAPTION = 72  # pixels, also below an image that is thinner
# The first four are from `generate` ("set" with --num-images), the next two from `reconstruct`, and those of `vary` and
# `decode` follow.
Kind = Literal["sample", "set", "grid", "strip", "comparison", "reconstruction", "variations", "variation", "decoded"]
KEY = "detailflow"  # of the text in a PNG file that has its kind, and the name it was written under
_HEAD = 1024  # bytes of a PNG file that contain the text
_SINGLE = re.compile(r"(\d{4,}-.+|.+-reconstruction|.+-\d+-.+-\d+)\.png")  # names of single images that were made


class StageLike(Protocol):
    """Images decoded from their first tokens, such as `pipeline.Stage`."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def images(self) -> Sequence[Image.Image]: ...


def write_png(image: Image.Image, path: Path, kind: Kind | None = None) -> None:
    """Write a PNG file whole or not at all; `kind` and the file's name go into its text."""
    text = PngInfo()
    if kind:
        text.add_text(KEY, f"{kind} {quote(path.name)}")
    with writing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def picture_kind(path: Path) -> Kind | None:
    """Return the kind that `write_png` wrote into a file; None for any other file."""
    kind = _read_text(path)[0]
    return next((known for known in get_args(Kind) if known == kind), None)


def _read_text(path: Path) -> tuple[str, str]:
    """Return the kind and the quoted name in a PNG file's text; two empty strings if there are none."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return "", ""
    before, found, after = head.partition(f"tEXt{KEY}\0".encode())
    if not found or not head.startswith(b"\x89PNG"):
        return "", ""
    length = int.from_bytes(before[-4:], "big") - len(KEY) - 1
    kind, _, name = after[:length].decode("latin-1").partition(" ")
    return kind, name


def check_ours(paths: Iterable[Path], command: str) -> int:
    """Check that the files to be written replace none of the user's own; return how many of ours they replace."""
    earlier = [path for path in paths if os.path.exists(path)]  # which is False for names that cannot exist
    for path in earlier:
        kind = picture_kind(path) if path.is_file() else None
        if kind == "set":  # of many images, which is not made again in a moment
            raise DetailFlowError(f"{path} is of a set by `generate --num-images`: move it, or choose another output")
        if kind is None:
            raise DetailFlowError(f"{path} was not made by `detailflow {command}`: move it, or choose another output")
    return len(earlier)


def in_place_of(earlier: int) -> str:
    """Return the end of a sentence on files that were written: how many earlier ones they replaced, if any."""
    return f" in place of {several(earlier, 'earlier file')}" if earlier else ""


def is_overview(path: str) -> bool:
    """Return True for a grid or strip that `generate`, `reconstruct` or `vary` made, not an image of a data set."""
    name = os.path.basename(path)
    named = name == "grid.png" or name.startswith("strip-") or name.endswith(("-strip.png", "-variations.png"))
    return named and picture_kind(Path(path)) in ("grid", "strip", "comparison", "variations")


def is_made(path: str) -> bool:
    """Return True for an image that `generate`, `reconstruct` or `vary` wrote; a copy by another name is the user's."""
    if not _SINGLE.fullmatch(os.path.basename(path)):  # files of other names are not opened
        return False
    return _kind_as_written(Path(path)) in ("sample", "set", "reconstruction", "variation")


def generated(folder: Path) -> Iterator[Path]:
    """Yield the files that `generate` wrote into a folder; copies under other names are the user's."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".png" and path.is_file() and _kind_as_written(path) in ("sample", "grid", "strip"):
            yield path


def _kind_as_written(path: Path) -> str:
    """Return the kind in a PNG file's text if the file still has the name it was written under, else ""."""
    kind, name = _read_text(path)
    return kind if name == quote(path.name) else ""


def grid(images: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] | None = None) -> Image.Image:
    """Return a sheet with the images row by row, all enlarged to one size without smoothing.

    Args:
        images: at least one.
        columns: None makes the grid about square, with full rows if possible.
        labels: the captions, one per image, each of one or more lines.
    """
    if columns is None:
        root = math.ceil(math.sqrt(len(images)))
        columns = next((n for n in range(root, 2 * root) if len(images) % n == 0), root)
    captions = [label.split("\n") for label in labels] if labels is not None else [[]] * len(images)
    return _sheet(images, captions, columns)


def strip(stages: Sequence[StageLike], image: int = 0, original: Image.Image | None = None) -> Image.Image:
    """Return a sheet with one image from coarse to fine, above its token counts (and PSNR if the stages have it).

    Args:
        stages: the stages, coarse to fine.
        image: the index of the image in each stage.
        original: shown last.
    """
    tiles, captions = [], []
    for stage in stages:
        psnr = getattr(stage, "psnr", None)
        tiles.append(stage.images[image])
        caption = several(stage.num_tokens, "token")
        captions.append([caption] if psnr is None else [caption, f"{psnr:.1f} dB"])
    if original is not None:
        tiles, captions = [*tiles, original], [*captions, ["original"]]
    return _sheet(tiles, captions, len(tiles))


def _sheet(images: Sequence[Image.Image], captions: Sequence[Sequence[str]], columns: int) -> Image.Image:
    largest = max((image.size for image in images), key=max)
    scale = max(1, -(-SMALLEST_TILE // max(largest)))
    width, height = scale * largest[0], scale * largest[1]
    column = max(width, LEAST_CAPTION) if any(captions) else width
    row_height = height + LINE * max(map(len, captions)) + GAP
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (column + GAP) + GAP, rows * row_height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + i % columns * (column + GAP), GAP + i // columns * row_height
        tile = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (left + (column - width) // 2, top))
        for line, text in enumerate(caption):
            short = text
            while draw.textlength(short, font) > column and short != "…":
                short = f"{short.removesuffix('…')[:-1]}…"
            middle = (left + column // 2, top + height + LINE // 2 + line * LINE)
            draw.text(middle, short, "black", font, anchor="mm")
    return sheet
