"""From class labels, or an image, to PIL images at any stage of detail: the tokenizer and the AR model together."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from operator import index
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detailflow import hub
from detailflow.data.images import to_rgb
from detailflow.data.transforms import center_crop, to_tensor, to_uint8
from detailflow.device import choose_device
from detailflow.errors import DetailFlowError
from detailflow.models.gpt import DetailFlowGPT
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.schedule import TokenSchedule, require_positive

BATCH_SIZE = 32
LARGEST_SEED = 2**64 - 1

Label = int | str


@dataclass(frozen=True)
class Stage:
    """The images as the first `num_tokens` tokens show them, `size` pixels a side."""

    num_tokens: int
    size: int
    images: list[Image.Image]


@dataclass(frozen=True)
class Reconstruction(Stage):
    """One image from its own first `num_tokens` tokens: decoded at side `size`, then enlarged to the full side R.

    `psnr` is in dB, over the bytes of the enlarged image and of the original's centre crop.
    """

    psnr: float


class DetailFlowPipeline:
    """Generates images of classes, and encodes and decodes images, with a tokenizer and the AR model made for it.

    Raises:
        DetailFlowError: if the two do not fit together.
    """

    def __init__(self, tokenizer: DetailFlowTokenizer, gpt: DetailFlowGPT) -> None:
        for key in ("num_tokens", "group_size", "causal_tokens", "codebook_size"):
            ours, theirs = getattr(tokenizer.config, key), getattr(gpt.config, key)
            if ours != theirs:
                raise DetailFlowError(
                    f"tokenizer and AR model do not fit together: {key} is {ours} in the one, {theirs} in the other"
                )
        self.tokenizer = tokenizer
        self.gpt = gpt

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "DetailFlowPipeline":
        """Load both models, ready to generate.

        Args:
            path_or_id: a folder with tokenizer/ and gpt/ inside, a model-zoo shorthand such as "detailflow-16" or a
                hub name; `None` is the small model in the package, which needs no download.
            device: `None` is the GPU where there is one, else the CPU.
            dtype: of the weights and of the arithmetic; `None` is float32.

        Raises:
            DetailFlowError: where a model cannot be found or is damaged, or the device cannot be used.
        """
        device, dtype = choose_device(device), dtype or torch.float32
        tokenizer = DetailFlowTokenizer.from_pretrained(_location(path_or_id, "tokenizer"), device, dtype)
        gpt = DetailFlowGPT.from_pretrained(_location(path_or_id, "gpt"), device=device, dtype=dtype)
        return cls(tokenizer, gpt)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write both models to `directory`, as tokenizer/ and gpt/.

        Raises:
            DetailFlowError: if the files cannot be written.
        """
        self.tokenizer.save_pretrained(Path(directory) / "tokenizer")
        self.gpt.save_pretrained(Path(directory) / "gpt")

    def __call__(
        self,
        labels: Label | Sequence[Label],
        num_images_per_class: int = 1,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_tokens: int | None = None,
        seed: int = 0,
        first_image: int = 0,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[int], object] | None = None,
    ) -> list[Image.Image]:
        """Generate images: all of the first label, then all of the second, and so on.

        Image i's noise depends on `seed` and `first_image` + i alone, so the same seed gives the same images whatever
        the batch (up to floating-point rounding), and a long list may be made in parts.

        Args:
            labels: class numbers or names; upper and lower case are the same.
            num_images_per_class: images of each label.
            guidance_scale: strength of classifier-free guidance, 1 is none; `None` is the model's own best value, here
                and for the next four.
            guidance_schedule: "constant", or "linear", which lowers the scale from group to group.
            temperature: 0 always takes the most likely code.
            top_k: draw only from that many most likely codes.
            top_p: draw only from the most likely codes that sum to this probability.
            num_tokens: n, stop there for a coarse image of side D(n); `None` is all N.
            seed: 0 to 2⁶⁴ − 1.
            first_image: number of the first image.
            batch_size: images that are made at once.
            progress: called after every decoding step with the number of images that took it.

        Raises:
            DetailFlowError: for an unknown class or a value out of range.
        """
        images = []
        for tokens in self._batches(
            labels, num_images_per_class, guidance_scale, guidance_schedule, temperature, top_k, top_p,
            num_tokens, seed, first_image, batch_size, progress,
        ):  # fmt: skip
            *_, ids = tokens
            images += _decode(self.tokenizer, ids)
        return images

    def stream(
        self,
        labels: Label | Sequence[Label],
        num_images_per_class: int = 1,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_tokens: int | None = None,
        seed: int = 0,
        first_image: int = 0,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[int], object] | None = None,
        counts: Sequence[int] | None = None,
    ) -> Iterator[Stage]:
        """Generate images and yield them from coarse to fine, as tokens arrive.

        The arguments are those of a plain call, and the images after all the tokens are exactly the plain call's.

        Args:
            counts: yield only the stages of that many tokens; `None` is all of them.

        Raises:
            DetailFlowError: as for a plain call, before the first stage.
        """
        wanted = None if counts is None else [self.tokenizer.schedule.check_count(n) for n in counts]
        # The same batches as in a plain call, because another batch size may round differently.
        batches = list(
            self._batches(
                labels, num_images_per_class, guidance_scale, guidance_schedule, temperature, top_k, top_p,
                num_tokens, seed, first_image, batch_size, progress,
            )
        )  # fmt: skip
        return self._stages(batches, wanted)

    def _stages(self, batches: Sequence[Iterator[Tensor]], wanted: Sequence[int] | None) -> Iterator[Stage]:
        for parts in zip(*batches, strict=True):
            n = parts[0].shape[1]
            if wanted is None or n in wanted:
                images = [image for ids in parts for image in _decode(self.tokenizer, ids)]
                yield Stage(n, self.tokenizer.schedule.decode_size(n), images)

    def _batches(
        self,
        labels: Label | Sequence[Label],
        num_images_per_class: int,
        guidance_scale: float | None,
        guidance_schedule: str | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        num_tokens: int | None,
        seed: int,
        first_image: int,
        batch_size: int,
        progress: Callable[[int], object] | None,
    ) -> Iterator[Iterator[Tensor]]:
        """Check everything now; then, batch by batch, the codes so far, (B, n), after each decoding step."""
        require_positive(num_images_per_class=num_images_per_class, batch_size=batch_size)
        if not 0 <= seed <= LARGEST_SEED:
            raise DetailFlowError(f"seed must be 0 to 2^64 - 1, not {seed}")
        if first_image < 0:
            raise DetailFlowError(f"first_image must be 0 or more, not {first_image}")
        n = self.tokenizer.schedule.check_count(num_tokens)
        sampling = self.gpt.sampling(guidance_scale, guidance_schedule, temperature, top_k, top_p)
        class_ids = [i for i in self.class_ids(labels) for _ in range(num_images_per_class)]

        def start(first: int) -> Iterator[Tensor]:
            ids = torch.tensor(class_ids[first : first + batch_size])
            generators = [image_generator(seed, first_image + first + i) for i in range(len(ids))]
            for tokens in self.gpt.stream(ids, sampling, generators, n):
                if progress is not None:
                    progress(len(ids))
                yield tokens

        return (start(first) for first in range(0, len(class_ids), batch_size))

    def class_ids(self, labels: Label | Sequence[Label]) -> list[int]:
        """The class numbers of labels, which are numbers or names.

        Raises:
            DetailFlowError: for a class that the model does not have, or no label at all.
        """
        labels = [labels] if isinstance(labels, int | str) else list(labels)
        if not labels:
            raise DetailFlowError("there must be at least one class label")
        return [self._class_id(label) for label in labels]

    def class_name(self, class_id: int) -> str:
        """The name of a class, or its number where the model's classes have no names."""
        names = self.gpt.config.class_names
        return names[class_id] if names else str(class_id)

    def _class_id(self, label: Label) -> int:
        names, count = self.gpt.config.class_names or (), self.gpt.config.num_classes
        if isinstance(label, str):
            wanted = label.strip().casefold()
            matches = [i for i, name in enumerate(names) if name.casefold() == wanted]
            if len(matches) > 1:
                raise DetailFlowError(f"{len(matches)} classes are called {label!r}: give the number, one of {matches}")
            if matches:
                return matches[0]
            if not re.fullmatch("-?[0-9]+", wanted):
                raise DetailFlowError(f"unknown class {label!r}: {_advice(wanted, names, count)}")
        number = int(label) if isinstance(label, str) else index(label)
        if not 0 <= number < count:
            raise DetailFlowError(f"unknown class {label}: the numbers are 0 to {count - 1}")
        return number

    def reconstruct(self, image: Image.Image, counts: Sequence[int] | None = None) -> list[Reconstruction]:
        """See `reconstruct`, which needs the tokenizer alone."""
        return reconstruct(self.tokenizer, image, counts)


