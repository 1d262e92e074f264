"""`detailflow classes`: the classes of a model."""

from collections.abc import Sequence

from detailflow.cli.common import MODEL, Parser
from detailflow.labels import ClassLabels, default_names
from detailflow.settings import Location, parse_settings
from detailflow.words import one_line


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser(
        "classes", "[--search WORD]", "List a model's classes: number, WordNet id if there is one, and names."
    )
    result.option("--search", help="only the classes with WORD in a name", metavar="WORD")
    result.option("--model", Location, help=f"{MODEL} (default: the shipped one)")
    return result


def main(argv: Sequence[str]) -> int:
    """Print a line for each class."""
    args = parser().parse_args(argv)
    labels = _labels(args.model)
    if not labels.count:
        print("this model has no classes: `detailflow generate` takes none")
        return 0
    for i in range(labels.count) if args.search is None else labels.search(args.search):
        number = str(i).rjust(len(str(labels.count - 1)))
        parts = (number, *(wnid.ljust(9) for wnid in labels.wnids[i : i + 1]), *labels.names[i : i + 1])
        print(one_line("  ".join(parts)))
    return 0


def _labels(model: str | None) -> ClassLabels:
    """Return the classes of a model by its config alone, as its weights may be large."""
    from detailflow import hub
    from detailflow.models.gpt import GPTConfig

    if model and hub.zoo_model(model):
        return ClassLabels(default_names(1000), 1000)
    gpt = parse_settings(GPTConfig, hub.load_config(model, "gpt"), model)
    return ClassLabels(gpt.class_names, gpt.num_classes)
