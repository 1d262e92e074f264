"""What report.html says in words and commands; the figures come from run_report."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path

FEW_CROPS, FEW_PASSES = 10_000, 2  # with fewer of either a training has hardly begun, and no sample is an image
POOR_PSNR = 16.0  # dB of reconstructions from all tokens, below which samples are not images either
TOKENIZER, GPT, OUTPUT = "--tokenizer-steps", "--gpt-steps", "--output"
WORDS = (
    ("tokenizer", "the model that turns an image into tokens, and tokens into an image"),
    (
        "tokens",
        "the short list of numbers that stands for an image; the first say what is coarse, the later add detail",
    ),
    ("AR model", "autoregressive: the model that writes the tokens of a new image, one group after the other"),
    ("reconstruction", "an image that became tokens and then an image once more; samples cannot be sharper than these"),
    ("PSNR", "how close a reconstruction is to its image, in decibels (dB): 3 dB more is half the squared error"),
    ("held out", "never trained on, so that one sees what the models do with images that are new to them"),
    ("loss", "what training makes smaller; compare it only with that of the same model on the same images"),
    ("val_…", "the same figure of held-out images (validation); val_loss is the one to watch for the AR model"),
    ("accuracy", "share of tokens whose likeliest code is the right one: 0.03, three percent, or less is usual"),
    ("exported step", "the step whose weights are the model: that of the lowest val_loss, or the last one"),
    ("passes", "how often training saw each image"),
)


def hardly_trained(crops: int, images: int) -> bool:
    """Return whether a training that saw so many crops of so many images has hardly begun."""
    return crops < max(FEW_CROPS, FEW_PASSES * images)


def with_options(command: str, options: Mapping[str, str | None]) -> str:
    """Return a command with other values of its options; `None` leaves an option out."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        name, equals, _ = word.partition("=")
        if name.replace("_", "-") not in options:
            kept.append(word)
        elif not equals:
            next(words, None)  # its value
    given = [part for option, value in options.items() if value is not None for part in (option, value)]
    return shlex.join([*kept, *given])


def longer_tokenizer(
    command: str, output: Path, images: int, batch_size: int, short_gpt: bool, usual_steps: int = 0
) -> str:
    """Return the command that trains a tokenizer for long enough, into a folder of its own.

    Args:
        usual_steps: the preset's own; if they are enough, it is those.
    """
    steps = math.ceil(2 * max(FEW_CROPS, FEW_PASSES * images) / batch_size / 100) * 100
    chosen = None if steps <= usual_steps else str(steps)
    options: dict[str, str | None] = {OUTPUT: f"{output}-longer", TOKENIZER: chosen}
    return with_options(command, options | ({GPT: None} if short_gpt else {}))  # the preset's own length


def uses(model: str, data: str, image_column: str) -> list[tuple[str, str]]:
    """Return (what it does, command) for what one does with a model."""
    model, data = shlex.quote(model), shlex.quote(data)
    if image_column != "image":
        data += f" --image-column {shlex.quote(image_column)}"
    return [
        ("New images", f"detailflow generate --model {model} --num 4 --progressive"),
        ("Variations of an image of yours", f"detailflow vary photo.jpg --model {model}"),
        ("An image of yours as tokens, and back", f"detailflow reconstruct photo.jpg --model {model}"),
        ("A page to play with it, and an HTTP service (pip install '.[serve]')", f"detailflow serve --model {model}"),
        (
            "Measure reconstructions, without a download; best of images that were not trained on",
            f"detailflow evaluate tokenizer --data {data} --model {model} --features efficientnet-lite0 --lpips none"
            " --output reports/tokenizer",
        ),
        ("The model alone, for another machine", f"detailflow convert {model} --output my-model"),
    ]
