"""Commands whose settings come from a YAML file, with `--KEY VALUE` in place of any of them: train and extract."""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple

from detailflow.cli.common import Parser, add_device_option, check_apart, check_output, reader
from detailflow.errors import DetailFlowError
from detailflow.settings import Location, Setting, check_settings, checked, flat, list_settings, named, parse_settings
from detailflow.words import unknown

DRY_RUN = "--dry-run"
RECIPES = Path(__file__).parents[1] / "recipes"
ADVICE = " (give them in --config FILE or as --KEY VALUE)"


class Request(NamedTuple):
    """What the user asked for: the settings, where and on what to do it, and whether only to say what it would cost."""

    settings: Any
    output: Path
    device: str | None
    dry_run: bool


def read_request(
    kind: Any,
    command: str,
    summary: str,
    argv: Sequence[str],
    sizes: Callable[[str], dict[str, Any]] | None = None,
    can_plan: bool = False,
) -> Request | None:
    """Return the settings of dataclass `kind` that `argv` gives, or `None` after --help.

    Args:
        sizes: returns what the model that `--init` names says of the settings; files and options go before it.
        can_plan: whether it trains: there is `--dry-run`, which needs no output folder and does not look into it.
    """
    argv = [word for arg in argv for word in (arg.split("=", 1) if arg.startswith("--help=") else [arg])]
    if not argv or "--help" in argv or "-h" in argv:
        after = [*argv[argv.index("-h" if "-h" in argv else "--help") + 1 :], "-"][0] if argv else "-"
        print(
            make_parser(kind, command, summary, can_plan, "" if after.startswith("-") else after).format_help(), end=""
        )
        return None
    given = vars(make_parser(kind, command, summary, can_plan).parse_args(argv))
    files, output, device = given.pop("config"), given.pop("output"), given.pop("device")
    dry_run = given.pop("dry_run", False)
    contents = {path: dict(flat(read_settings_file(recipe_file(path)))) for path in files}
    values = {name: value for content in contents.values() for name, value in content.items()} | given
    if sizes and values.get("init"):
        values = dict(flat(sizes(checked("init", values["init"], Location)))) | values
    try:
        settings = parse_settings(kind, values, advice=ADVICE)
    except DetailFlowError:
        for path, content in contents.items():  # whose mistake is it?
            used = {name: value for name, value in content.items() if values[name] is value}
            with named(f"--config {path}"):
                check_settings(kind, used)
        raise
    for name in ("data", "val_data"):
        if output is not None:
            check_apart(output, getattr(settings, name, None))
    if not dry_run:
        if output is None:
            raise DetailFlowError("the following arguments are required: --output")
        check_output(output, models=can_plan)
    return Request(settings, output or Path(), device, dry_run)


def make_parser(kind: Any, command: str, summary: str, can_plan: bool, page: str = "") -> Parser:
    """Return the parser whose help shows one page: the settings that are not nested, or those that `page` names."""
    parser = Parser(command, "[--config FILE] --output DIR", summary, add_help=False, column=34)
    parser.heading("options")
    recipe = f"own-64/{command.rpartition(' ')[2]}"
    parser.option("--config", Location, [], f"YAML, or a recipe such as {recipe}", "FILE", action="append")
    parser.option("--output", Path, metavar="DIR", help="where to write")
    add_device_option(parser)
    if can_plan:
        parser.option(DRY_RUN, bool, help="only say the cost: memory, time, disk")
    settings = list(list_settings(kind))
    names = [setting.name for setting in settings]
    below = {name: group for name in names if (group := _group(name, names))}
    groups = sorted(set(below.values()))
    about = "this help, or more of a setting" + (f" or of a group: {', '.join(groups)}" if groups else "")
    parser.add("--help", default=argparse.SUPPRESS, metavar="NAME", help=about)
    if page and not any(setting.name.startswith(page) for setting in settings):
        raise DetailFlowError(
            unknown(
                "setting", page, [*groups, *(setting.name for setting in settings)], f"see detailflow {command} --help"
            )
        )
    parser.heading("settings, with their defaults")
    for setting in settings:
        name = f"--{setting.name}"
        parser.add(
            name, dest=setting.name, type=reader(name, setting.type), default=argparse.SUPPRESS,
            metavar=_plain(setting), help=_help(setting, page, setting.name in below),
        )  # fmt: skip
    return parser


def _group(name: str, names: Collection[str]) -> str:
    """Return "loop" of loop.steps, and "perceptual" of perceptual_network if that is a setting, too; "" of others."""
    if "." in name:
        return name.partition(".")[0]
    return next((other for other in names if name.startswith(f"{other}_")), "")


def _help(setting: Setting, page: str, is_below: bool) -> str:
    """Return a setting's documentation for a page about it, the first clause for the first page, or `SUPPRESS`."""
    if page:
        return setting.documentation if setting.name.startswith(page) else argparse.SUPPRESS
    return argparse.SUPPRESS if is_below else setting.documentation.partition(";")[0].rstrip(".")


def _plain(setting: Setting) -> str:
    """Return the default as it would be in YAML, or the name if there is none."""
    if isinstance(setting.default, tuple):
        return f"[{','.join(map(str, setting.default))}]"
    if isinstance(setting.default, bool):
        return str(setting.default).lower()
    return {MISSING: setting.name.rpartition(".")[2].upper(), None: "null"}.get(setting.default, str(setting.default))


def read_settings_file(path: str) -> dict[str, Any]:
    """Return the file's settings; says what is wrong with the file as a whole, and leaves wrong settings to others."""
    import yaml

    from detailflow.files import read_yaml

    try:
        content = read_yaml(path)
    except OSError as error:
        names = sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.glob("*/*.yaml"))
        hint = unknown("recipe", path.removesuffix(".yaml"), names, f"the recipes are {', '.join(names)}")
        missing = f": no such file, and {hint}" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise DetailFlowError(f"--config {path}: this file cannot be read{missing}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", "")).removeprefix("but ")
        line = f" ({problem}, line {where.line + 1})" if where else ""
        raise DetailFlowError(f"--config {path}: this file is not valid YAML{line}") from error
    if not isinstance(content, dict):
        raise DetailFlowError(f"--config {path}: this file must have settings, each as KEY: VALUE")
    ((name, count),) = Counter(name for name, _ in flat(content)).most_common(1) or [("", 0)]
    if count > 1:
        raise DetailFlowError(f"--config {path}: {name} is there twice, nested and with its dotted name")
    return content


def recipe_file(name: str) -> str:
    """Return the path of a settings file: the file of that name, or the recipe, such as imagenet/tokenizer."""
    recipe = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if os.path.exists(name) or not os.path.isfile(recipe):  # os.path, which takes an impossible name for a missing file
        return name
    return str(recipe if recipe.resolve().is_relative_to(RECIPES.resolve()) else name)
