"""Pictures to look at: grids of images, and strips that show one image from coarse to fine. Pillow only."""

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

SMALLEST_TILE = 128  # pixels; smaller images are enlarged to a multiple of their side that is no less
GAP = 4
FONT_SIZE = 12
LINE = 16  # pixels from one line of a caption to the next
MADE_AS = (
    "detailflow"  # the key of a PNG file's text that says which of these it is, and the name that it was written by
)
Made = Literal[
    "sample", "grid", "strip", "comparison", "reconstruction"
]  # by `generate`, the last two by `reconstruct`
_NAMES = re.compile(r"grid\.png|(strip-)?\d{4,}-.*\.png", re.DOTALL)  # of what `generate` writes
_HEAD = 1024  # bytes of a PNG file in which that text is


class StageLike(Protocol):
    """A stage of images from the first tokens, such as `pipeline.Stage`."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def images(self) -> Sequence[Image.Image]: ...


def png_text(made_as: Made, name: str) -> PngInfo:
    """Return what a PNG file says of itself: what we made it as, and by which name."""
    text = PngInfo()
    text.add_text(MADE_AS, f"{made_as} {quote(name)}")
    return text


def made_as(path: Path) -> Made | None:
    """Return what we made a file as; `None` for any other file."""
    made = _mark(path)[0]
    return next((known for known in get_args(Made) if known == made), None)


def _mark(path: Path) -> tuple[str, str]:
    """Return what `png_text` wrote, its name still quoted; nothing for any other file."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return "", ""
    before, found, after = head.partition(f"tEXt{MADE_AS}\0".encode())
    if not found or not head.startswith(b"\x89PNG"):
        return "", ""
    length = int.from_bytes(before[-4:], "big") - len(MADE_AS) - 1
    made, _, name = after[:length].decode("latin-1").partition(" ")
    return made, name


def check_ours(paths: Iterable[Path], command: str) -> None:
    """Check that no file of the user's own would be replaced by one of ours.

    Raises:
        DetailFlowError: if one would, with its name.
    """
    for path in paths:
        if os.path.isfile(path) and made_as(path) is None:  # which takes an impossible name for a missing one
            raise DetailFlowError(f"{path} was not made by `detailflow {command}`: move it, or choose another output")


def is_overview(path: str) -> bool:
    """Return whether a file is a grid or a strip that `generate` or `reconstruct` made, and so no image of a set."""
    name = os.path.basename(path)
    named = name == "grid.png" or name.startswith("strip-") or name.endswith("-strip.png")
    return named and made_as(Path(path)) in ("grid", "strip", "comparison")


def generated(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder that `generate` made, whenever it was; copies under other names are the user's."""
    for path in sorted(folder.iterdir()):
        if (
            _NAMES.fullmatch(path.name)
            and made_as(path) in ("sample", "grid", "strip")
            and _mark(path)[1] == quote(path.name)
        ):
            yield path


def grid(images: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] | None = None) -> Image.Image:
    """Images row by row, each with its label below it.

    Args:
        images: at least one; small ones are enlarged without smoothing, to one common size.
        columns: `None` makes the grid about square, with full rows where that can be.
        labels: one per image, of a line or several.
    """
    columns = columns or _columns(len(images))
    return _lay_out(images, [label.split("\n") for label in labels] if labels is not None else None, columns)


def _columns(count: int) -> int:
    root = math.ceil(math.sqrt(count))
    return next((columns for columns in range(root, 2 * root) if count % columns == 0), root)


def strip(stages: Sequence[StageLike], image: int = 0, original: Image.Image | None = None) -> Image.Image:
    """One image from coarse to fine, side by side, with token counts (and PSNR where a stage has it) below.

    Args:
        stages: the stages, whose images are enlarged without smoothing, to one common size.
        image: which image of the stages.
        original: shown last, where there is one.
    """
    tiles = [stage.images[image] for stage in stages]
    captions = [_caption(stage) for stage in stages]
    if original is not None:
        tiles, captions = [*tiles, original], [*captions, ["original"]]
    return _lay_out(tiles, captions, len(tiles))


def _caption(stage: StageLike) -> list[str]:
    lines = [f"{stage.num_tokens} token{'s' if stage.num_tokens > 1 else ''}"]
    psnr = getattr(stage, "psnr", None)
    return lines if psnr is None else [*lines, f"{psnr:.1f} dB"]


def _lay_out(images: Sequence[Image.Image], captions: Sequence[Sequence[str]] | None, columns: int) -> Image.Image:
    largest = max((image.size for image in images), key=max)
    scale = max(1, -(-SMALLEST_TILE // max(largest)))
    width, height = scale * largest[0], scale * largest[1]
    below = LINE * max(map(len, captions)) if captions else 0
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + below + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for i, image in enumerate(images):
        left, top = GAP + i % columns * (width + GAP), GAP + i // columns * (height + below + GAP)
        sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top))
        for line, text in enumerate(captions[i] if captions else ()):
            place = (left + width // 2, top + height + LINE // 2 + line * LINE)
            draw.text(place, _shortened(text, width, draw, font), "black", font, anchor="mm")
    return sheet


def _shortened(
    text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """`text`, cut where it is wider than `width` pixels."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}…", font) > width:
        text = text[:-1]
    return f"{text}…"
