"""`detailflow encode`: images to a file of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detailflow.cli.common import Parser, add_model_options, check_output
from detailflow.cli.operands import Inputs, add_image_options, add_search_option
from detailflow.errors import DetailFlowError
from detailflow.progress import progress_bar
from detailflow.words import several

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from detailflow.models.tokenizer import DetailFlowTokenizer

BATCH_SIZE, SEARCHED = 32, 8  # a search takes long, and what one waits for should be seen to go on


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser(
        "encode",
        "IMAGE …",
        "Write the tokens of images, their names and sizes, and the tokenizer's fingerprint to one .npz file, which "
        "`detailflow decode`, `detailflow vary` and any program with NumPy read.",
    )
    add_image_options(result, None)
    result.option("--num-tokens", int, help="the first N tokens of each image (default: all)", metavar="N")
    add_search_option(result)
    result.option("--output", Path, Path("tokens.npz"), "the file", "FILE")
    add_model_options(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Write the file."""
    args = parser().parse_args(argv)
    check_output(args.output.parent)

    import numpy as np

    from detailflow.models.tokenizer import DetailFlowTokenizer
    from detailflow.pictures import in_place_of
    from detailflow.pipeline import fit
    from detailflow.token_files import SUFFIX, TokenFile, check_replaceable

    if args.output.suffix.lower() != SUFFIX:  # by which `vary` knows such files
        raise DetailFlowError(f"--output must end in {SUFFIX}, not {args.output.name!r}")
    check_replaceable(args.output)
    instead = in_place_of(int(args.output.exists()))
    tokenizer = DetailFlowTokenizer.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    schedule = tokenizer.schedule
    count = schedule.check_count(args.num_tokens, "--num-tokens")
    if args.search:
        schedule.check_all(count, "a search", "--num-tokens")
    inputs = Inputs(args.images, args.num, lambda image: fit(schedule, image, args.whole))
    at_once = SEARCHED if args.search else BATCH_SIZE
    names, sizes, tokens = list[str](), list[tuple[int, int]](), []
    waiting: list[Image.Image] = []
    with progress_bar(desc="encoding", unit="image", total=len(inputs.names)) as bar:
        for name, image in inputs:
            if waiting and (image.size != waiting[0].size or len(waiting) == at_once):
                tokens.append(_encoded(tokenizer, waiting, args.search))
                bar.update(len(waiting))
                waiting = []
            waiting.append(image)
            names.append(name)
            sizes.append((image.height, image.width))
        tokens.append(_encoded(tokenizer, waiting, args.search))
    codes = np.concatenate(tokens)[:, :count]
    TokenFile(codes, np.array(sizes), tuple(names), tokenizer.fingerprint()).write(args.output)
    images = f"{'each of ' * (len(names) > 1)}{several(len(names), 'image')}"
    print(f"wrote {several(count, 'token')} of {images} to {args.output}{instead}")
    inputs.report_left_out()
    return 0


def _encoded(tokenizer: "DetailFlowTokenizer", images: "Sequence[Image.Image]", search: int) -> "np.ndarray":
    from detailflow.pipeline import encode_images

    return encode_images(tokenizer, images, search).cpu().numpy()
