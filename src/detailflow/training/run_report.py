"""The page that training all in a row ends with, report.html: what was trained on what, and what came of it."""

import base64
import io
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from detailflow.data.notes import describe_amount
from detailflow.data.source import ImageSource, spread
from detailflow.data.tokens import TokenStore
from detailflow.distributed import World
from detailflow.errors import DetailFlowWarning, first_line
from detailflow.files import writing
from detailflow.labels import ClassId
from detailflow.pipeline import (
    BATCH_SIZE,
    DetailFlowPipeline,
    decode_images,
    encode_images,
    enlarged,
    fit,
)
from detailflow.progress import progress_bar
from detailflow.published import CONFIG_FILE
from detailflow.runs import BEST, checkpoints, step_of
from detailflow.training.checkpoints import of_loop, run_folder
from detailflow.training.extract import image_names
from detailflow.training.nearest import Neighbours, embed_images, find_nearest, load_embedding, readable, verdict
from detailflow.training.presets import load_settings, preset_of
from detailflow.training.run_report_text import (
    GPT,
    POOR_PSNR,
    WORDS,
    hardly_trained,
    longer_tokenizer,
    uses,
    with_options,
)
from detailflow.training.stage_report import TITLES, command_line, curve_png
from detailflow.training.tracking import Record, read_history
from detailflow.words import printable, several

_log = logging.getLogger(__name__)
PAGE_FILE, TEMPLATE = "report.html", "run_report.jinja"
SAMPLES, CLASSES = 40, 10  # samples at most, spread over so many classes at most
ACROSS = 8  # pictures beside each other; classes with fewer have half as many
RECONSTRUCTED, MEASURED = 6, 64  # images that are shown, and that PSNR is the mean of
COMPARED, AMONG = 200, 10_000  # held-out images, and the training images that they and the samples are compared with
PAIRS, NEIGHBOURS = 4, 3  # of the samples nearest to a training image, and of each one's nearest images, shown
LOSSLESS_SIDE = 64  # pixels of the largest pictures that are PNG files; larger ones are JPEG
CURVES, FEWEST_POINTS = ("loss", "psnr", "accuracy"), 5  # what is drawn, and how much of it there must be
LIGHT, DARK = "#33373d", "#c9ced6"  # lines and text of the curves


def write_run_report(
    output: Path, source: ImageSource, data: str, device: str | None = None, image_column: str = "image"
) -> None:
    """Write report.html into the folder of a tokenizer, its tokens and their AR model, for their reader.

    The run is finished by then, so a report that fails is a warning.

    Args:
        source: the images that were trained on, those that were held out among them.
        data: what the user called them.
        image_column: the column of the data that has them.
    """
    world, path = World.from_launch(cpu=device == "cpu"), output / PAGE_FILE
    if world.is_main:
        try:
            page = _Run(output, source, data, image_column, world.device or device).page()
            with writing(path) as temporary:
                temporary.write_text(page, encoding="utf-8")
            _log.info("%s: what came of it", path)
        except Exception as error:  # whatever it is, nothing of the run is lost
            text = f"{path} could not be made ({first_line(error)})"
            text += "; the models are finished, and the same command makes it again"
            warnings.warn(printable(text), DetailFlowWarning, stacklevel=2)
    world.barrier()  # or the launcher, seeing one gone, would end the one that still writes


class Tile(NamedTuple):
    """A picture of the page, and what is written below it."""

    picture: str  # a data URI
    caption: str = ""
    alternative: str = ""


class Group(NamedTuple):
    """A row of pictures under its title."""

    title: str
    tiles: Sequence[Tile]


class Table(NamedTuple):
    """A small table; the first row is its header."""

    rows: Sequence[Sequence[str]]
    note: str = ""


def data_uri(image: Image.Image) -> str:
    """Return an image as a data URI: PNG if it is small, else JPEG."""
    buffer, lossless = io.BytesIO(), max(image.size) <= LOSSLESS_SIDE
    image.convert("RGB").save(buffer, **({"format": "PNG"} if lossless else {"format": "JPEG", "quality": 90}))
    return _embedded(buffer.getvalue(), "png" if lossless else "jpeg")


