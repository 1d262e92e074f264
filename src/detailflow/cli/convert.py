"""`detailflow convert`: models from the published layout to ours and back."""

from collections.abc import Sequence
from typing import Literal

from detailflow.cli.common import DTYPES, MODEL, Dtype, Parser, add_output_option, check_output
from detailflow.settings import Location


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser(
        "convert",
        "SOURCE",
        "Write a model, or a tokenizer and its AR model, as safetensors or in the published layout.",
    )
    result.option("source", Location, help=f"{MODEL}, or a checkpoint (.pt)", metavar="SOURCE")
    add_output_option(result)
    result.option("--to", Literal["detailflow", "published"], "detailflow", "layout: detailflow or published", "LAYOUT")
    result.option("--dtype", Dtype, help=f"one of {', '.join(DTYPES)} (default: as it is)", metavar="TYPE")
    variant = "weights of an AR model: ema or model"
    result.option("--variant", Literal["ema", "model"], "ema", variant, "VARIANT")
    result.option("--shard-size", default="5GB", help="largest safetensors file", metavar="SIZE")
    return result


def main(argv: Sequence[str]) -> int:
    """Convert and say what was written."""
    args = parser().parse_args(argv)
    check_output(args.output, models=True)

    import torch

    from detailflow.convert import convert
    from detailflow.published import CONFIG_FILE, KIND_NAMES

    dtype = getattr(torch, args.dtype) if args.dtype else None
    before = {
        path for path in (args.output, args.output / "tokenizer", args.output / "gpt") if (path / CONFIG_FILE).exists()
    }
    written = convert(
        args.source, args.output, to=args.to, dtype=dtype, variant=args.variant, shard_size=args.shard_size
    )
    for kind, path in written.items():
        files = [*path.glob("model*.safetensors")] if args.to == "detailflow" else [*path.glob("checkpoints/*.pt")]
        instead = ", in place of the model that was there" if path in before else ""
        print(
            f"wrote {KIND_NAMES[kind]} to {path} ({sum(file.stat().st_size for file in files) / 1e6:.1f} MB){instead}"
        )
    return 0
