"""The ablation of the paper's table 2 as a recipe: variants, each of which adds something to the one before, trained in turn.

Every stage goes on where it stopped, and stages of equal settings are run once. What each took is kept in times.json.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from detailflow.device import choose_device
from detailflow.errors import DetailFlowError
from detailflow.generation import SamplingConfig
from detailflow.hub import CONFIG_FILE
from detailflow.models.loading import config_from_dict
from detailflow.processes import Processes
from detailflow.runs import RUN_FILE
from detailflow.schedule import require_not_negative, require_positive
from detailflow.seeds import LARGEST_SEED
from detailflow.storage import read_json, read_yaml, replacing, write_json, writing
from detailflow.training.extract import Extraction, extract
from detailflow.training.gpt import GPTTraining, train_gpt
from detailflow.training.teachers import CLASSIFIER, FEATURES_FILE, feature_network, open_source
from detailflow.training.tokenizer import TokenizerTraining, train_tokenizer

TIMES_FILE = "times.json"
MANIFEST_FILE = "manifest.json"  # which a token store ends with
CLASSIFIER_FOLDER = "classifier"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: of its folder, and in the table.
        paper: the row of the paper's table that it stands beside, by its name in `evaluation/published.json`.
        tokenizer, extract, gpt: the settings in which it differs from the variant before it.
    """

    name: str
    paper: str | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    extract: dict[str, Any] = field(default_factory=dict)
    gpt: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name) or self.name == CLASSIFIER_FOLDER:
            raise DetailFlowError(f"a variant's name must be of letters, digits and hyphens, not {self.name!r}")


class Stages(NamedTuple):
    """A variant's stages, whole, and where their results lie: a tokenizer in `extraction.tokenizer`, tokens in `gpt.tokens`."""

    variant: Variant
    tokenizer: TokenizerTraining
    extraction: Extraction
    gpt: GPTTraining
    model: Path  # the AR model's folder

    @property
    def folders(self) -> dict[str, Path]:
        """Of the results, by stage."""
        return {"tokenizer": Path(self.extraction.tokenizer), "extract": Path(self.gpt.tokens), "gpt": self.model}


