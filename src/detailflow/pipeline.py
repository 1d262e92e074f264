"""From class labels, or an image, to PIL images at any stage of detail: the tokenizer and the AR model together."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detailflow import hub, hub_client
from detailflow.data.image_files import load_rgb, to_rgb
from detailflow.data.transforms import center_crop, resized, to_tensor
from detailflow.device import choose_device, choose_dtype, to_host, within_memory
from detailflow.errors import DetailFlowError, DetailFlowWarning
from detailflow.generation import Generators, image_generator, image_generators
from detailflow.labels import ClassId, ClassLabels, Label, listed
from detailflow.models.gpt import DetailFlowGPT
from detailflow.models.ids import checked_ids
from detailflow.models.loading import TOKEN_KEYS, require_same
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.psnr import psnr
from detailflow.published import Variant
from detailflow.sampling import EngineName, SamplingOptions
from detailflow.schedule import TokenSchedule
from detailflow.settings import (
    BatchSize,
    NotNegativeInt,
    PositiveInt,
    Seed,
    Settings,
    check_arguments,
    require,
)

BATCH_SIZE = 32
LARGEST_CALL = 100_000  # images, which are all in memory in the end
Labels = Label | Sequence[Label] | np.ndarray | Tensor
Picture = Image.Image | str | os.PathLike[str]  # an image, or the path of a file of one
_INSTEAD = {  # of options of a plain call, for variations
    "num_images_per_class": "num_images, the number of variations",
    "prefix": "the tokens in place of the image, and how many of them to keep",
}
_PICTURE = (Image.Image, str, os.PathLike)


@dataclass(frozen=True)
class Stage:
    """Images from their first `num_tokens` tokens: `size` pixels a side, or (height, width) if not square."""

    num_tokens: int
    size: int | tuple[int, int]
    images: list[Image.Image]


@dataclass(frozen=True)
class Reconstruction(Stage):
    """One image from its own first `num_tokens` tokens: decoded at `size`, then enlarged to the full size.

    `psnr` is in dB, over the bytes of the enlarged image and of the original, as it was encoded.
    """

    psnr: float


class GenerationOptions(SamplingOptions, total=False):
    """The keyword arguments of a call of the pipeline and of `stream`, besides those of `SamplingOptions`."""

    num_images_per_class: int  # 1
    num_tokens: int | None  # n, stop there for a coarse image of side D(n); `None` is all N
    prefix: Tensor | Sequence[int] | None  # (k,) first tokens that every image keeps; `None` is none
    seed: int  # 0 to 2^64 − 1; 0
    generator: Generators | None  # in place of the seed: one per image, or one that each image's own seed is drawn from
    first_image: int  # index of the first image, for a long list that is made in parts; 0
    batch_size: int  # images that are generated at once; 32
    progress: Callable[[int], object] | None  # called after every decoding step with the number of images in it


@dataclass(frozen=True)
class _Options(Settings):
    """`GenerationOptions` without those for sampling, checked."""

    num_images_per_class: PositiveInt = 1
    num_tokens: int | None = None
    prefix: Tensor | Sequence[int] | None = None
    seed: Seed = 0
    generator: Generators | None = None
    first_image: NotNegativeInt = 0
    batch_size: BatchSize = BATCH_SIZE
    progress: Callable[[int], object] | None = None


class DetailFlowPipeline:
    """Generates images of classes, and encodes and decodes images, with a tokenizer and the AR model made for it.

    >>> pipe = DetailFlowPipeline.from_pretrained(device="cpu")  # the model in the package
    >>> images = pipe(["cat", 7], num_images_per_class=2, seed=1)
    >>> len(images), images[0].size
    (4, (32, 32))
    >>> [(stage.num_tokens, stage.size) for stage in pipe.stream("cat", seed=1, counts=[1, 16, 48])]
    [(1, 4), (16, 16), (48, 32)]
    """

    def __init__(self, tokenizer: DetailFlowTokenizer, gpt: DetailFlowGPT) -> None:
        for name, model, kind in (("tokenizer", tokenizer, DetailFlowTokenizer), ("gpt", gpt, DetailFlowGPT)):
            if not isinstance(model, kind):
                raise DetailFlowError(f"{name} must be a {kind.__name__}, not a {type(model).__name__}")
        problem = "the AR model and the tokenizer here do not fit together"
        require_same(tokenizer.config, gpt.config, TOKEN_KEYS, problem)
        if gpt.config.tokenizer and gpt.config.tokenizer != tokenizer.fingerprint():
            what = "the AR model was trained on the codes of another tokenizer, so its images may show nothing"
            warnings.warn(f"{what}: give the tokenizer that it was made with", DetailFlowWarning, stacklevel=2)
        self.tokenizer = tokenizer
        self.gpt = gpt
        self.source = ""  # what the user called the model
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
        engine: EngineName = "auto",
        variant: Variant = "ema",
    ) -> "DetailFlowPipeline":
        """Load both models, ready to generate.

        Args:
            path_or_id: a folder with tokenizer/ and gpt/ (or any two such folders) inside, the short name of a
                published model such as "detailflow-16", or a hub id; `None` is the small model in the package, which
                needs no download.
            device: `None` is the GPU if there is one, else the CPU.
            dtype: of the weights and of the arithmetic, also as text ("bfloat16"); `None` is bfloat16 on a GPU
                that has it, else float32.
            tokenizer: the tokenizer's folder or hub id, if it is not with the AR model.
            revision: a branch, tag or commit of a model on the hub; a separate `tokenizer` is the newest.
            engine: what takes the decoding steps, and the tokenizer's where it can: "native" (C++, for CPUs), "graphs"
                (CUDA), "torch", or the first of them that can.
            variant: of the AR model, "ema" (the averaged weights, to sample from) or "model", as far as there are both.
        """
        require(EngineName, engine=engine)
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        codec = DetailFlowTokenizer.from_pretrained(
            tokenizer or path_or_id, device=device, dtype=dtype, revision=None if tokenizer else revision
        )
        gpt = DetailFlowGPT.from_pretrained(path_or_id, variant=variant, device=device, dtype=dtype, revision=revision)
        codec.engine = gpt.engine = engine
        pipe = cls(codec, gpt)
        pipe.source = "the shipped model" if path_or_id is None else os.fspath(path_or_id)
        return pipe

    def __repr__(self) -> str:
        schedule, count = self.tokenizer.schedule, self.labels.count
        classes = f"{count:,} classes" if count else "no classes"
        size = f"{schedule.image_size}×{schedule.image_size} pixels in {schedule.num_tokens} tokens"
        dtype = next(self.gpt.parameters()).dtype
        where = f"{str(dtype).removeprefix('torch.')} on {self.device}"
        return f"<DetailFlowPipeline{self.source and ' of '}{self.source}: {size}, {classes}, {where}>"

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.gpt.device

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
    ) -> "DetailFlowPipeline":
        """Move both models to a device or change their dtype; return the pipeline. Compiled programs are dropped."""
        device = self.device if device is None else choose_device(device)
        kind = None if dtype is None else choose_dtype(dtype, device)
        for model in (self.tokenizer, self.gpt):
            model.to(device, kind)
            model.forget_compiled()
        return self

    def compile(self, batch_size: int = 1) -> None:
        """Compile the generation of `batch_size` images at a time on a GPU, which pays off for thousands of images."""
        self.gpt.compile_generation(batch_size)
        self.tokenizer.compile_decoding(batch_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both models to `folder`, as tokenizer/ and gpt/; see `DetailFlowTokenizer.save_pretrained`."""
        targets = hub.targets(folder, [self.tokenizer.kind, self.gpt.kind])
        with ExitStack() as stack:  # which puts them in place once both are written
            for model in (self.tokenizer, self.gpt):
                content = asdict(model.config), model.state_dict()
                stack.enter_context(hub.saving(targets[model.kind], model.kind, *content))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload both models to a repository on the hub, which is made if it is missing; return the commit's address.

        Args:
            repo_id: "owner/name".
            private: of a new repository; `None` is the owner's default.
            revision: the branch to commit to; `None` is the main one.
            commit_message: `None` is "Upload a DetailFlow model".
        """
        message = commit_message or "Upload a DetailFlow model"
        return hub_client.push(
            self.save_pretrained, repo_id, private=private, revision=revision, commit_message=message
        )

    def __call__(
        self, labels: Labels | None = None, *, num_images: int | None = None, **options: Unpack[GenerationOptions]
    ) -> list[Image.Image]:
        """Generate images: all of the first label, then all of the second, and so on.

        Image i's noise depends on `seed` and `first_image` + i alone, so the same seed gives the same images in any
        batch (up to floating-point rounding), and a long list may be made in parts.

        Args:
            labels: class names, numbers or, for ImageNet's classes, WordNet ids: one, several, or an array or tensor of
                numbers. If a name is a number, numbers in text are names. `None` for a model without classes.
            num_images: number of images of a model without classes; `None` is 1.
            options: see `GenerationOptions` and `SamplingOptions`.
        """
        images = []
        for steps in self._batches(self._wanted(labels, num_images), **options):
            *_, ids = steps
            images += decode_images(self.tokenizer, ids)
        return images

    def stream(
        self,
        labels: Labels | None = None,
        *,
        num_images: int | None = None,
        counts: Sequence[int] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Stage]:
        """Generate images and yield them from coarse to fine; the last stage is what a plain call returns.

        Of more images than `batch_size`, all tokens are generated first, batch after batch as in a plain call, and the
        stages come after that: this takes no more memory than one batch, and `progress` shows how far it is.

        Args:
            labels: as in a plain call.
            num_images: as in a plain call.
            counts: yield only the stages of that many tokens; `None` is all of them, from those of `prefix` on.
            options: as in a plain call.
        """
        batches = list(self._batches(self._wanted(labels, num_images), **options))
        prefix, last = options.get("prefix"), options.get("num_tokens")
        first = 1 if prefix is None else len(self._codes("prefix", prefix))
        return self._stages(batches, self.tokenizer.schedule.check_counts(counts, first=first, last=last))

    def _stages(self, batches: Sequence[Iterator[Tensor]], wanted: Sequence[int]) -> Iterator[Stage]:
        """Decode the same batches as in a plain call, because another batch size may round differently."""
        if len(batches) == 1:
            steps = ([ids] for ids in batches[0])
        else:  # each to its end, or the caches of all would be in memory at once
            whole = [ids for *_, ids in batches]
            steps = ([ids[:, :n] for ids in whole] for n in sorted(set(wanted)))
        for parts in steps:
            if (n := parts[0].shape[1]) in wanted:
                images = [image for ids in parts for image in decode_images(self.tokenizer, ids)]
                yield Stage(n, self.tokenizer.schedule.decode_size(n), images)

    def vary(
        self,
        image: Picture | Tensor | Sequence[int],
        *,
        keep: int,
        label: Label | None = None,
        num_images: int = 1,
        size: tuple[int, int] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Image.Image]:
        """Generate variations: the first `keep` tokens of an image stay, and the AR model writes the others.

        >>> pipe = DetailFlowPipeline.from_pretrained(device="cpu")
        >>> photo = Image.new("RGB", (300, 200), "teal")
        >>> [image.size for image in pipe.vary(photo, keep=8, label="ship", num_images=2)]
        [(32, 32), (32, 32)]

        Args:
            image: an image of any size or the path of one, whose centre square is taken, or its tokens.
            keep: k, a valid count of tokens; all of them give the reconstruction.
            label: the class of the variations, also another one than the image's; `None` is no class.
            num_images: number of variations.
            size: (height, width) of the full image if it is not square, as `TokenSchedule.full_shape` has it.
            options: as in a plain call, but for `num_images_per_class` and `prefix`, which are `num_images` and the
                first `keep` tokens of `image` here.
        """
        for name, instead in _INSTEAD.items():
            if name in options:
                raise DetailFlowError(f"{name} is for a plain call: give {instead}")
        require(PositiveInt, num_images=num_images)
        ids = self.tokens(image)
        if keep is None:
            raise DetailFlowError("keep must be a number of tokens, not None")
        if self.tokenizer.schedule.check_count(keep, "keep") > len(ids):
            raise DetailFlowError(f"keep must be at most the {len(ids)} tokens given, not {keep}")
        if keep > (n := self.tokenizer.schedule.check_count(options.get("num_tokens"))):
            raise DetailFlowError(f"num_tokens must be at least keep, which is {keep}, not {n}")
        full = None if size is None else self.tokenizer.schedule.check_full_shape(size)
        class_ids = [self.gpt.config.num_classes] if label is None else self.class_ids([label])  # the null class
        images = []
        for steps in self._batches(class_ids, **options | {"num_images_per_class": num_images, "prefix": ids[:keep]}):
            *_, codes = steps
            shape = None if full is None else self.tokenizer.schedule.decode_shape(codes.shape[1], *full)
            images += decode_images(self.tokenizer, codes, shape)
        return images

    def tokens(self, image: Picture | Tensor | Sequence[int], *, search: int = 0) -> Tensor:
        """Return the (n,) tokens of an image's centre square, or those given instead; `search` as in `encode`."""
        if isinstance(image, _PICTURE):
            return encode_images(self.tokenizer, [fit(self.tokenizer.schedule, image)], search)[0]
        if search:
            raise DetailFlowError("a search is for an image, and tokens are given: leave out search")
        return self._codes("tokens", image)

    def _codes(self, name: str, given: Tensor | Sequence[int]) -> Tensor:
        try:
            ids = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DetailFlowError(f"{name} must be a list of integers ({error})") from error
        if ids.shape == (0,):  # an empty list is of floats
            ids = ids.long()
        ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids  # a batch of one, as `encode` returns it
        return checked_ids(name, ids, 1, self.tokenizer.config.codebook_size)

    def _batches(self, several: Sequence[int], **options: Unpack[GenerationOptions]) -> Iterator[Iterator[Tensor]]:
        """Check everything now; then, batch by batch, yield the codes so far, (B, n), after each decoding step."""
        given = cast(dict[str, Any], options)
        sampling = self.gpt.sampling(**{k: given.pop(k) for k in SamplingOptions.__annotations__ if k in given})
        check_arguments(given, GenerationOptions.__annotations__)
        call = _Options(**given)
        n = self.tokenizer.schedule.check_count(call.num_tokens)
        prefix = None if call.prefix is None else self._codes("prefix", call.prefix)
        if prefix is not None:
            self.tokenizer.schedule.check_prefix(len(prefix), n)
        if (total := len(several) * call.num_images_per_class) > LARGEST_CALL:
            raise DetailFlowError(
                f"{total:,} images are more than one call makes, which is {LARGEST_CALL:,}: make them in "
                "parts (first_image), or with `detailflow generate --num-images`"
            )
        class_ids = [i for i in several for _ in range(call.num_images_per_class)]
        given_noise = None if call.generator is None else image_generators(call.generator, total)

        def steps(first: int) -> Iterator[Tensor]:
            ids = torch.tensor(class_ids[first : first + call.batch_size])
            if given_noise is None:
                generators = [image_generator(call.seed, call.first_image + first + i) for i in range(len(ids))]
            else:
                generators = given_noise[first : first + len(ids)]
            kept = None if prefix is None else prefix.expand(len(ids), -1)
            with within_memory(f"a batch of {len(ids)} images", "give a smaller batch_size"):
                for tokens in self.gpt.stream(ids, sampling, generators, n, kept):
                    if call.progress is not None:
                        call.progress(len(ids))
                    yield tokens

        return (steps(first) for first in range(0, total, call.batch_size))

    def _wanted(self, labels: Labels | None, num_images: int | None) -> list[ClassId]:
        """Return the class numbers of a call: those of labels, or the null class of a model without classes."""
        if labels is not None:
            if num_images is not None:
                raise DetailFlowError("num_images is for a model without classes: give num_images_per_class")
            return self.class_ids(labels)
        if self.labels.count:
            raise DetailFlowError("this model makes images of classes: give a label or several")
        if num_images is not None:
            require(PositiveInt, num_images=num_images)
        return self.labels.ids * (1 if num_images is None else num_images)

    def class_ids(self, labels: Labels) -> list[ClassId]:
        """Return the class numbers of labels, which are numbers, names or WordNet ids; see `ClassLabels.index`."""
        several = listed(labels)
        if not several:
            raise DetailFlowError("there must be at least one class label")
        return [ClassId(self.labels.index(label)) for label in several]

    def class_name(self, class_id: int) -> str:
        """Return the short name of a class, or its number if the model's classes have no names."""
        return self.labels.name(class_id)

    def reconstruct(
        self, image: Picture, *, counts: Sequence[int] | None = None, whole: bool = False, search: int = 0
    ) -> list[Reconstruction]:
        """Encode an image, or the one at a path, and decode it from its first 1, 2, 4, … tokens; see `reconstruct`.

        >>> pipe = DetailFlowPipeline.from_pretrained(device="cpu")
        >>> [stage.size for stage in pipe.reconstruct(Image.new("RGB", (40, 32), "teal"), counts=[1, 8])]
        [4, 8]
        """
        return list(reconstruct(self.tokenizer, fit(self.tokenizer.schedule, image, whole), counts, search))


