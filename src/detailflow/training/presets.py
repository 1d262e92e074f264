"""The settings of tokenizer, extraction and AR model: those of a preset, or to go on from a trained model."""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch

from detailflow import hub
from detailflow.data.source import ImageSource, spread
from detailflow.errors import DetailFlowError, missing_package
from detailflow.labels import UNLABELLED, ClassLabels
from detailflow.models.gpt import GPTConfig
from detailflow.models.tokenizer import TokenizerConfig
from detailflow.plain_yaml import load_yaml
from detailflow.settings import Location, PositiveInt, Settings, parse_settings
from detailflow.training.checkpoints import of_loop, run_folder
from detailflow.training.config import CropSet, Extraction, GPTTraining, TokenizerTraining

Preset = Literal["small-32", "own-64", "own-128", "own-256"]
PRESETS = get_args(Preset)
SIDES = dict(zip(PRESETS, (32, 64, 128, 256), strict=True))
GPU_BYTES = {"own-256": 20 * 2**30, "own-128": 14 * 2**30}  # of a GPU of 24 and of 16 GB, with a margin
LARGEST_ON_CPU = next(name for name in reversed(PRESETS) if name not in GPU_BYTES)
FINE_TUNE = "fine-tune"
LORA_RATE = 1.0e-3  # of thin matrices that begin at zero: ten times what the recipe has for all weights
LOOKED_AT = 64  # images whose headers are read to choose a preset


@dataclass(frozen=True)
class AllStages(Settings):
    """What to train in a row, and from what.

    Attributes:
        data: images, as in `ImageSettings`.
        split: of the data.
        image_column, label_column: of the data, as in `ImageSettings`.
        preset: `None` is chosen by the images' size and the device.
        init: model to start from in place of a preset; its tokenizer stays as it is.
        finetune_decoder: train that tokenizer's decoder, which leaves the tokens as they are.
        lora: rank of the matrices that LoRA trains beside those of the AR model of `init`.
        tokenizer_steps, gpt_steps: in place of the recipe's, or of those that the run was begun with.
        no_flip: train on no mirror images.
        crops: of each image, whose tokens are stored; in place of the recipe's.
    """

    data: Location
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    preset: Preset | None = None
    init: Location | None = None
    finetune_decoder: bool = False
    lora: PositiveInt | None = None
    tokenizer_steps: PositiveInt | None = None
    gpt_steps: PositiveInt | None = None
    no_flip: bool = False
    crops: CropSet | None = None

    @property
    def images(self) -> dict[str, Any]:
        """Which images of the data, as `open_images` takes it."""
        return {"split": self.split, "image_column": self.image_column, "label_column": self.label_column}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset and self.init:
            raise DetailFlowError("--preset and --init exclude each other: with --init the sizes are that model's")
        if self.finetune_decoder and not self.init:
            raise DetailFlowError("--finetune-decoder is for the tokenizer of a trained model: give it as --init")
        if self.lora and not self.init:
            raise DetailFlowError("--lora is for the AR model of a trained model: give it as --init")
        if self.init and self.tokenizer_steps and not self.finetune_decoder:
            raise DetailFlowError(
                "--tokenizer-steps is for a tokenizer that is trained, and that of --init stays as it is: "
                "leave it out, or give --finetune-decoder"
            )


Trained = TypeVar("Trained", TokenizerTraining, GPTTraining)


class StageSettings(NamedTuple):
    """The settings of all stages.

    Attributes:
        tokenizer: `None` if that of `gpt.init` stays as it is.
        sizes: the tokenizer's.
        choice: what was chosen and why, a sentence.
        as_begun: steps that are not the recipe's as the run was begun with others, a sentence for each stage.
    """

    tokenizer: TokenizerTraining | None
    extraction: Extraction
    gpt: GPTTraining
    sizes: TokenizerConfig
    choice: str
    as_begun: Sequence[str] = ()


def load_settings(preset: str, stage: str) -> dict[str, Any]:
    """Return the settings of one stage ("tokenizer", "extract" or "gpt") of a recipe in `recipes/`."""
    return load_yaml((files("detailflow") / "recipes" / preset / f"{stage}.yaml").read_text(encoding="utf-8"))


def tokenizer_sizes(source: str) -> dict[str, Any]:
    """Return the settings that a tokenizer to start from implies."""
    return {"model": asdict(parse_settings(TokenizerConfig, hub.load_config(source, "tokenizer"), source))}


def gpt_sizes(source: str) -> dict[str, Any]:
    """Return the settings that an AR model to start from implies."""
    config = parse_settings(GPTConfig, hub.load_config(source, "gpt"), source)
    sizes = {key: getattr(config, key) for key in ("width", "depth", "heads", "dropout")}
    return sizes | {"sampling": asdict(config.sampling)}


