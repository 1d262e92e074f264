"""`detailflow export`: a model as ONNX files, for programs without PyTorch."""

from collections.abc import Sequence
from pathlib import Path

from detailflow.cli.common import MODEL, Parser, check_output
from detailflow.settings import Location


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser(
        "export",
        "[MODEL] --onnx DIR",
        "Write encoder, decoder and decoding step as ONNX files, in float32 and in 8 bits, with a README that says "
        "how to generate images with them.",
    )
    result.option("model", Location, help=f"{MODEL} (default: the shipped one)", metavar="MODEL", nargs="?")
    result.option("--onnx", Path, help="where to write", metavar="DIR", required=True)
    result.option("--tokenizer", Location, metavar="MODEL", help="where the tokenizer is, if not with the model")
    return result


def main(argv: Sequence[str]) -> int:
    """Export and say what was written."""
    args = parser().parse_args(argv)
    check_output(args.onnx)
    from detailflow.export.write import export
    from detailflow.pipeline import DetailFlowPipeline

    pipeline = DetailFlowPipeline.from_pretrained(args.model, device="cpu", tokenizer=args.tokenizer)
    for path in export(pipeline, args.onnx, _title(args.model)):
        size = path.stat().st_size
        print(f"wrote {path} ({size / 1e6:,.3g} MB)" if size >= 1e5 else f"wrote {path} ({size / 1e3:.3g} kB)")
    return 0


def _title(model: str | None) -> str:
    """Return what the README calls the model: never a path of this machine."""
    return "The small model that comes with DetailFlow" if model is None else Path(model).resolve().name
