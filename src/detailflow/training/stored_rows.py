"""Batches for a decoder on fixed tokens: crops of images, and the rows of codes that a token store has of them."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detailflow.data.batches import BatchKey, BatchOrder, outlive_signals
from detailflow.data.source import ImageSource
from detailflow.data.streams import StreamSource
from detailflow.data.tokens import CLEAN, INPUT, TokenStore
from detailflow.distributed import World
from detailflow.errors import DetailFlowError
from detailflow.training.config import LoopConfig, TokenizerTraining
from detailflow.training.extract import encoded_crops, image_names, made_by


class StoredRows(Dataset[tuple[Tensor, Tensor, Tensor] | str]):
    """The crops that were encoded, each with its clean row and the one with planted mistakes and what corrects them."""

    def __init__(
        self, config: TokenizerTraining, source: ImageSource | StreamSource, validation: ImageSource | None = None
    ) -> None:
        assert config.tokens and config.init
        if isinstance(source, StreamSource):
            raise DetailFlowError("tokens goes with images that are not streamed: set streaming to false")
        self.store = TokenStore.open_for_training(config.tokens)
        self.source, self.size = source, config.model.image_size
        if not config.flip and self.store.info.crops % 2 == 0:
            raise DetailFlowError(
                f"{config.tokens} has tokens of mirror images: extract them with --flip false, or set flip to true"
            )
        if not made_by(self.store, config.init):
            raise DetailFlowError(
                f"{config.tokens} has tokens of another tokenizer than {config.init}: extract them again"
            )
        places = {name: index for index, name in enumerate(image_names(source, config.data))}
        names = self.store.ids()
        if missing := next((name for name in names if name not in places), None):
            where = f"is not among the images {config.data}"
            if config.val_share and validation and missing in image_names(validation, config.data):
                where = f"val_share {config.val_share} holds out: repeat the val_share of the tokens"
            raise DetailFlowError(f"{config.tokens} has tokens of {missing}, which {where}")
        self.places = [places[name] for name in names]
        self.store.check_images(source.stamps[self.places], f"extract those of {config.data}")

    def batches(self, loop: LoopConfig, start_step: int, world: World) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Return endless batches of this process: bytes (B, R, R, 3), labels (B,) and rows (B, 2, N)."""
        self.order = BatchOrder(len(self.store), loop.batch_size, loop.seed, start_step)
        self.shard = world.shard(loop.batch_size)
        loader = DataLoader(
            self, sampler=self.order, batch_size=None, num_workers=loop.workers, worker_init_fn=outlive_signals
        )
        for batch in loader:
            if isinstance(batch, str):
                raise DetailFlowError(batch)
            yield batch

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Tensor, Tensor] | str:
        """Return a batch, or what is wrong with one of its images, as a worker would wrap an error in a traceback."""
        images = key.items[self.shard]
        crops = self.order.batch_rng(key).integers(self.store.info.crops, size=len(key.items))[self.shard]
        try:
            pixels = [
                encoded_crops(self.source, self.places[image], self.size, self.store.info.crops)[crop]
                for image, crop in zip(images.tolist(), crops.tolist(), strict=True)
            ]
        except DetailFlowError as error:
            return str(error)
        codes = np.stack([self.store.read(images, crops, np.full(len(images), row)) for row in (CLEAN, INPUT)], 1)
        labels = self.store.labels[images]
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(labels), torch.from_numpy(codes.astype(np.int64))