@dataclass(frozen=True)
class Ablation:
    """An ablation: what all variants share, what each changes, and how all are measured.

    Attributes:
        data, split: the images to train on, as for the stages.
        features: the network whose features distances are measured in: a .safetensors file, "inception" or "dinov2".
        tokenizer, extract, gpt: settings of `detailflow train tokenizer`, `extract` and `train gpt` that all variants share.
        variants: in the table's order.
        test_data, test_split: the images to rebuild; `None` is `data`.
        reference, reference_split: what rebuilt and generated images are compared with; `None` is `data` and its `split`.
        num_reconstructions: so many of the test images, spread over the set; `None` is all.
        num_samples: generated images, for each seed.
        guidance_scales: to sample with each; the best distance stands in the table.
        seeds: of the samples. What stands twice in these two lists counts once.
        batch_size: images at once where they are measured.
    """

    data: str
    features: str
    variants: tuple[Variant, ...]
    tokenizer: dict[str, Any] = field(default_factory=dict)
    extract: dict[str, Any] = field(default_factory=dict)
    gpt: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    test_data: str | None = None
    test_split: str | None = "test"
    reference: str | None = None
    reference_split: str | None = None
    num_reconstructions: int | None = None
    num_samples: int = 5000
    guidance_scales: tuple[float, ...] = (1.5,)
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 250

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: object) -> "Ablation":
        """From plain values, as YAML has them.

        Raises:
            DetailFlowError: for settings of any variant that are unknown, missing or contradict each other, with its name.
        """
        variants = values.get("variants")
        if not isinstance(variants, list | tuple) or not all(isinstance(v, Mapping) for v in variants):
            raise DetailFlowError(f"{source}: variants must be a list, each with a name and the settings that it changes")
        made = tuple(config_from_dict(Variant, v, f"{source}, variant {i}") for i, v in enumerate(variants, 1))
        return config_from_dict(cls, {**values, "variants": made}, source)

    def __post_init__(self) -> None:
        require_positive(num_samples=self.num_samples, batch_size=self.batch_size)
        if self.num_reconstructions is not None:
            require_positive(num_reconstructions=self.num_reconstructions)
        for name, least in (("guidance_scales", "scale"), ("seeds", "seed")):
            values = getattr(self, name)
            if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
                raise DetailFlowError(f"{name} must be a list of numbers, with one {least} at least, not {list(values)}")
            require_not_negative(**{name: min(values)})
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        if bad := [seed for seed in self.seeds if not isinstance(seed, int) or seed > LARGEST_SEED]:
            raise DetailFlowError(f"seeds must be whole numbers, 0 to 2^64 - 1, not {bad[0]!r}")
        for scale in self.guidance_scales:
            SamplingConfig(scale)  # raises
        names = [variant.name for variant in self.variants]
        if not names:
            raise DetailFlowError("variants must have one at least")
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise DetailFlowError(f"two variants have the name {twice}: give each its own")
        self.stages(Path())  # raises

    def stages(self, output: Path) -> list[Stages]:
        """All variants' stages. Stages of equal settings have one folder, that of the first variant with them.

        Raises:
            DetailFlowError: for settings that are unknown, missing or contradict each other.
        """
        places: dict[TokenizerTraining | Extraction | GPTTraining, Path] = {}
        images = {"data": self.data, "split": self.split}
        result = []
        for i, variant in enumerate(self.variants, 1):
            first, second, third = (
                reduce(laid_over, (getattr(v, stage) for v in self.variants[:i]), getattr(self, stage))
                for stage in ("tokenizer", "extract", "gpt")
            )
            source, folder = f"variant {variant.name}", output / variant.name
            tokenizer = config_from_dict(TokenizerTraining, {**first, **images}, source)
            place = places.setdefault(tokenizer, folder / "tokenizer")
            extraction = config_from_dict(Extraction, {**second, **images, "tokenizer": str(place)}, source)
            tokens = places.setdefault(extraction, folder / "tokens")
            gpt = config_from_dict(GPTTraining, {**third, "tokens": str(tokens), "tokenizer": str(place)}, source)
            result.append(Stages(variant, tokenizer, extraction, gpt, places.setdefault(gpt, folder / "gpt")))
        return result


def laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with some replaced."""
    nested = {k: laid_over(base[k], v) for k, v in over.items() if isinstance(v, Mapping) and isinstance(base.get(k), Mapping)}
    return {**base, **over, **nested}


def train_variant(config: Ablation, stages: Stages, output: Path, device: str | None = None) -> None:
    """Train one variant, or what is missing of it.

    Raises:
        DetailFlowError: as the stages do.
    """
    tokenizer, tokens, model = stages.folders.values()
    name = stages.variant.name
    if stages.tokenizer.loop.compile or stages.gpt.loop.compile:
        torch.compiler.reset()  # or the programs of earlier variants would count towards the few that torch keeps
    _share_classifier(config, stages, output, device)
    with timed(output, tokenizer, f"{name}: tokenizer", tokenizer / CONFIG_FILE):
        train_tokenizer(stages.tokenizer, tokenizer, device)
    with timed(output, tokens, f"{name}: tokens", tokens / MANIFEST_FILE):
        extract(stages.extraction, tokens, device)
    if Processes.of_this_launch(cpu=device == "cpu").is_main:
        _find_again(stages)
    with timed(output, model, f"{name}: AR model", model / CONFIG_FILE):
        train_gpt(stages.gpt, model, device)


def _find_again(stages: Stages) -> None:
    """Let the AR model's run, which knows tokens and tokenizer by their paths, follow an output folder that was moved or is now
    called by another name; the same places in it are the same.
    """
    path, mine = stages.model / RUN_FILE, {"tokens": stages.gpt.tokens, "tokenizer": stages.gpt.tokenizer}
    try:
        settings = read_yaml(path)
        theirs = {key: settings[key] for key in mine}
        same = all(Path(theirs[key]).parts[-2:] == Path(mine[key]).parts[-2:] for key in mine)  # variant and stage
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return  # training begins there, or says what is wrong
    if same and theirs != mine:
        with writing(path) as temporary:
            temporary.write_text(yaml.safe_dump({**settings, **mine}, sort_keys=False), encoding="utf-8")


def _classifier_of(config: TokenizerTraining) -> tuple[Any, ...] | None:
    """All that the small feature network of a run depends on; `None` where the run has none."""
    if not any(getattr(config, n) and getattr(config, f"{n}_network") == CLASSIFIER for n in ("perceptual", "alignment")):
        return None
    where = (config.data, config.split, config.image_column, config.label_column, config.streaming)
    crops = (config.model.image_size, config.flip, config.max_scale)
    return (*where, *crops, config.classifier_epochs, config.loop.seed, config.loop.precision)


def _share_classifier(config: Ablation, stages: Stages, output: Path, device: str | None) -> None:
    """Train the small feature network once for all variants in which it is the same as in the first one that has it; it is what
    each would train first.
    """
    settings, place, folder = stages.tokenizer, stages.folders["tokenizer"], output / CLASSIFIER_FOLDER
    mine, processes = _classifier_of(settings), Processes.of_this_launch(cpu=device == "cpu")
    first = next((key for other in config.stages(output) if (key := _classifier_of(other.tokenizer))), None)
    if not processes.any(mine is not None and mine == first and not (place / FEATURES_FILE).exists()):
        return
    source = open_source(settings)
    if len(source.class_names) < 2:
        return  # training says what is wrong
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place.mkdir(parents=True, exist_ok=True)
        with timed(output, folder, "classifier", folder / FEATURES_FILE):
            feature_network(settings, source, folder, choose_device(processes.device or device), processes)
        if processes.is_main:
            with replacing(place / FEATURES_FILE) as path:
                shutil.copyfile(folder / FEATURES_FILE, path)
    except OSError as error:
        raise DetailFlowError(f"cannot write to {output}: {error.strerror or error}") from error
    processes.wait()


class Spent(NamedTuple):
    """What a stage took, in seconds: of all cores together, with processes that it started and that have ended; by the clock."""

    cpu: float
    wall: float
    of: str = ""  # what it was spent on, where that can change


@contextmanager
def timed(output: Path, folder: Path, title: str, finished: Path | None = None, of: str = "") -> Iterator[None]:
    """Add what a stage takes to times.json under its folder, whether it ends or is stopped; nothing where the file `finished` is
    there before.

    Only a process that is killed outright leaves nothing. Of several processes the main one's time counts.

    Args:
        of: what it works on: where that is another than before, its time starts again from 0.

    Raises:
        DetailFlowError: if the file can't be written.
    """
    if not Processes.of_this_launch().is_main or (finished and finished.exists()):
        yield
        return
    print(title)
    cpu, wall = sum(os.times()[:4]), time.monotonic()
    try:
        yield
    finally:
        key, known = str(folder.relative_to(output)), spent(output)
        before = known[key] if key in known and known[key].of == of else Spent(0, 0)
        took = Spent(before.cpu + sum(os.times()[:4]) - cpu, before.wall + time.monotonic() - wall, of)
        write_json(output / TIMES_FILE, {name: value._asdict() for name, value in {**known, key: took}.items()})


def spent(output: Path) -> dict[str, Spent]:
    """What is in times.json, by the stages' folders within `output`."""
    path = output / TIMES_FILE
    return {name: Spent(**value) for name, value in read_json(path).items()} if path.exists() else {}
