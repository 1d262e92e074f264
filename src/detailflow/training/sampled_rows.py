"""Rows of codes that an AR model samples, for a decoder on fixed tokens: it learns what such rows look like."""

import torch
import torch.nn.functional as F
from torch import Tensor

from detailflow.device import autocast, precision_dtype
from detailflow.distributed import World
from detailflow.models.gpt import DetailFlowGPT
from detailflow.models.loading import TOKEN_KEYS, require_same
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.progress import progress_bar
from detailflow.training.config import TokenizerTraining

ROWS = 4096  # sampled once, before the first step
_AT_ONCE = 64


class SampledRows:
    """Samples of the AR model `gpt`, of all its classes alike, by its own best sampling; and the decoder of `init`.

    No image belongs to a sampled row. Its loss is the adversarial one, and the distance to what the decoder of `init`
    makes of it: without that anchor the adversarial loss draws dots on flat areas.
    """

    def __init__(self, config: TokenizerTraining, device: torch.device, world: World) -> None:
        assert config.gpt and config.init
        self.device, self.precision = device, precision_dtype(config.loop.precision, device)
        self.count = max(1, round(config.sampled_share * config.loop.batch_size / world.size)) * world.size
        self.shard = world.shard(self.count)
        self.start = DetailFlowTokenizer.from_pretrained(config.init, device=device, dtype=torch.float32)
        self.start.eval().requires_grad_(False)
        gpt = DetailFlowGPT.from_pretrained(config.gpt, device=device, dtype=torch.float32)
        require_same(
            config.model, gpt.config, TOKEN_KEYS, f"{config.gpt} writes other tokens than those of {config.init}"
        )
        generator = torch.Generator().manual_seed(config.loop.seed)
        classes = torch.arange(ROWS) % gpt.config.num_labels
        parts = progress_bar(classes.split(_AT_ONCE), desc="sampled rows", unit="batch", main=world.is_main)
        self.ids = torch.cat([gpt.generate(part, generator=generator) for part in parts])

    def draw(self) -> Tensor:
        """Draw this process's rows of a step, (b, N) codes."""
        return self.ids[torch.randint(len(self.ids), (self.count,))[self.shard].to(self.device)]

    def distance(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Return the mean squared distance of decoded rows, (b, 3, R, R), to the decoder of `init`."""
        with torch.no_grad(), autocast(self.device, self.precision):
            wanted = self.start.decode_quantized(self.start.quantizer.lookup(ids), pixels.shape[-1])
        return F.mse_loss(pixels, wanted.float())