def _embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Stage:
    """One of the two trainings, as its folder tells it."""

    kind: str  # "tokenizer" or "gpt"
    folder: Path

    @cached_property
    def history(self) -> list[dict[str, float]]:
        """What it logged; nothing if the model was taken as it is."""
        return read_history(self.folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its settings, {} if the model was taken as it is."""
        return run_folder(self.folder).read()

    @property
    def steps(self) -> int:
        """The steps that it took, 0 if there were none here; a run that stops early logs its last one, too."""
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def images(self) -> int:
        """How many images it saw in all, each as often as it came."""
        return self.steps * of_loop(self.settings, "batch_size")

    def is_short(self, images: int) -> bool:
        """Return whether it has hardly been trained here, on so many images, and not elsewhere before."""
        return self.steps > 0 and not self.settings.get("init") and hardly_trained(self.images, images)

    @property
    def best(self) -> tuple[int, Record]:
        """The step whose model was exported, and what was logged of it."""
        found = checkpoints(self.folder, BEST)
        step = step_of(found[0]) if found else self.steps
        return step, {key: value for record in self.history if record["step"] == step for key, value in record.items()}

    @property
    def seconds(self) -> float:
        """How long its steps took, by the logged speed; validation, pictures and checkpoints are not in it."""
        per_step, before, total = self.images / max(self.steps, 1), 0.0, 0.0
        for record in self.history:
            if speed := record.get("images_per_second"):
                total += (record["step"] - before) * per_step / speed
                before = record["step"]
        return total


class _Run:
    """A finished run, and the parts of its page."""

    def __init__(
        self, output: Path, source: ImageSource, data: str, image_column: str, device: torch.device | str | None
    ) -> None:
        self.output, self.source, self.data, self.image_column = output, source, data, image_column
        self.stages = [Stage(kind, output / kind) for kind in ("tokenizer", "gpt")]
        self.pipe = DetailFlowPipeline.from_pretrained(output, device=device)
        self.size = self.pipe.tokenizer.config.image_size
        store = TokenStore.open(output / "tokens").validation
        names = set(store.ids()) if store else set()
        unseen = [name in names for name in image_names(source, data)]
        self.held = [index for index, is_held in enumerate(unseen) if is_held]
        self.trained = [index for index, is_held in enumerate(unseen) if not is_held]

    def page(self) -> str:
        """Return the page; all that comes from users is escaped in it."""
        from jinja2 import Environment, StrictUndefined

        template = files("detailflow.training").joinpath(TEMPLATE).read_text(encoding="utf-8")
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        finished = time.gmtime((self.output / "gpt" / CONFIG_FILE).stat().st_mtime)
        samples, groups = self._samples()
        reconstructions, psnr = self._reconstructions()
        memory = self._memory(samples, self._unfinished(psnr))
        return environment.from_string(template).render(
            title=printable(self.output.resolve().name),
            finished=time.strftime("%Y-%m-%d %H:%M UTC", finished),
            summary=self.source.summary,
            cards=self._cards(),
            expectations=expectations(len(self.trained), self.stages),
            samples=groups,
            reconstructions=reconstructions,
            are_held=bool(self.held),
            psnr=psnr,
            figures=self._figures(psnr, memory),
            curves=self._curves(),
            commands=self._commands(),
            small=self.size <= LOSSLESS_SIDE,
            words=WORDS,
            **memory,
        )

    def _cards(self) -> list[tuple[str, str]]:
        """Return figures in a few words: (figure, what it is of)."""
        model, gpt = self.pipe.tokenizer.config, self.pipe.gpt.config
        minutes = sum(stage.seconds for stage in self.stages) / 60
        return [
            (f"{len(self.trained):,}", f"training images, {len(self.held):,} more held out"),
            (f"{gpt.num_classes:,}" if gpt.num_classes else "no", "class" if gpt.num_classes == 1 else "classes"),
            (
                f"{model.image_size}×{model.image_size}",
                f"pixels, as {model.num_tokens} tokens of {model.codebook_size:,}",
            ),
            (_millions(self.pipe.tokenizer), "parameters of the tokenizer"),
            (_millions(self.pipe.gpt), "parameters of the AR model"),
            (f"{minutes:.0f} min" if minutes >= 1 else f"{60 * minutes:.0f} s", "in training steps"),
        ]

    def _samples(self) -> tuple[list[tuple[int, Image.Image]], list[Group]]:
        """Generate some images of some classes; return (class, image) of each, and a row for each class."""
        number = len(self.pipe.labels.ids)
        classes = spread(number, min(CLASSES, number))
        count = max(SAMPLES // len(classes) // ACROSS * ACROSS, ACROSS // 2)
        pictures = self.pipe([ClassId(label) for label in classes], num_images_per_class=count, seed=0)
        samples = [(classes[i // count], picture) for i, picture in enumerate(pictures)]
        return samples, [
            Group(
                self.pipe.class_name(label),
                [Tile(data_uri(x), alternative=self.pipe.class_name(label)) for c, x in samples if c == label],
            )
            for label in classes
        ]

    def _reconstructions(self) -> tuple[list[Group], Table]:
        """Reconstruct held-out images, or training images if none are held out, from more and more tokens."""
        tokenizer, among = self.pipe.tokenizer, self.held or self.trained
        counts = tokenizer.schedule.stages()
        chosen = list(readable(self.source, [among[i] for i in spread(len(among), min(MEASURED, len(among)))]))
        originals = [fit(tokenizer.schedule, image) for _, image in chosen]
        columns: list[list[tuple[Image.Image, float]]] = [[] for _ in counts]
        for start in range(0, len(originals), BATCH_SIZE):
            batch = originals[start : start + BATCH_SIZE]
            ids = encode_images(tokenizer, batch)
            for n, column in zip(counts, columns, strict=True):
                column += map(enlarged, decode_images(tokenizer, ids[:, :n]), batch)
        groups = []
        for i in spread(len(originals), min(RECONSTRUCTED, len(originals))):
            name = self.source.class_names[self.source.labels[chosen[i][0]]]
            tiles = [
                Tile(data_uri(column[i][0]), f"{n}\n{column[i][1]:.1f} dB", f"{name} from {n} of its tokens")
                for n, column in zip(counts, columns, strict=True)
            ]
            groups.append(Group(name, [Tile(data_uri(originals[i]), name, name), *tiles]))
        means = [sum(value for _, value in column) / len(column) for column in columns]
        which = "held-out" if self.held else "training"
        return groups, Table(
            [["tokens", *map(str, counts)], ["PSNR, dB", *(f"{mean:.2f}" for mean in means)]],
            f"Mean over {several(len(originals), f'{which} image')}.",
        )

    def _unfinished(self, psnr: Table) -> str:
        """Return why samples cannot be images yet, "" if there is no such reason."""
        for stage in self.stages:
            if stage.is_short(len(self.trained)):
                return f"the {TITLES[stage.kind]} has hardly been trained"
        final = psnr.rows[1][-1]
        return f"reconstructions are at {final} dB only" if float(final) < POOR_PSNR else ""

    def _memory(self, samples: Sequence[tuple[int, Image.Image]], unfinished: str) -> dict[str, Any]:
        """Compare samples and held-out images with the training images."""
        what, embed = load_embedding(self.pipe.device)
        trained = [self.trained[i] for i in spread(len(self.trained), min(AMONG, len(self.trained)))]
        indices: list[int] = []

        def read() -> Any:
            for index, image in progress_bar(readable(self.source, trained), desc="nearest images", total=len(trained)):
                indices.append(index)
                yield image

        among = embed_images(read(), self.size, embed)

        def nearest(images: Sequence[Image.Image]) -> Neighbours:
            return find_nearest(list(images), among, NEIGHBOURS, self.size, embed)

        def pairs(titles: Sequence[str], images: Sequence[Image.Image], found: Neighbours) -> list[Group]:
            """Return a row for each image that is nearest to a training image: it, and its nearest ones."""
            rows = []
            for i in found.distances[:, 0].sort(stable=True).indices[:PAIRS].tolist():
                tiles = [Tile(data_uri(fit(self.pipe.tokenizer.schedule, images[i])), titles[i], titles[i])]
                for distance, j in zip(found.distances[i].tolist(), found.indices[i].tolist(), strict=True):
                    picture = fit(self.pipe.tokenizer.schedule, self.source.image(indices[j]))
                    tiles.append(Tile(data_uri(picture), f"{distance:.3f}", self.source.name(indices[j])))
                rows.append(Group(titles[i], tiles))
            return rows

        held = list(
            readable(self.source, [self.held[i] for i in spread(len(self.held), min(COMPARED, len(self.held)))])
        )
        of_samples = nearest([image for _, image in samples])
        of_held = nearest([image for _, image in held]) if held else None
        names = [self.source.class_names[self.source.labels[index]] for index, _ in held]
        distances = {"samples": of_samples.distances[:, 0]}
        if of_held:
            distances["held-out images"] = of_held.distances[:, 0]
        rows = [[f"{len(x):,} {name}", *(f"{v:.3f}" for v in _spread_of(x))] for name, x in distances.items()]
        return {
            "compared_by": what,
            "among": "" if len(trained) == len(self.trained) else f"{len(trained):,} of the {len(self.trained):,} ",
            "verdict": verdict(of_samples.distances[:, 0], of_held.distances[:, 0] if of_held else None, unfinished),
            "dots": _dots(distances),
            "distances": Table([["distance to the nearest", "lowest", "median", "highest"], *rows]),
            "sample_pairs": pairs(
                [self.pipe.class_name(label) for label, _ in samples], [x for _, x in samples], of_samples
            ),
            "held_pairs": pairs(names, [x for _, x in held], of_held) if of_held else [],
        }

    def _figures(self, psnr: Table, memory: dict[str, Any]) -> Table:
        """Return what was logged of the exported models, and what this page measured."""
        rows = [["figure", "tokenizer", "AR model"]]
        bests = [stage.best for stage in self.stages]
        rows.append(["steps", *(f"{stage.steps:,}" if stage.steps else "none here" for stage in self.stages)])
        rows.append(["passes over the images", *(f"{x.images / max(len(self.trained), 1):.1f}" for x in self.stages)])
        rows.append(["exported step", *(f"{step:,}" if step else "–" for step, _ in bests)])
        for name in ("val_loss", "val_psnr", "val_accuracy", "loss"):
            if any(name in record for _, record in bests):
                rows.append([name, *(f"{record[name]:.4g}" if name in record else "–" for _, record in bests)])
        rows.append(["minutes in training steps", *(f"{stage.seconds / 60:.1f}" for stage in self.stages)])
        note = f"PSNR from all {psnr.rows[0][-1]} tokens: {psnr.rows[1][-1]} dB. "
        note += "Median distance to the nearest training image: "
        note += ", ".join(f"{row[2]} of {row[0]}" for row in memory["distances"].rows[1:])
        return Table(rows, f"{note}.")

    def _curves(self) -> list[tuple[str, str, str]]:
        """Return (title, light, dark) of each curve."""
        if find_spec("matplotlib") is None:
            return []
        found = []
        for stage in self.stages:
            for name in CURVES:
                if sum(name in record for record in stage.history) >= FEWEST_POINTS:
                    light, dark = (_embedded(curve_png(stage.history, name, ink), "png") for ink in (LIGHT, DARK))
                    found.append((f"{TITLES[stage.kind]}: {name}", light, dark))
        return found

    def _commands(self) -> list[tuple[str, str]]:
        """Return (what it does, command) for what a reader may want next."""
        found, command = [], command_line()
        tokenizer, gpt = self.stages
        if command:
            found.append(("This run, and this page once more", command))
            if tokenizer.is_short(len(self.trained)):
                batch, short_gpt = of_loop(tokenizer.settings, "batch_size"), gpt.is_short(len(self.trained))
                preset = preset_of(tokenizer.settings)
                usual = load_settings(preset, "tokenizer")["loop"]["steps"] if preset else 0
                text = longer_tokenizer(command, self.output, len(self.trained), batch, short_gpt, usual)
                found.append(
                    ("A longer training of the tokenizer, in a folder of its own, as its tokens are others", text)
                )
            else:
                text = with_options(command, {GPT: str(2 * gpt.steps)})
                found.append(("To go on for twice as long with the AR model", text))
        found += uses(str(self.output), self.data, self.image_column)
        return [(what, printable(text)) for what, text in found]


def expectations(images: int, stages: Sequence[Stage]) -> list[str]:
    """Return what a run on so many images can be, and what would make it better, a sentence each."""
    found = [describe_amount(images)]
    gpt = stages[-1]
    for stage in stages[:-1]:
        if stage.is_short(images):
            seen = stage.images / max(images, 1)
            found.append(
                f"The tokenizer saw each image {seen:.1f} times in {stage.steps:,} steps, which "
                "is too short: what it makes of images is blurred, and no AR model can make up for that. More steps of "
                "the tokenizer come first, in a new folder."
            )
    if start := gpt.settings.get("init"):
        found.append(
            f"It started from {start}, which was trained on others, so it can do more than these alone could teach."
        )
    passes, losses = gpt.images / max(images, 1), [r for r in gpt.history if "val_loss" in r]
    often = f"The AR model saw each image {passes:.1f} times"
    if passes < 20 and not start:
        first = any(stage.is_short(images) for stage in stages[:-1])
        found.append(f"{often}, which is a short run{', too.' if first else ': more steps will help most.'}")
    elif len(losses) > 1:
        best = min(losses, key=lambda record: record["val_loss"])["step"]
        if best < 0.9 * gpt.steps:
            found.append(
                f"{often}, and its validation loss was lowest at step {best:,.0f} of {gpt.steps:,}: more steps "
                "would not help, more images would."
            )
        else:
            found.append(f"{often}, and its validation loss was lowest at the end: more steps may still help.")
    else:
        found.append(f"{often}.")
    return found


def _millions(network: torch.nn.Module) -> str:
    return f"{sum(weights.numel() for weights in network.parameters()) / 1e6:.1f}M"


def _spread_of(values: Tensor) -> list[float]:
    return [values.min().item(), values.median().item(), values.max().item()]


def _dots(distances: dict[str, Tensor]) -> list[tuple[str, list[float]]]:
    """Return where each distance is on a line of 1 to 99, from 0 to the largest."""
    largest = max(float(x.max()) for x in distances.values()) or 1.0
    return [(name, [round(1 + 98 * v / largest, 1) for v in x.tolist()]) for name, x in distances.items()]
