"""From class labels, or an image, to PIL images at any stage of detail: the tokenizer and the AR model together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detailflow import hub
from detailflow.data.images import to_rgb
from detailflow.data.transforms import center_crop, resized, to_tensor, to_uint8
from detailflow.device import choose_device, choose_dtype, within_memory
from detailflow.errors import DetailFlowError
from detailflow.labels import ClassId, ClassLabels, Label, listed
from detailflow.models.gpt import DetailFlowGPT
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.psnr import psnr
from detailflow.schedule import TokenSchedule, require_not_negative, require_positive
from detailflow.seeds import check_seeds

BATCH_SIZE = 32
LARGEST_CALL = 100_000  # images, which are all in memory in the end
Labels = Label | Sequence[Label] | np.ndarray | Tensor


@dataclass(frozen=True)
class Stage:
    """The images as the first `num_tokens` tokens show them, `size` pixels a side, or (height, width) where not square."""

    num_tokens: int
    size: int | tuple[int, int]
    images: list[Image.Image]


@dataclass(frozen=True)
class Reconstruction(Stage):
    """One image from its own first `num_tokens` tokens: decoded at `size`, then enlarged to the full size.

    `psnr` is in dB, over the bytes of the enlarged image and of the original, as it was encoded.
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
        self.labels = ClassLabels(gpt.config.class_names, gpt.config.num_classes)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        tokenizer: str | Path | None = None,
        revision: str | None = None,
    ) -> "DetailFlowPipeline":
        """Load both models, ready to generate.

        Args:
            path_or_id: a folder with tokenizer/ and gpt/ (or any two such folders) inside, a model-zoo shorthand such as
                "detailflow-16" or a hub name; `None` is the small model in the package, which needs no download.
            device: `None` is the GPU if there is one, else the CPU.
            dtype: of the weights and of the arithmetic, also as text ("bfloat16"); `None` is float32.
            tokenizer: where the tokenizer is, if it is not with the AR model.
            revision: a branch, tag or commit of a model on the hub (of a tokenizer that is elsewhere, the newest is taken).

        Raises:
            DetailFlowError: if a model cannot be found or is damaged, or the device cannot be used.
        """
        where: dict[str, Any] = dict(device=choose_device(device), dtype=choose_dtype(dtype))
        if tokenizer is None:
            codes = DetailFlowTokenizer.from_pretrained(_location(path_or_id, "tokenizer"), **where, revision=revision)
        else:
            codes = DetailFlowTokenizer.from_pretrained(tokenizer, **where)
        return cls(codes, DetailFlowGPT.from_pretrained(_location(path_or_id, "gpt"), **where, revision=revision))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.gpt.device

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
    ) -> "DetailFlowPipeline":
        """Move both models to a device, change their type, or both; returns the pipeline. What was compiled has to be again.

        Raises:
            DetailFlowError: for a device that cannot be used or a type that weights cannot have.
        """
        place = self.device if device is None else choose_device(device)
        kind = None if dtype is None else choose_dtype(dtype)
        for model in (self.tokenizer, self.gpt):
            model.to(place, kind)
            model.forget_compiled()
        return self

    def compile(self, batch_size: int = 1) -> None:
        """Compile the generation of `batch_size` images at a time: worth its minutes for thousands of images, or in a service.

        Other numbers of images are made as before.

        Raises:
            DetailFlowError: where nothing can be compiled, for lack of a C++ compiler for example.
        """
        self.gpt.compile_generation(batch_size)
        self.tokenizer.compile_decoding(batch_size)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write both models to `directory`, as tokenizer/ and gpt/.

        Raises:
            DetailFlowError: if the files cannot be written.
        """
        self.tokenizer.save_pretrained(Path(directory) / "tokenizer")
        self.gpt.save_pretrained(Path(directory) / "gpt")

    def __call__(
        self,
        labels: Labels,
        num_images_per_class: int = 1,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        top_k: int | Literal["off"] | None = None,
        top_p: float | Literal["off"] | None = None,
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
            labels: class names, numbers or, for ImageNet's classes, WordNet ids: one, several, or an array or tensor of numbers.
                Where the names themselves are numbers, so are labels.
            num_images_per_class: images of each label.
            guidance_scale: strength of classifier-free guidance, 1 is none; `None` is the model's own best value, here
                and for the next four.
            guidance_schedule: "constant", or "linear", which lowers the scale from group to group.
            temperature: 0 always takes the most likely code.
            top_k: draw only from that many most likely codes; "off" is all.
            top_p: draw only from the most likely codes that sum to this probability; "off" is all.
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
        labels: Labels,
        num_images_per_class: int = 1,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        top_k: int | Literal["off"] | None = None,
        top_p: float | Literal["off"] | None = None,
        num_tokens: int | None = None,
        seed: int = 0,
        first_image: int = 0,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[int], object] | None = None,
        counts: Sequence[int] | None = None,
    ) -> Iterator[Stage]:
        """Generate images and yield them from coarse to fine, as tokens arrive.

        The arguments are those of a plain call, and the images after all the tokens are exactly the plain call's. Of more images
        than `batch_size`, all tokens are made first, batch after batch as in a plain call, and the stages come after that: it
        takes no more memory than one batch, and `progress` tells how far it is.

        Args:
            counts: yield only the stages of that many tokens; `None` is all of them.

        Raises:
            DetailFlowError: as for a plain call, before the first stage.
        """
        wanted = None if counts is None else [self.tokenizer.schedule.check_count(n) for n in counts]
        batches = list(
            self._batches(
                labels, num_images_per_class, guidance_scale, guidance_schedule, temperature, top_k, top_p,
                num_tokens, seed, first_image, batch_size, progress,
            )
        )  # fmt: skip
        return self._stages(batches, wanted)

    def _stages(self, batches: Sequence[Iterator[Tensor]], wanted: Sequence[int] | None) -> Iterator[Stage]:
        """Decode the same batches as in a plain call, because another batch size may round differently."""
        if len(batches) == 1:
            steps = ([ids] for ids in batches[0])
        else:  # each to its end, or the caches of all would be in memory at once
            whole = [ids for *_, ids in batches]
            counts = [n for n in self.tokenizer.schedule.valid_counts if n <= whole[0].shape[1]]
            steps = ([ids[:, :n] for ids in whole] for n in counts)
        for parts in steps:
            n = parts[0].shape[1]
            if wanted is None or n in wanted:
                images = [image for ids in parts for image in _decode(self.tokenizer, ids)]
                yield Stage(n, self.tokenizer.schedule.decode_size(n), images)

    def _batches(
        self,
        labels: Labels,
        num_images_per_class: int,
        guidance_scale: float | None,
        guidance_schedule: str | None,
        temperature: float | None,
        top_k: int | Literal["off"] | None,
        top_p: float | Literal["off"] | None,
        num_tokens: int | None,
        seed: int,
        first_image: int,
        batch_size: int,
        progress: Callable[[int], object] | None,
    ) -> Iterator[Iterator[Tensor]]:
        """Check everything now; then, batch by batch, the codes so far, (B, n), after each decoding step."""
        require_positive(num_images_per_class=num_images_per_class, batch_size=batch_size)
        check_seeds(seed, name="seed")
        require_not_negative(first_image=first_image)
        n = self.tokenizer.schedule.check_count(num_tokens)
        sampling = self.gpt.sampling(guidance_scale, guidance_schedule, temperature, top_k, top_p)
        several = self.class_ids(labels)
        if (count := len(several) * num_images_per_class) > LARGEST_CALL:
            raise DetailFlowError(
                f"{count:,} images are more than one call makes, which is {LARGEST_CALL:,}: make them in parts (first_image), or "
                "with `detailflow generate --num-images`"
            )
        class_ids = [i for i in several for _ in range(num_images_per_class)]

        def start(first: int) -> Iterator[Tensor]:
            ids = torch.tensor(class_ids[first : first + batch_size])
            generators = [image_generator(seed, first_image + first + i) for i in range(len(ids))]
            with within_memory(f"a batch of {len(ids)} images", "give a smaller batch_size"):
                for tokens in self.gpt.stream(ids, sampling, generators, n):
                    if progress is not None:
                        progress(len(ids))
                    yield tokens

        return (start(first) for first in range(0, len(class_ids), batch_size))

    def class_ids(self, labels: Labels) -> list[ClassId]:
        """Return the class numbers of labels, which are numbers, names or WordNet ids; see `ClassLabels.index`.

        Raises:
            DetailFlowError: for a label that means none of the model's classes or several, or no label at all.
        """
        several = listed(labels)
        if not several:
            raise DetailFlowError("there must be at least one class label")
        return [ClassId(self.labels.index(label)) for label in several]

    def class_name(self, class_id: int) -> str:
        """The short name of a class, or its number where the model's classes have no names."""
        return self.labels.name(class_id)

    def reconstruct(
        self, image: Image.Image, counts: Sequence[int] | None = None, whole: bool = False
    ) -> list[Reconstruction]:
        """See `reconstruct`, which needs the tokenizer alone."""
        return list(reconstruct(self.tokenizer, fit(self.tokenizer.schedule, image, whole), counts))


