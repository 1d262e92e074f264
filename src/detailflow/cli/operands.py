"""The images that `reconstruct`, `vary` and `encode` are given: files, and sets of them."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detailflow.cli.common import Parser
from detailflow.errors import DetailFlowError, NotThereError
from detailflow.progress import progress_bar
from detailflow.settings import Location, NotNegativeInt, PositiveInt

if TYPE_CHECKING:
    from PIL import Image

    from detailflow.data.source import ImageSource

    Fit = Callable[[Image.Image], Any]
    Reader = Callable[[], Any]
    Tokens = Callable[[Path], Sequence[tuple[str, Any]]]


def add_image_options(parser: Parser, of_a_set: int | None, number: str = "--num", also: str = "") -> None:
    """Add the operand of images, --whole, and `number`: how many of a set are taken.

    Args:
        of_a_set: the default of that; `None` is all.
        number: the option's name.
        also: what else the operand may be.
    """
    images = f"image files, folders of them, parquet, WebDataset{also} or a hub name; the centre square is used"
    parser.option("images", tuple[Location, ...], help=images, metavar="IMAGE")
    parser.option("--whole", bool, help="use the whole image in its own shape")
    each = "images of each folder or set" + (" (default: all)" if of_a_set is None else "")
    parser.option(number, PositiveInt, of_a_set, each, "N")


def add_search_option(parser: Parser) -> None:
    """Add --search, the steps of `DetailFlowTokenizer.encode`'s search."""
    parser.option("--search", NotNegativeInt, 0, "steps of a search for better tokens, such as 10", "STEPS")


class Inputs:
    """The images of operands, read one after the other: `for name, image in inputs`.

    A few images of a set may be unreadable: they are left out.

    Args:
        given: the operands; a file is read now, the images of a set later.
        most: images of each set, evenly spread; `None` is all.
        fit: what is done with each image as soon as it is read.
        number: the option that `most` is from.
        tokens: returns the names and images of a token file, if operands may be such.
    """

    def __init__(
        self,
        given: Sequence[str],
        most: int | None,
        fit: "Fit",
        number: str = "--num",
        tokens: "Tokens | None" = None,
    ) -> None:
        from detailflow.data.source import spread
        from detailflow.files import output_names

        self.given, self.left_out = given, list[DetailFlowError]()
        found: list[tuple[str, Reader]] = []
        stems = _stems(given)
        for operand in progress_bar(given, desc="reading", unit="image"):
            where, total, item = _open(operand, fit, tokens, stems)
            chosen: Iterable[int] = range(total)
            if most is not None and total > most:
                note = f"{where}: {most:,} of its {total:,} images, evenly spread; {number} {total} takes all"
                print(note, file=sys.stderr)
                chosen = spread(total, most)
            found += [item(index) for index in chosen]
        self.names = output_names([name for name, _ in found])
        self._readers = [read for _, read in found]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        from detailflow.data.source import tolerated

        for name, read in zip(self.names, self._readers, strict=True):
            try:
                image = read()
            except DetailFlowError as error:
                self.left_out.append(error)
                if len(self.left_out) > tolerated(len(self.names)) or len(self.left_out) == len(self.names):
                    raise
            else:
                yield name, image

    def check_outputs(self, outputs: Sequence[Path], command: str) -> int:
        """Check that no picture would replace an image that was given, or another file that is not ours.

        Return how many earlier pictures would be replaced.
        """
        from detailflow.pictures import check_ours

        given = {os.path.realpath(path) for path in self.given if os.path.isfile(path)}
        for output in outputs:
            if os.path.realpath(output) in given:
                raise DetailFlowError(f"{output} is one of the images and would be replaced: give another --output")
        return check_ours(outputs, command)

    def report_left_out(self) -> None:
        """Say which images could not be read."""
        for problem in self.left_out:
            print(f"left out: {problem}", file=sys.stderr)


def _stems(files: Sequence[str]) -> dict[str, str]:
    """Return the name of each file without its suffix: cat/0 and dog/0 of a/cat/0.png and a/dog/0.png, else 0."""
    alike: dict[str, list[str]] = {}
    for file in files:
        alike.setdefault(Path(file).stem.casefold(), []).append(file)
    names = {file: Path(file).stem for file in files}
    for several in alike.values():
        folders = {os.path.dirname(os.path.abspath(file)) for file in several}
        if len(folders) > 1:
            with suppress(ValueError):  # on two drives
                home = os.path.commonpath(folders)
                names |= {file: os.path.splitext(os.path.relpath(file, home))[0] for file in several}
    return names


def _open(
    operand: str, fit: "Fit", tokens: "Tokens | None", stems: Mapping[str, str]
) -> "tuple[str, int, Callable[[int], tuple[str, Reader]]]":
    """Return what an operand is called, how many images it has, and the name and reader of each of them."""
    from detailflow.data.folder import MANY
    from detailflow.data.image_files import image_suffixes, load_rgb
    from detailflow.data.images import open_images
    from detailflow.data.source import not_there
    from detailflow.token_files import SUFFIX

    path = Path(operand)
    if tokens is not None and path.suffix.lower() == SUFFIX:
        items = tokens(path)
        return operand, len(items), lambda index: (items[index][0], lambda: items[index][1])
    missing = path.suffix.lower() in image_suffixes() and not os.path.exists(path)
    if missing or (os.path.isfile(path) and path.suffix.lower() not in MANY):
        image = fit(load_rgb(operand))
        return operand, 1, lambda _: (stems[operand], lambda: image)
    try:
        source = open_images(operand)
    except NotThereError as error:
        raise not_there(operand, "an image file") from error
    return source.where, len(source), lambda i: (_name_in(source, i, operand), lambda: fit(source.image(i)))


def _name_in(source: "ImageSource", index: int, given: str) -> str:
    """Name an image of a set: photos/cat/1.jpg of photos is cat-1, row 3 of photos.parquet is photos.parquet-row-3."""
    name = source.name(index)
    if os.path.isdir(given) and os.path.isfile(name):
        return os.path.splitext(os.path.relpath(name, given))[0].replace(os.sep, "-")
    return name.removeprefix(os.path.dirname(given) + os.sep).replace(" ", "-")