def fit(schedule: TokenSchedule, image: Picture, whole: bool = False) -> Image.Image:
    """Crop an image to its centre square at side R, or with `whole` resize all of it to `TokenSchedule.full_shape`."""
    if not isinstance(image, _PICTURE):
        kind = type(image).__name__
        raise DetailFlowError(f"give a PIL image, such as Image.open('photo.jpg'), or the path of one, not a {kind}")
    image = to_rgb(image) if isinstance(image, Image.Image) else load_rgb(os.path.expanduser(image))
    if not whole:
        return Image.fromarray(center_crop(image, schedule.image_size))
    return Image.fromarray(resized(image, *schedule.full_shape(image.height, image.width)))


def reconstruct(
    tokenizer: DetailFlowTokenizer, original: Image.Image, counts: Sequence[int] | None = None, search: int = 0
) -> Iterator[Reconstruction]:
    """Encode an image that `fit` returned, and yield it from its first 1, 2, 4, … N tokens, or `counts` tokens."""
    schedule = tokenizer.schedule
    counts = schedule.stages() if counts is None else schedule.check_counts(counts)
    ids = encode_images(tokenizer, [original], search)
    for n in counts:
        height, width = schedule.decode_shape(n, original.height, original.width)
        picture = decode_images(tokenizer, ids[:, :n], (height, width))[0]
        shown, distance = enlarged(picture, original)
        size = height if height == width else (height, width)
        yield Reconstruction(n, size, [shown], distance)


def enlarged(picture: Image.Image, original: Image.Image) -> tuple[Image.Image, float]:
    """Return what tokens show of an image, at the image's own size, and its PSNR in dB over the bytes of the two."""
    shown = picture.resize(original.size, Image.Resampling.BICUBIC)
    return shown, psnr(np.asarray(shown), np.asarray(original)).item()


def encode_images(tokenizer: DetailFlowTokenizer, images: Sequence[Image.Image], search: int = 0) -> Tensor:
    """Encode B images of one size, as `fit` returns them, to (B, N) codes."""
    return tokenizer.encode(torch.stack([to_tensor(np.asarray(image)) for image in images]), search=search)


def decode_images(
    tokenizer: DetailFlowTokenizer, ids: Tensor, size: tuple[int, int] | None = None
) -> list[Image.Image]:
    """Decode (B, n) codes to B images of side D(n), or (height, width)."""
    return [Image.fromarray(pixels) for pixels in to_host(tokenizer.decode_bytes(ids, size)).numpy()]
