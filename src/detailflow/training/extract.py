"""Token extraction: every training image's crops as three rows of codes in a token store (docs/method.md#extraction).

Any number of processes share the work by chunks of images, each of which is on disk as a whole or not at all. So the same
command goes on after it was killed. What is random depends on (seed, chunk), and no pass through the tokenizer reaches over a
chunk's end, so that the store's bytes depend neither on the number of processes nor on when they were killed.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detailflow import hub
from detailflow.data.images import ImageSource, open_images, tolerated
from detailflow.data.tokens import TokenStore, TokenStoreInfo, TokenWriter
from detailflow.data.transforms import to_tensor
from detailflow.device import autocast
from detailflow.distributed import World, launched
from detailflow.errors import DetailFlowError
from detailflow.files import lock_folder
from detailflow.models.tokenizer import WRONG_CANDIDATES, DetailFlowTokenizer
from detailflow.training.config import CROPS, PRECISIONS, Extraction
from detailflow.training.passes import draw_position

CHUNK_IMAGES = 512  # what a killed process loses at most; seconds of work on a GPU, so that writing them takes no time


class _ImageCrops(Dataset[tuple[Tensor, Tensor, dict[int, str]]]):
    """Crops (n, C, R, R, 3) in bytes of a pass's images that can be read, their slots (n,), and what is wrong with the others."""

    def __init__(self, source: ImageSource, size: int, crops: str, passes: list[range]) -> None:
        self.source, self.size, self.passes = source, size, passes
        self.make, self.count = CROPS[crops]

    def __len__(self) -> int:
        return len(self.passes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[int, str]]:
        slots: list[int] = []
        unreadable: dict[int, str] = {}
        crops = np.empty((len(self.passes[index]), self.count, self.size, self.size, 3), np.uint8)
        for slot in self.passes[index]:
            try:
                crops[len(slots)] = self.make(self.source.image(slot, least=2 * self.size), self.size)
            except DetailFlowError as error:
                unreadable[slot] = str(error)
            else:
                slots.append(slot)
        return torch.from_numpy(crops[: len(slots)]), torch.tensor(slots, dtype=torch.int64), unreadable


def code_rows(
    model: DetailFlowTokenizer,
    images: Tensor,
    positions: Tensor,
    generator: torch.Generator,
    mistakes: int = WRONG_CANDIDATES,
) -> Tensor:
    """Return three rows of codes of each image: clean, input (planted mistakes, corrected), label (docs/method.md#extraction).

    Args:
        images: (B, 3, R, R) pixels in [-1, 1].
        positions: (B,) p of each image, below c or the start of a group.
        generator: draws g numbers for each image in turn.
        mistakes: how many nearest codes the planted ones are drawn from.

    Returns:
        (B, 3, N) int64.
    """
    schedule, n, g = model.schedule, model.config.num_tokens, model.config.group_size
    patches = model.encode_patches(images)
    z = model.encode_latents(patches, n)
    clean = model.quantizer.nearest(z)
    at, starts = torch.arange(n), positions[:, None]
    ends = torch.tensor([schedule.span_end(p) for p in positions.tolist()])[:, None]
    planted = ((at >= starts) & (at < ends)).to(images.device)
    within = (at - starts).clamp(0, g - 1).to(images.device)
    around = (starts + torch.arange(g)).clamp(max=n - 1).to(images.device)  # (B, g): all that can be planted
    wrong = model.plant_mistakes(z.gather(1, around[..., None].expand(-1, -1, z.shape[-1])), mistakes, generator)
    given = torch.where(planted, wrong.gather(1, within), clean)
    ends = ends.to(images.device)
    corrected = model.quantizer.nearest(model.correct_latents(patches, given, ends))
    given = torch.where(at.to(images.device) < ends, given, corrected)
    return torch.stack((clean, given, torch.where(planted, clean, given)), 1)


def extract(config: Extraction, output: Path, device: str | None = None) -> TokenStore:
    """Write the token store at `output`, or what is missing of it, and return it.

    `batch_size` and `workers` may differ from an earlier run's. The codes are the same for any `batch_size`, but for two codes
    that are equally near within rounding.

    Raises:
        DetailFlowError: for images or a tokenizer that cannot be read, or an output folder that cannot be used or holds
            the tokens of something else.
    """
    world, place = launched(device)
    with world.raise_together():
        model = DetailFlowTokenizer.from_pretrained(config.tokenizer, device=place)
        source = open_images(
            config.data, split=config.split, image_column=config.image_column, label_column=config.label_column
        )
        info = TokenStoreInfo(
            num_tokens=model.config.num_tokens,
            codebook_size=model.config.codebook_size,
            crops=CROPS[config.crops][1],
            class_names=source.class_names,
            tokenizer_fingerprint=tokenizer_fingerprint(config.tokenizer),
        )
        writer = TokenWriter(output, info, source.labels, CHUNK_IMAGES)
    with ExitStack() as stack:
        if not world.from_main(lambda: writer.finished):  # a finished one may be on a disk that is not ours to write to
            stack.enter_context(lock_folder(output, "extraction", world))
        return _extract(config, model, source, writer, world)


def _extract(
    config: Extraction, model: DetailFlowTokenizer, source: ImageSource, writer: TokenWriter, world: World
) -> TokenStore:
    output = writer.directory
    with world.raise_together():
        if world.is_main:
            same = {k: v for k, v in asdict(config).items() if k not in ("data", "tokenizer", "batch_size", "workers")}
            writer.begin(image_names(source, config.data), same)
    if world.from_main(lambda: writer.finished):
        if world.is_main:
            print(f"{output}: these tokens are finished already")
        return TokenStore.open(output)
    _Extractor(config, model, source, writer, world).run()
    with world.raise_together():
        if world.is_main:
            writer.finish()
    return TokenStore.open(output)


