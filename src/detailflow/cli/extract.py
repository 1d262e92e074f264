"""`detailflow extract`: images to a token store."""

from collections.abc import Sequence

from detailflow.cli.request import read_request
from detailflow.words import several

SUMMARY = (
    "Write the tokens of every image, with and without planted mistakes, to a token store for `detailflow train gpt`."
)


def main(argv: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    from detailflow.distributed import World
    from detailflow.training.config import Extraction
    from detailflow.training.extract import extract

    if request := read_request(Extraction, "extract", SUMMARY, argv):
        store = extract(request.settings, request.output, request.device)
        if World.from_launch().is_main:
            crops = store.info.crops
            print(f"{len(store)} images, {several(crops, 'crop')} each, in {request.output}")
    return 0
