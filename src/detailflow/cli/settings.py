"""Commands whose settings come from a YAML file, with `--key value` in place of any of them: train and extract."""

import argparse
import itertools
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from detailflow.cli.common import check_output, expanded, expanded_path, unknown
from detailflow.errors import DetailFlowError

DRY_RUN = "--dry-run"
RECIPES = Path(__file__).parents[1] / "recipes"


class Request(NamedTuple):
    """What the user asked for: the settings, where and on what to do it, and whether only to say what it would cost."""

    settings: Any
    output: Path
    device: str | None
    dry_run: bool


def parse(
    kind: type,
    command: str,
    summary: str,
    argv: Sequence[str],
    sizes: Callable[[str], dict[str, Any]] | None = None,
    can_plan: bool = False,
) -> Request | None:
    """Settings of dataclass `kind` from `argv`; `None` after `--help`.

    Args:
        sizes: what the model that `--init` names says of the settings; files and options go before it.
        can_plan: whether there is `--dry-run`, which needs no output folder and does not look at it.

    Raises:
        DetailFlowError: for a file that cannot be read, an unknown key, a value that is wrong or missing, or an output folder
            that cannot be written to.
    """
    if not argv or "--help" in argv or "-h" in argv:
        print(help_text(kind, command, summary, can_plan), end="")
        return None

    from jsonargparse import ArgumentParser

    dry_run = can_plan and DRY_RUN in argv
    if dry_run:
        argv = [item for item in argv if item != DRY_RUN]
    parser = ArgumentParser(exit_on_error=False, default_env=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--output", type=expanded_path)
    parser.add_argument("--device", type=str)
    parser.add_class_arguments(kind, fail_untyped=True, sub_configs=False)
    argv = _with_recipes(argv)
    files = [read_settings_file(path) for path in _values(argv, "--config")]
    init = ([content.get("init") for content in files] + _values(argv, "--init"))[-1:]  # what is given last counts
    if sizes and init and init[0] not in (None, "", "null"):
        parser.set_defaults(dict(_flat(sizes(str(init[0])))))
    try:
        namespace = parser.parse_args(list(argv))
        output = namespace.pop("output")
        device = namespace.pop("device")
        namespace.pop("config")
        for key, value in list(namespace.items()):
            namespace[key] = expand_values(value)
        settings = kind(**vars(parser.instantiate(namespace)))
    except DetailFlowError:
        raise
    except (argparse.ArgumentError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise DetailFlowError(explain(kind, command, str(error), can_plan)) from error
    if not dry_run:
        if output is None:
            raise DetailFlowError("--output is missing: the folder to write to")
        check_output(output)
    return Request(settings, output or Path(), device, dry_run)


def read_settings_file(path: str) -> dict[str, Any]:
    """The file's settings; says what is wrong with a file as a whole, by its name, and leaves wrong settings to others."""
    import yaml

    from detailflow.files import read_yaml

    try:
        content = read_yaml(expanded_path(path))
    except OSError as error:
        raise DetailFlowError(f"--config {path}: this file cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise DetailFlowError(f"--config {path}: this file is not valid YAML{line}") from error
    if not isinstance(content, dict):
        raise DetailFlowError(f"--config {path}: this file must hold settings, each as KEY: VALUE")
    return content


def recipe_file(name: str) -> str:
    """Return the path of a settings file: the file itself, or the recipe of that name in the package, as imagenet/tokenizer."""
    path, recipe = expanded_path(name), RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if os.path.exists(path) or not os.path.isfile(recipe):  # os.path, which takes an impossible name for a missing file
        return str(path)
    return str(recipe if recipe.resolve().is_relative_to(RECIPES.resolve()) else path)


def _with_recipes(argv: Sequence[str]) -> list[str]:
    """Return the words with the path of its file in place of each value of --config."""
    result = [f"--config={recipe_file(item[9:])}" if item.startswith("--config=") else item for item in argv]
    return [recipe_file(item) if i and result[i - 1] == "--config" else item for i, item in enumerate(result)]


def expand_values(values: Any) -> Any:
    """Return settings, one or nested, with `~` expanded in every text: each may be a path, and nothing else begins so."""
    if isinstance(values, Mapping):
        return {key: expand_values(value) for key, value in values.items()}
    return expanded(values) if isinstance(values, str) else values


def _values(argv: Sequence[str], option: str) -> list[str]:
    after = [value for flag, value in itertools.pairwise(argv) if flag == option]
    return after + [item.partition("=")[2] for item in argv if item.startswith(f"{option}=")]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting in nested ones."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def keys(kind: type, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted name, default or MISSING) of every setting."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            yield from keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.default


def help_text(kind: type, command: str, summary: str, can_plan: bool = False) -> str:
    """A page that names every setting with its default."""
    named = [name if default is MISSING else f"{name}={_plain(default)}" for name, default in keys(kind)]
    settings = textwrap.fill("  ".join(named), 78, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    plan = f"  {DRY_RUN}        only say what the run will cost: memory, time, disk\n" if can_plan else ""
    return (
        f"usage: detailflow {command} --config FILE --output DIR [options]\n\n"
        f"{textwrap.fill(summary, 78)}\n\n"
        "options:\n"
        "  --config FILE    settings in YAML, or a recipe such as own-64/tokenizer\n"
        "  --output DIR     where to write\n"
        "  --device DEVICE  cpu, cuda, cuda:1, … (default: the GPU where there is one)\n"
        f"{plan}"
        "  --KEY VALUE      a setting in place of the file's, such as --loop.steps 1000\n\n"
        f"settings (with their defaults):\n{settings}\n"
    )


def _plain(value: Any) -> str:
    """As it would stand in YAML."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value)


def explain(kind: type, command: str, message: str, can_plan: bool = False) -> str:
    """One sentence out of jsonargparse's message."""
    text = " ".join(message.split())
    if match := re.search(r"(?:Option |option |arguments: )'?(?:--)?([\w.-]+)'?", text):
        options = ["--config", "--output", "--device", "--max-pixels", *([DRY_RUN] if can_plan else [])]
        return unknown(
            "setting", match[1], [*options, *(name for name, _ in keys(kind))], f"see detailflow {command} --help"
        )
    if match := re.search(r"required: (.*)", text):
        return f"settings are missing: {match[1]} (give them in --config FILE or as --KEY VALUE)"
    if match := re.search(r'Parser key "([\w.]+)": (.*)', text):
        problem = re.sub(r"Expected an? <class '(\w+)'>\. Got value: (.*)", r"it must be \1, not \2", match[2])
        return f"setting {match[1]} is wrong: {problem}"
    return text