def image_names(source: ImageSource, data: str) -> Iterator[str]:
    """The images' names, within the folder that they were found in, if it is on this machine."""
    path = Path(data).expanduser()
    if not path.is_dir():  # a file, or a pattern of files
        path = next((parent for parent in path.parents if not set("*?[{") & set(str(parent))), path.parent)
    folder = f"{path}/" if path != Path() and path.is_dir() else ""
    return (source.name(slot).removeprefix(folder) for slot in range(len(source)))


class _Extractor:
    """This process's part of the chunks that are not on disk."""

    def __init__(
        self,
        config: Extraction,
        model: DetailFlowTokenizer,
        source: ImageSource,
        writer: TokenWriter,
        world: World,
    ) -> None:
        self.config, self.model, self.source, self.writer, self.world = config, model, source, writer, world
        written = writer.written()
        there = torch.tensor(
            [chunk in written for chunk in range(writer.chunks)], dtype=torch.int32, device=world.device
        )
        there = world.all_gather(there)[: writer.chunks]  # as the main process sees it
        self.todo = (there == 0).nonzero()[:, 0].tolist()
        self.unreadable = writer.unreadable() if world.is_main else {}  # the others know their own

    @torch.no_grad()
    def run(self) -> None:
        """Extract them, the n-th of each process at about the same time."""
        from tqdm import tqdm

        count, total = self.world.size, len(self.source)
        mine = self.todo[self.world.rank :: count]
        passes = [part for chunk in mine for part in self._passes(chunk)]
        cuda = self.model.device.type == "cuda"
        data = _ImageCrops(self.source, self.model.config.image_size, self.config.crops, passes)
        self.batches = iter(DataLoader(data, batch_size=None, num_workers=self.config.workers, pin_memory=cuda))
        done = total - sum(len(self.writer.slots(chunk)) for chunk in self.todo)
        if done and self.world.is_main:
            print(f"{self.writer.directory}: going on after {done} of {total} images")
        hidden = not self.world.is_main
        with tqdm(
            total=total, initial=done, desc="extract", unit="img", dynamic_ncols=True, disable=hidden
        ) as self.bar:
            for first in range(0, len(self.todo), count):
                chunks = self.todo[first : first + count]
                with self.world.raise_together():
                    if self.world.rank < len(chunks):
                        self._extract(chunks[self.world.rank], len(chunks))
                self._stop_at_too_many(chunks)
                done += sum(len(self.writer.slots(chunk)) for chunk in chunks)
                self.bar.update(done - self.bar.n)
            if self.world.is_main and (unreadable := self.writer.unreadable()):
                self.bar.write(f"{len(unreadable)} of {total} images could not be read and were left out")

    def _passes(self, chunk: int) -> list[range]:
        slots, size = self.writer.slots(chunk), self.config.images_per_pass
        return [slots[first : first + size] for first in range(0, len(slots), size)]

    def _extract(self, chunk: int, at_once: int) -> None:
        config, model, info, slots = self.config, self.model, self.writer.info, self.writer.slots(chunk)
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((config.seed, chunk)).generate_state(1)[0])
        )
        draws = [draw_position(model.schedule, info.num_tokens, generator) or 0 for _ in slots]
        positions = torch.tensor(draws)
        unreadable: dict[int, str] = {}
        rows = []
        for part in self._passes(chunk):
            crops, found, problems = next(self.batches)
            unreadable |= problems
            for problem in problems.values():
                self.bar.write(f"skipped: {problem}")
            if len(found):
                # The device makes floats of the bytes, and its codes stay there until the chunk's end: it need not wait for us.
                images = to_tensor(crops.to(model.device, non_blocking=True).flatten(0, 1))
                p = positions[found - slots.start].repeat_interleave(info.crops)
                with autocast(model.device, PRECISIONS[config.precision]):
                    rows.append((found, code_rows(model, images, p, generator, config.mistakes)))
            self.bar.update(len(part) * at_once)
        codes = np.zeros((len(slots), *info.codes_shape), np.int64)
        if rows:
            readable = torch.cat([found for found, _ in rows]).numpy() - slots.start
            codes[readable] = torch.cat([made for _, made in rows]).unflatten(0, (-1, info.crops)).cpu().numpy()
        self.writer.write(chunk, codes, unreadable)
        self.unreadable |= unreadable

    def _stop_at_too_many(self, chunks: list[int]) -> None:
        """Raises DetailFlowError in all processes where more than 1% (and more than one) of the images cannot be read."""
        own = torch.tensor([len(self.unreadable)], device=self.world.device)
        count = int(self.world.all_gather(own).sum())
        if count <= tolerated(len(self.source)):
            return
        first = "; ".join(list(self.writer.unreadable().values())[:3])
        self.world.barrier()  # until all have read that
        if self.world.rank < len(chunks):
            self.writer.forget(chunks[self.world.rank])  # the images may be put right
        raise DetailFlowError(
            f"{count} images cannot be read, more than 1%: remove or replace them (the first: {first})"
        )


def tokenizer_fingerprint(path_or_id: str | Path) -> str:
    """What ties a token store to the tokenizer that made it."""
    return hub.fingerprint(*hub.load(path_or_id, "tokenizer"))
