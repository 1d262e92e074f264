"""What the service asks of the model, batch by batch: images of classes, tokens of images, images of tokens."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detailflow.data.transforms import to_tensor, to_uint8
from detailflow.generation import SamplingConfig
from detailflow.pipeline import DetailFlowPipeline, image_generator
from detailflow.serving.batcher import Result, Task


class Generate(NamedTuple):
    """The key of images that are generated together."""

    sampling: SamplingConfig


class Encode(NamedTuple):
    """The key of images that are encoded together."""

    height: int
    width: int


class Decode(NamedTuple):
    """The key of tokens that are decoded together."""

    num_tokens: int
    height: int
    width: int


class ImageItem(NamedTuple):
    """Image `number` of a plain call of the pipeline with `seed`; `stages` are shown on the way."""

    class_id: int
    seed: int
    number: int
    num_tokens: int
    stages: frozenset[int]


class Picture(NamedTuple):
    """An image as its tokens so far show it: (height, width, 3) bytes."""

    tokens: list[int]
    pixels: np.ndarray


def run(pipeline: DetailFlowPipeline, key: object, tasks: Sequence[Task]) -> Iterator[list[Result]]:
    """Compute a batch of one key; see `Batcher`."""
    if isinstance(key, Generate):
        yield from _generate(pipeline, key.sampling, tasks)
    elif isinstance(key, Encode):
        pixels = torch.cat([to_tensor(task.item)[None] for task in tasks])
        yield [Result(i, ids, True) for i, ids in enumerate(pipeline.tokenizer.encode(pixels).tolist())]
    elif isinstance(key, Decode):
        pictures = _pictures(pipeline, torch.tensor([task.item for task in tasks]), (key.height, key.width))
        yield [Result(i, picture, True) for i, picture in enumerate(pictures)]
    else:
        raise TypeError(f"no work is called {key!r}")


def _generate(pipeline: DetailFlowPipeline, sampling: SamplingConfig, tasks: Sequence[Task]) -> Iterator[list[Result]]:
    items: list[ImageItem] = [task.item for task in tasks]
    class_ids = torch.tensor([item.class_id for item in items])
    generators = [image_generator(item.seed, item.number) for item in items]
    last = max(item.num_tokens for item in items)
    for ids in pipeline.gpt.stream(class_ids, sampling, generators, last):
        n = ids.shape[1]
        shown = [
            i for i, item in enumerate(items) if (n == item.num_tokens or n in item.stages) and not tasks[i].cancelled
        ]
        pictures = _pictures(pipeline, ids[shown]) if shown else []
        yield [Result(i, picture, n == items[i].num_tokens) for i, picture in zip(shown, pictures, strict=True)]


def _pictures(pipeline: DetailFlowPipeline, ids: Tensor, size: tuple[int, int] | None = None) -> list[Picture]:
    pixels = to_uint8(pipeline.tokenizer.decode(ids, size=size)).cpu().numpy()
    return [Picture(*both) for both in zip(ids.tolist(), pixels, strict=True)]