def fit(schedule: TokenSchedule, image: Image.Image, whole: bool = False) -> Image.Image:
    """An image as it is encoded: its centre square at side R, or with `whole` all of it in about its own shape
    (`TokenSchedule.full_shape`).
    """
    image = to_rgb(image)
    if not whole:
        return Image.fromarray(center_crop(image, schedule.image_size))
    return Image.fromarray(resized(image, *schedule.full_shape(image.height, image.width)))


def reconstruct(
    tokenizer: DetailFlowTokenizer, original: Image.Image, counts: Sequence[int] | None = None
) -> Iterator[Reconstruction]:
    """Encode an image once and decode it from its first 1, 2, 4, … N tokens, one after the other.

    Args:
        original: as `fit` returns it.
        counts: how many tokens instead of `stage_counts`.

    Raises:
        DetailFlowError: for a count of tokens that is not valid, or sides that are no multiples of f.
    """
    schedule = tokenizer.schedule
    counts = stage_counts(schedule) if counts is None else [schedule.check_count(n) for n in counts]
    pixels = np.asarray(original)
    ids = tokenizer.encode(to_tensor(pixels)[None])

    for n in counts:
        height, width = schedule.decode_shape(n, original.height, original.width)
        picture = _decode(tokenizer, ids[:, :n], (height, width))[0]
        shown = picture.resize(original.size, Image.Resampling.BICUBIC)
        size = height if height == width else (height, width)
        yield Reconstruction(n, size, [shown], psnr(np.asarray(shown), pixels).item())


def stage_counts(schedule: TokenSchedule, num_tokens: int | None = None) -> list[int]:
    """Counts of tokens that show how an image takes shape: the valid powers of two below n, then n (`None`: N).

    Raises:
        DetailFlowError: for an n that is not valid.
    """
    last = schedule.check_count(num_tokens)
    return [n for n in schedule.valid_counts if n < last and n.bit_count() == 1] + [last]


def image_generator(seed: int, image: int) -> torch.Generator:
    """The noise of image number `image` under `seed`; the mixing is fixed, so that images stay the same for good."""
    state = np.random.SeedSequence(seed, spawn_key=(image,)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _location(path_or_id: str | Path | None, kind: hub.Kind) -> str | Path:
    return hub.default_directory(kind) if path_or_id is None else path_or_id


def _decode(tokenizer: DetailFlowTokenizer, ids: Tensor, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """(B, n) codes → B images of side D(n), or (height, width)."""
    return [Image.fromarray(pixels) for pixels in to_uint8(tokenizer.decode(ids, size)).cpu().numpy()]
