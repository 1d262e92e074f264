"""Pictures of what a tokenizer has learnt so far."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from detailflow.data.batches import StreamedBatches
from detailflow.data.source import ImageSource
from detailflow.data.streams import StreamSource
from detailflow.data.transforms import to_tensor, to_uint8
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.pictures import grid
from detailflow.training.validation import sample_crops
from detailflow.words import several

PICTURES = 8  # images in each


def some_images(source: ImageSource | StreamSource, size: int) -> Tensor:
    """Return (≤ PICTURES, 3, size, size): the centres of images spread over the set, or the first of a stream."""
    if isinstance(source, StreamSource):
        return next(iter(StreamedBatches(source, size, PICTURES, 0, flip=False, max_scale=1.0, buffer=PICTURES)))[0]
    return to_tensor(sample_crops(source, PICTURES, size))


@torch.no_grad()
def draw_reconstructions(model: DetailFlowTokenizer, originals: Tensor, mistakes: int) -> dict[str, Image.Image]:
    """Draw what 1, c/2, c, N/2 and N tokens make of the images, and what planted mistakes do.

    For the latter: all tokens; a mistake at the first token, and later tokens corrected; the same for the first group.
    """
    schedule, images = model.schedule, originals.to(model.device)
    model.eval()
    patches = model.encode_patches(images)
    z = model.encode_latents(patches, schedule.num_tokens)
    ids = model.quantizer.nearest(z)
    counts = {1, schedule.num_causal // 2, schedule.num_causal, schedule.num_tokens // 2, schedule.num_tokens}
    shown = sorted(counts & set(schedule.valid_counts))
    side = (model.config.image_size,) * 2
    by_count = [F.interpolate(model.decode(ids[:, :n]).float(), side, mode="bilinear") for n in shown]
    mistaken, captions = [model.decode(ids)], [several(schedule.num_tokens, "token")]
    for position in sorted({0, schedule.num_causal if schedule.num_causal < schedule.num_tokens else 0}):
        end = schedule.span_end(position)
        planted = ids.clone()
        planted[:, position:end] = model.plant_mistakes(z[:, position:end], mistakes)
        mistaken += [model.decode(planted), model.decode(model.correct(patches, planted, end))]
        wrong = f"token {end} wrong" if end == position + 1 else f"tokens {position + 1}-{end} wrong"
        captions += [wrong, f"{wrong}\nlater ones corrected"]
    model.train()
    return {
        "reconstructions": _table(originals, by_count, [several(n, "token") for n in shown]),
        "mistakes": _table(originals, mistaken, captions),
    }


def _table(originals: Tensor, columns: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """Lay out a row of pictures for each image: the original, then one of each (B, 3, R, R) with its caption."""
    pixels = [to_uint8(column.float()).cpu().numpy() for column in (originals, *columns)]
    rows = [Image.fromarray(column[i]) for i in range(len(originals)) for column in pixels]
    return grid(rows, len(pixels), ["original", *captions] * len(originals))
