"""What the service asks of the model, batch by batch: images of classes, tokens of images, images of tokens."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detailflow.data.transforms import to_tensor
from detailflow.device import to_host
from detailflow.generation import SamplingConfig, image_generator
from detailflow.pipeline import DetailFlowPipeline
from detailflow.serving.batcher import Result, Task


class Generate(NamedTuple):
    """The key of images that are generated together: those that keep as many first tokens."""

    sampling: SamplingConfig
    kept: int = 0


class Encode(NamedTuple):
    """The key of images that are encoded together."""

    height: int
    width: int
    search: int = 0


class Decode(NamedTuple):
    """The key of tokens that are decoded together, as stages of images of that full size."""

    height: int
    width: int


class ImageItem(NamedTuple):
    """Image `number` of a plain call of the pipeline with `seed` and `prefix`; `stages` are shown on the way."""

    class_id: int
    seed: int
    number: int
    num_tokens: int
    stages: frozenset[int]
    prefix: Sequence[int] = ()


class StagesItem(NamedTuple):
    """An image's tokens, to be shown at these counts of them."""

    tokens: Sequence[int]
    counts: frozenset[int]


class Picture(NamedTuple):
    """An image as its tokens so far show it: (height, width, 3) bytes."""

    tokens: list[int]
    pixels: np.ndarray


def warm_up(pipeline: DetailFlowPipeline) -> None:
    """Compute a first step and its image: what the engine needs is built now, or refused as `generate` refuses it."""
    null_class, first = torch.tensor([pipeline.gpt.config.num_classes]), pipeline.gpt.schedule.valid_counts[0]
    pipeline.tokenizer.decode_bytes(pipeline.gpt.generate(null_class, num_tokens=first))


def run(pipeline: DetailFlowPipeline, key: object, tasks: Sequence[Task]) -> Iterator[list[Result]]:
    """Compute a batch of one key; see `Batcher`."""
    if isinstance(key, Generate):
        yield from _generate(pipeline, key, tasks)
    elif isinstance(key, Encode):
        pixels = torch.cat([to_tensor(task.item)[None] for task in tasks])
        for codes in pipeline.tokenizer.encode_steps(pixels, search=key.search):  # noqa: B007  # the last are wanted
            yield []  # here it can be given up
        yield [Result(i, ids, True) for i, ids in enumerate(codes.tolist())]
    elif isinstance(key, Decode):
        yield from _decode(pipeline, key, tasks)
    else:
        raise TypeError(f"no work is called {key!r}")


def _generate(pipeline: DetailFlowPipeline, key: Generate, tasks: Sequence[Task]) -> Iterator[list[Result]]:
    items: list[ImageItem] = [task.item for task in tasks]
    class_ids = torch.tensor([item.class_id for item in items])
    generators = [image_generator(item.seed, item.number) for item in items]
    prefix = torch.tensor([item.prefix for item in items]) if key.kept else None
    last = max(item.num_tokens for item in items)
    for ids in pipeline.gpt.stream(class_ids, key.sampling, generators, last, prefix):
        n = ids.shape[1]
        shown = [
            i for i, item in enumerate(items) if (n == item.num_tokens or n in item.stages) and not tasks[i].cancelled
        ]
        pictures = _pictures(pipeline, ids[shown]) if shown else []
        yield [Result(i, picture, n == items[i].num_tokens) for i, picture in zip(shown, pictures, strict=True)]


def _decode(pipeline: DetailFlowPipeline, key: Decode, tasks: Sequence[Task]) -> Iterator[list[Result]]:
    items: list[StagesItem] = [task.item for task in tasks]
    for n in sorted({n for item in items for n in item.counts}):
        shown = [i for i, item in enumerate(items) if n in item.counts and not tasks[i].cancelled]
        if shown:
            ids = torch.tensor([items[i].tokens[:n] for i in shown])
            pictures = _pictures(pipeline, ids, pipeline.tokenizer.schedule.decode_shape(n, key.height, key.width))
            yield [Result(i, p, n == max(items[i].counts)) for i, p in zip(shown, pictures, strict=True)]


def _pictures(pipeline: DetailFlowPipeline, ids: Tensor, size: tuple[int, int] | None = None) -> list[Picture]:
    pixels = to_host(pipeline.tokenizer.decode_bytes(ids, size)).numpy()
    return [Picture(*both) for both in zip(ids.tolist(), pixels, strict=True)]
