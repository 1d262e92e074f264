"""Training batches of the AR model, drawn from a token store (docs/method.md#ar-model)."""

from collections.abc import Iterator

import numpy as np
import torch

from detailflow.data.batches import BatchOrder
from detailflow.data.tokens import CLEAN, INPUT, LABEL, TokenStore
from detailflow.distributed import World
from detailflow.errors import DetailFlowError


class TokenBatches:
    """Endless training batches from a token store: labels (B,), input (B, N) and target (B, N), all int64.

    Each sample is a random crop of its image; with probability `planted_share` its input and target are the rows
    *input* and *label* (wrong tokens planted, and what should have followed), else *clean* for both. Of an image with
    several labels one is drawn each time. A batch depends on (seed, step) alone, so a resumed run (`start_step`)
    continues exactly. Each rank gets its part of the `batch_size` samples.
    """

    def __init__(
        self,
        store: TokenStore,
        batch_size: int,
        seed: int,
        planted_share: float = 0.3,
        start_step: int = 0,
        world: World = World(),
    ) -> None:
        if not 0.0 <= planted_share <= 1.0:
            raise DetailFlowError(f"planted_share {planted_share} is not possible: it is a probability, 0 to 1")
        self.store, self.planted_share = store, planted_share
        self.order = BatchOrder(len(store), batch_size, seed, start_step)
        self.part = world.shard(batch_size)
        self.steps_per_epoch = self.order.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for key in self.order:
            rng = self.order.batch_rng(key)  # draws for the samples of all processes
            crops = rng.integers(self.store.info.crops, size=len(key.items))[self.part]
            planted = (rng.random(len(key.items)) < self.planted_share)[self.part]
            images = key.items[self.part]
            inputs = self.store.read(images, crops, np.where(planted, INPUT, CLEAN))
            targets = self.store.read(images, crops, np.where(planted, LABEL, CLEAN))
            labels = self.store.labels[images]
            if self.store.all_labels.shape[1] > 1:  # last, so that others draw as they always have
                labels = self.store.draw_labels(images, rng.random(len(key.items))[self.part])
            yield _int64(labels), _int64(inputs), _int64(targets)


def _int64(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
