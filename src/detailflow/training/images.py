"""The images that a tokenizer learns from."""

from typing import Any

from detailflow.data.batches import ImageBatches, StreamedBatches
from detailflow.data.images import open_images
from detailflow.data.source import ImageSource
from detailflow.data.streams import StreamSource, open_stream
from detailflow.distributed import World
from detailflow.training.config import TokenizerTraining


def open_source(config: TokenizerTraining) -> ImageSource | StreamSource:
    """Open the images of these settings."""
    opened = open_stream if config.streaming else open_images
    return opened(config.data, split=config.split, **config.columns)


def image_count(source: ImageSource | StreamSource) -> int | None:
    """Return how many images there are, if that is known."""
    return source.num_images if isinstance(source, StreamSource) else len(source)


def crops(
    config: TokenizerTraining,
    source: ImageSource | StreamSource,
    batch_size: int,
    start_step: int = 0,
    world: World = World(),
) -> ImageBatches | StreamedBatches:
    """Return the endless training crops of these settings."""
    kind: Any = StreamedBatches if isinstance(source, StreamSource) else ImageBatches
    size, loop = config.model.image_size, config.loop
    zoom, keep = config.max_scale, loop.image_memory * 2**30
    return kind(source, size, batch_size, loop.seed, loop.workers, start_step, config.flip, zoom, world, keep)