def stage_settings(wanted: AllStages, source: ImageSource, output: Path, device: torch.device) -> StageSettings:
    """Return the settings of all stages, which write to output/tokenizer, output/tokens and output/gpt.

    Args:
        source: the images of `wanted.data`.
        output: what was begun there keeps its preset and its steps.
    """
    images: dict[str, Any] = {"data": wanted.data, **wanted.images}
    if wanted.no_flip:
        images["flip"] = False
    tokenizer, tokens = str(output / "tokenizer"), str(output / "tokens")
    first: dict[str, Any] = {}
    last: dict[str, Any] = {"tokens": tokens, "tokenizer": tokenizer}
    if wanted.init:
        first, last = tokenizer_sizes(wanted.init), gpt_sizes(wanted.init) | last
        recipe, choice = FINE_TUNE, _describe_start(wanted, source, first["model"]["image_size"])
        first["init"] = last["init"] = wanted.init
    else:
        recipe, choice = _preset(wanted, source, output, device)
    settings = last | load_settings(recipe, "gpt")
    if wanted.lora:
        if find_spec("peft") is None:
            raise missing_package("lora", "peft", extra="lora")
        settings["lora"] = wanted.lora
        settings["loop"] |= {"learning_rate": LORA_RATE}
    trained = tokenizer_note = None
    if not wanted.init or wanted.finetune_decoder:
        trained = parse_settings(TokenizerTraining, first | load_settings(recipe, "tokenizer") | images, recipe)
        trained, tokenizer_note = _with_steps(trained, wanted.tokenizer_steps, output / "tokenizer")
    extraction = {**load_settings(recipe, "extract"), **images, "tokenizer": tokenizer}
    if wanted.crops:
        extraction["crops"] = wanted.crops
    gpt, gpt_note = _with_steps(parse_settings(GPTTraining, settings, recipe), wanted.gpt_steps, output / "gpt")
    as_begun = [note for note in (tokenizer_note, gpt_note) if note]
    sizes = trained.model if trained else parse_settings(TokenizerConfig, first["model"], wanted.init)
    return StageSettings(trained, parse_settings(Extraction, extraction, recipe), gpt, sizes, choice, as_begun)


def _with_steps(config: Trained, steps: int | None, folder: Path) -> tuple[Trained, str | None]:
    """Return a stage's settings with the steps that were asked for, or else with those that `folder` was begun with.

    And in the second case a sentence, if they are not the recipe's.
    """
    begun, own, note = of_loop(run_folder(folder).read(), "steps"), config.loop.steps, None
    if not steps and begun and begun != own:
        note = f"{folder}: {begun:,} steps, as it was begun, and not the recipe's {own:,} "
        note += f"(--{folder.name}-steps changes that)"
    return replace(config, loop=replace(config.loop, steps=steps or begun or own)), note


def _describe_start(wanted: AllStages, source: ImageSource, side: int) -> str:
    """Return what is taken from the model to start from, whose images have sides of so many pixels."""
    assert wanted.init
    decoder = "whose decoder is trained" if wanted.finetune_decoder else "as it is"
    decoder = f"its tokenizer of {side}×{side} pixels, {decoder}"
    theirs = parse_settings(GPTConfig, hub.load_config(wanted.init, "gpt"), wanted.init)
    known = ClassLabels(theirs.class_names, theirs.num_classes)
    found = sum(known.find(name) is not None for name in source.class_names)
    classes = f"knows {found:,} of these {len(source.class_names):,} classes by name"
    if source.class_names == UNLABELLED:
        classes = "goes on without classes"
    return f"from {wanted.init}: {decoder}, and its AR model, which {classes}"


def _preset(wanted: AllStages, source: ImageSource, output: Path, device: torch.device) -> tuple[str, str]:
    begun = preset_of(run_folder(output / "tokenizer").read())
    if wanted.preset:
        if begun not in (None, wanted.preset):
            raise DetailFlowError(
                f"{output} holds a run of preset {begun}, not {wanted.preset}: leave --preset out, or choose another "
                "folder"
            )
        choice = f"preset {wanted.preset}, as you asked"
        if not _can_train(wanted.preset, device):
            least = f"{LARGEST_ON_CPU} is the largest for a CPU" if device.type == "cpu" else "this GPU has less"
            choice += f", which is for a GPU of {GPU_BYTES[wanted.preset] / 2**30:.0f} GiB or more: {least}"
        return wanted.preset, choice
    if begun:
        return begun, f"preset {begun}, as it was begun"
    return choose_preset(source, device)


def preset_of(recorded: Mapping[str, Any]) -> str | None:
    """Return the preset that a tokenizer's run was begun with, by the settings that it recorded."""
    model = recorded.get("model")
    side = model.get("image_size") if isinstance(model, Mapping) else None
    return next((name for name in PRESETS if SIDES[name] == side), None)


def choose_preset(source: ImageSource, device: torch.device) -> tuple[str, str]:
    """Return the preset for the size of these images and for this device, and why, as a sentence.

    It is the largest that images of the median size fill at least three quarters of, and that the device can train: a
    CPU up to 64×64, a GPU as its memory allows.
    """
    sides = []
    for index in spread(len(source), min(LOOKED_AT, len(source))):
        with suppress(DetailFlowError):  # training will say so
            sides.append(min(source.size(index)))
    side = statistics.median(sides or [0])
    fitting = [name for name in PRESETS if SIDES[name] * 0.75 <= side] or [PRESETS[0]]
    able = [name for name in fitting if _can_train(name, device)]
    why = f"the images' shorter sides are about {side:,.0f} pixels"
    if able[-1] != fitting[-1]:
        why += f", and {'a CPU is' if device.type == 'cpu' else 'this device is'} too small for more"
    return able[-1], f"preset {able[-1]}, as {why} (--preset chooses another)"


def _can_train(preset: str, device: torch.device) -> bool:
    least = GPU_BYTES.get(preset, 0)
    return not least or (device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= least)