def reconstruct(tokenizer: DetailFlowTokenizer, image: Image.Image, counts: Sequence[int] | None = None) -> list[Reconstruction]:
    """Encode an image once and decode it from its first 1, 2, 4, … N tokens.

    Args:
        image: of any size; its shorter side is resized to R and the centre cropped.
        counts: how many tokens instead of `stage_counts`.

    Raises:
        DetailFlowError: for a count of tokens that is not valid.
    """
    schedule = tokenizer.schedule
    counts = stage_counts(schedule) if counts is None else [schedule.check_count(n) for n in counts]
    side = schedule.image_size
    original = center_crop(to_rgb(image), side)
    weights = tokenizer.decoder.mask_token
    ids = tokenizer.encode(to_tensor(original)[None].to(weights.device, weights.dtype))
    stages = []
    for n in counts:
        picture = _decode(tokenizer, ids[:, :n])[0]
        shown = picture.resize((side, side), Image.Resampling.BICUBIC)
        stages.append(Reconstruction(n, picture.width, [shown], psnr(np.asarray(shown), original)))
    return stages


def stage_counts(schedule: TokenSchedule, num_tokens: int | None = None) -> list[int]:
    """Counts of tokens that show how an image takes shape: the valid powers of two below n, then n (`None`: N).

    Raises:
        DetailFlowError: for an n that is not valid.
    """
    last = schedule.check_count(num_tokens)
    return [n for n in schedule.valid_counts if n < last and n.bit_count() == 1] + [last]


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays of one shape in dB, infinite where they are equal."""
    error = float(np.mean((image.astype(np.float64) - reference) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def image_generator(seed: int, image: int) -> torch.Generator:
    """The noise of image number `image` under `seed`; the mixing is fixed, so that images stay the same for good."""
    state = np.random.SeedSequence(seed, spawn_key=(image,)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _location(path_or_id: str | Path | None, kind: hub.Kind) -> str | Path:
    return hub.default_directory(kind) if path_or_id is None else path_or_id


def _decode(tokenizer: DetailFlowTokenizer, ids: Tensor) -> list[Image.Image]:
    """(B, n) codes → B images of side D(n)."""
    return [Image.fromarray(pixels) for pixels in to_uint8(tokenizer.decode(ids.to(tokenizer.device))).cpu().numpy()]


def _advice(wanted: str, names: Sequence[str], count: int) -> str:
    """What to write instead of an unknown class name."""
    if not names:
        return f"this model's classes have no names, only the numbers 0 to {count - 1}"
    known = {name.casefold(): name for name in names}
    if close := get_close_matches(wanted, known):
        return f"did you mean {' or '.join(known[name] for name in close)}?"
    some = list(names) if count <= 20 else [*names[:5], f"… ({count} in all)"]
    return f"the classes are {', '.join(some)}"
