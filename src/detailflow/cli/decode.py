"""`detailflow decode`: a file of tokens to images."""

from collections.abc import Sequence
from pathlib import Path

from detailflow.cli.common import Parser, add_model_options, add_output_option, check_output
from detailflow.errors import DetailFlowError
from detailflow.progress import progress_bar
from detailflow.words import several


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser(
        "decode",
        "FILE",
        "Make images of the tokens in a file of `detailflow encode`: NAME-N-tokens.png for each, at the size that its "
        "first N tokens show. Put FILE before --num-tokens, which takes all numbers that follow.",
    )
    result.option("file", Path, help="the token file", metavar="FILE")
    counts = "the first N tokens of each image; several numbers give several images (default: all in the file)"
    result.option("--num-tokens", tuple[int, ...], help=counts, metavar="N")
    result.option("--full-size", bool, help="enlarge images of fewer tokens to the full size")
    add_output_option(result)
    add_model_options(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Write the images."""
    args = parser().parse_args(argv)
    check_output(args.output)

    import torch
    from PIL import Image

    from detailflow.files import output_names
    from detailflow.models.tokenizer import DetailFlowTokenizer
    from detailflow.pictures import check_ours, in_place_of, write_png
    from detailflow.pipeline import decode_images
    from detailflow.token_files import TokenFile

    file = TokenFile.read(args.file)
    tokenizer = DetailFlowTokenizer.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    schedule, most = tokenizer.schedule, file.tokens.shape[1]
    file.check_fits(args.file, tokenizer.fingerprint(), schedule, tokenizer.config.codebook_size)
    counts = sorted({schedule.check_count(n, "--num-tokens") for n in args.num_tokens or [most]})
    if counts[-1] > most:
        raise DetailFlowError(f"--num-tokens must be at most the {most} tokens of {args.file}, not {counts[-1]}")
    names = output_names(file.names)
    paths = {(i, n): args.output / f"{name}-{n}-tokens.png" for i, name in enumerate(names) for n in counts}
    earlier = check_ours(paths.values(), "decode")
    for (i, n), path in progress_bar(paths.items(), desc="decoding", unit="image"):
        height, width = file.sizes[i].tolist()
        ids = torch.from_numpy(file.tokens[i : i + 1, :n])
        (image,) = decode_images(tokenizer, ids, schedule.decode_shape(n, height, width))
        if args.full_size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        write_png(image, path, "decoded")
    print(f"wrote {several(len(paths), 'image')} to {args.output}{in_place_of(earlier)}")
    return 0
