"""Token extraction: every training image's crops as three rows of codes in a token store (docs/method.md#extraction).

The work is split by chunks of images, each on disk as a whole or not at all, so the same command goes on after it was
killed. What is random depends on (seed, chunk), and no pass through the tokenizer crosses a chunk's end, so the store's
bytes depend neither on the number of processes nor on when they were killed.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detailflow import hub
from detailflow.data.images import open_images
from detailflow.data.source import ImageSource, tolerated
from detailflow.data.token_writer import DECODER, TokenWriter, begun_store
from detailflow.data.tokens import VALIDATION, TokenStore, TokenStoreInfo
from detailflow.data.transforms import crops_of, to_tensor
from detailflow.device import autocast, precision_dtype
from detailflow.distributed import World, launched
from detailflow.errors import DetailFlowError
from detailflow.files import lock_folder
from detailflow.machine import keep_freed_memory
from detailflow.models.ids import all_finite
from detailflow.models.tokenizer import WRONG_CANDIDATES, DetailFlowTokenizer
from detailflow.progress import LONG_RUN, progress_bar
from detailflow.training.config import Extraction
from detailflow.training.passes import draw_position
from detailflow.training.validation import split

_log = logging.getLogger(__name__)
CHUNK_IMAGES = 512  # what a killed process loses at most; seconds of work on a GPU, so that writing them takes no time
CHUNKS, LEAST_CHUNK = 32, 64  # of a small set, which may be on a CPU: there 512 images take minutes


class _ImageCrops(Dataset[tuple[Tensor, Tensor, dict[int, str]]]):
    """Load a pass's images: crops (n, C, R, R, 3) in bytes, slots (n,), and what is wrong with unreadable ones."""

    def __init__(self, source: ImageSource, size: int, count: int, passes: list[range]) -> None:
        self.source, self.size, self.count, self.passes = source, size, count, passes

    def __len__(self) -> int:
        return len(self.passes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[int, str]]:
        slots: list[int] = []
        unreadable: dict[int, str] = {}
        crops = np.empty((len(self.passes[index]), self.count, self.size, self.size, 3), np.uint8)
        for slot in self.passes[index]:
            try:
                crops[len(slots)] = encoded_crops(self.source, slot, self.size, self.count)
            except DetailFlowError as error:
                unreadable[slot] = str(error)
            else:
                slots.append(slot)
        return torch.from_numpy(crops[: len(slots)]), torch.tensor(slots, dtype=torch.int64), unreadable


def encoded_crops(source: ImageSource, index: int, size: int, count: int) -> np.ndarray:
    """Return an image's crops (count, size, size, 3) as they are encoded: a large JPEG is read at about twice that."""
    return crops_of(source.image(index, least=2 * size), size, count)


def code_rows(
    model: DetailFlowTokenizer,
    images: Tensor,
    positions: Tensor,
    generator: torch.Generator,
    mistakes: int = WRONG_CANDIDATES,
    search: int = 0,
) -> Tensor:
    """Return three rows of codes of each image: clean, input (mistakes, corrected), label (docs/method.md#extraction).

    Args:
        images: (B, 3, R, R) pixels in [-1, 1].
        positions: (B,) p of each image, below c or the start of a group.
        generator: draws g numbers for each image in turn.
        mistakes: how many nearest codes the planted ones are drawn from.
        search: steps of a search for better codes, both for the clean ones and for those after mistakes.

    Returns:
        (B, 3, N) int64.
    """
    schedule, n, g = model.schedule, model.config.num_tokens, model.config.group_size
    patches = model.encode_patches(images)
    z = all_finite("the encoder's latents", model.encode_latents(patches, n))
    clean = model.search(images, z, search)
    at, starts = torch.arange(n), positions[:, None]
    ends = torch.tensor([schedule.span_end(p) for p in positions.tolist()])[:, None]
    planted = ((at >= starts) & (at < ends)).to(images.device)
    within = (at - starts).clamp(0, g - 1).to(images.device)
    around = (starts + torch.arange(g)).clamp(max=n - 1).to(images.device)  # (B, g): all that can be planted
    wrong = model.plant_mistakes(z.gather(1, around[..., None].expand(-1, -1, z.shape[-1])), mistakes, generator)
    given = torch.where(planted, wrong.gather(1, within), clean)
    z = model.correct_latents(patches, given, ends.to(images.device))
    written = (at < ends).to(images.device)
    given = model.search(images, z, search, torch.where(written, given, -1))
    return torch.stack((clean, given, torch.where(planted, clean, given)), 1)


def extract(config: Extraction, output: Path, device: str | None = None) -> TokenStore:
    """Write the token store at `output`, or what is missing of it, and return it.

    Images that are held out for validation get a store of their own inside. `batch_size` and `workers` may differ from
    an earlier run's. The codes are the same for any `batch_size`, unless two are equally near within rounding (which
    are more of them with `search`).
    """
    world, chosen = launched(device)
    keep_freed_memory()
    with world.raise_together():
        model = DetailFlowTokenizer.from_pretrained(config.tokenizer, device=chosen, dtype=torch.float32)
        everything = open_images(config.data, split=config.split, **config.columns)
        noted, names = begun_store(output).get("tokenizer_fingerprint"), codes_fingerprints(config.tokenizer)
        newest = next(names)
        info = TokenStoreInfo(
            num_tokens=model.config.num_tokens,
            codebook_size=model.config.codebook_size,
            crops=config.num_crops,
            class_names=everything.class_names,
            tokenizer_fingerprint=noted if noted not in (None, newest) and noted in names else newest,
        )
    settings = {name: value for name, value in asdict(config).items() if name not in ("data", "tokenizer", "val_data")}
    decoder = hub.fingerprint({}, model.decoder.state_dict()) if config.search else None  # by which codes are searched
    world.check_same({"their tokenizer": info.tokenizer_fingerprint, DECODER: decoder, **settings})
    source, validation = split(config, everything, world)
    sources = {output: source} if validation is None else {output / VALIDATION: validation, output: source}
    stamps = {path: world.from_main(lambda one=one: one.stamps) for path, one in sources.items()}  # type: ignore[misc]
    with world.raise_together():
        writers = {
            path: TokenWriter(path, info, one.all_labels, chunk_images(path, one), stamps[path])
            for path, one in sources.items()
        }
        if validation is None and (output / VALIDATION).exists() and not writers[output].finished:
            raise DetailFlowError(
                f"{output / VALIDATION} is left from an extraction that held out images, and this one would train on "
                "them: repeat its val_share or val_data, remove that folder, or choose another output"
            )
    with ExitStack() as stack:
        if not world.from_main(lambda: all(writer.finished for writer in writers.values())):
            stack.enter_context(lock_folder(output, "extraction", world))  # a finished one may be on a read-only disk
        for path, one in reversed(sources.items()):  # the whole store first: if it is another's, nothing is written
            _begin(config, one, writers[path], world, decoder)
        for path, one in sources.items():  # last, as it is what says that all is finished
            _extract(config, model, one, writers[path], world)
    return TokenStore.open(output)


def chunk_images(folder: Path, source: ImageSource) -> int:
    """Return how many images a chunk has: as many as in what was begun in the folder, else fewer in a small set."""
    return begun_store(folder).get("chunk_images") or min(CHUNK_IMAGES, max(LEAST_CHUNK, len(source) // CHUNKS))


def _begin(config: Extraction, source: ImageSource, writer: TokenWriter, world: World, decoder: str | None) -> None:
    with world.raise_together():
        if world.is_main:
            # What may differ, or is known by content.
            free = {"data", "tokenizer", "batch_size", "workers", "val_data", "val_split", "val_share"}
            settings = {name: value for name, value in asdict(config).items() if name not in free} | {DECODER: decoder}
            validates = writer.directory.name == VALIDATION and config.val_data
            writer.begin(image_names(source, validates or config.data), settings)


def _extract(
    config: Extraction, model: DetailFlowTokenizer, source: ImageSource, writer: TokenWriter, world: World
) -> None:
    if world.from_main(lambda: writer.finished):
        if world.is_main:
            _log.info("%s: these tokens are finished already", writer.directory)
        return
    _Extractor(config, model, source, writer, world).run()
    with world.raise_together():
        if world.is_main:
            writer.finish()


def image_names(source: ImageSource, data: str) -> Iterator[str]:
    """Yield the images' names, relative to the folder that they are in, if it is on this machine."""
    path = Path(data).expanduser()
    if not path.is_dir():  # a file, or a pattern of files
        path = next((parent for parent in path.parents if not set("*?[{") & set(str(parent))), path.parent)
    folder = f"{path}{os.sep}" if path.is_dir() else ""
    return (source.name(slot).removeprefix(folder).replace(os.sep, "/") for slot in range(len(source)))


class _Extractor:
    """Extract this rank's part of the chunks that are not on disk."""

    def __init__(
        self,
        config: Extraction,
        model: DetailFlowTokenizer,
        source: ImageSource,
        writer: TokenWriter,
        world: World,
    ) -> None:
        self.config, self.model, self.source, self.writer, self.world = config, model, source, writer, world
        written = world.from_main(writer.written)
        self.todo = [chunk for chunk in range(writer.chunks) if chunk not in written]
        self.unreadable = writer.unreadable() if world.is_main else {}  # the others know their own

    @torch.no_grad()
    def run(self) -> None:
        """Extract them, the n-th of each rank at about the same time."""
        count, total = self.world.size, len(self.source)
        mine = self.todo[self.world.rank :: count]
        passes = [part for chunk in mine for part in self._passes(chunk)]
        cuda = self.model.device.type == "cuda"
        data = _ImageCrops(self.source, self.model.config.image_size, self.config.num_crops, passes)
        self.batches = iter(DataLoader(data, batch_size=None, num_workers=self.config.workers, pin_memory=cuda))
        done = total - sum(len(self.writer.slots(chunk)) for chunk in self.todo)
        if done and self.world.is_main:
            _log.info("%s: going on after %d of %d images", self.writer.directory, done, total)
        desc = "tokens (held out)" if self.writer.directory.name == VALIDATION else "tokens"
        with progress_bar(
            desc=desc, unit="img", total=total, main=self.world.is_main, initial=done, **LONG_RUN
        ) as self.bar:
            try:
                for first in range(0, len(self.todo), count):
                    chunks = self.todo[first : first + count]
                    with self.world.raise_together():
                        if self.world.rank < len(chunks):
                            self._extract(chunks[self.world.rank], len(chunks))
                    self._stop_at_too_many(chunks)
                    done += sum(len(self.writer.slots(chunk)) for chunk in chunks)
                    self.bar.update(done - self.bar.n)
            except KeyboardInterrupt as stop:
                at = f"interrupted after the tokens of {done} of {total} images: the same command goes on from there"
                raise KeyboardInterrupt(*([at] if self.world.is_main else [])) from stop
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
                # The device makes floats of the bytes, and keeps the codes until the chunk's end, so it need not wait.
                images = to_tensor(crops.to(model.device, non_blocking=True).flatten(0, 1))
                p = positions[found - slots.start].repeat_interleave(info.crops)
                with autocast(model.device, precision_dtype(config.precision, model.device)):
                    rows.append((found, code_rows(model, images, p, generator, config.mistakes, config.search)))
            self.bar.update(len(part) * at_once)
        codes = np.zeros((len(slots), *info.codes_shape), np.int64)
        if rows:
            readable = torch.cat([found for found, _ in rows]).numpy() - slots.start
            codes[readable] = torch.cat([made for _, made in rows]).unflatten(0, (-1, info.crops)).cpu().numpy()
        self.writer.write(chunk, codes, unreadable)
        self.unreadable |= unreadable

    def _stop_at_too_many(self, chunks: list[int]) -> None:
        """Raise an error on all ranks if more than 1% (and more than one) of the images cannot be read."""
        count = sum(self.world.gather(len(self.unreadable)))
        if count <= tolerated(len(self.source)):
            return
        first = "; ".join(list(self.writer.unreadable().values())[:3])
        self.world.barrier()  # until all have read that
        if self.world.rank < len(chunks):
            self.writer.forget(chunks[self.world.rank])  # the images may be put right
        written = self.writer.written() if self.world.is_main else set()
        if len(written) * self.writer.chunk_images < CHUNK_IMAGES:  # little is lost, and they may be removed, too
            for chunk in written:
                self.writer.forget(chunk)
        with self.world.raise_together():
            raise DetailFlowError(
                f"{count} images cannot be read, more than 1%: remove or replace them (the first: {first})"
            )


def codes_fingerprints(path_or_id: str | Path) -> Iterator[str]:
    """Yield what ties tokens to their tokenizer: a checksum of its weights but for the decoder, which may learn on.

    It is of the weights in float32, which encode, whatever they are stored as. After it come the checksums that earlier
    versions noted in its place: of the weights as they are stored, and of all of them.
    """
    config, tensors = hub.load(path_or_id, "tokenizer")
    kept = {name: value for name, value in config.items() if name not in ("decoder", "pixel_channels")}
    encoding = {name: x for name, x in tensors.items() if not name.startswith("decoder.")}
    yield hub.fingerprint(kept, encoding, torch.float32)
    yield hub.fingerprint(kept, encoding)
    yield hub.fingerprint(config, tensors)


def made_by(store: TokenStore, path_or_id: str | Path) -> bool:
    """Return whether a store's tokens are those of a tokenizer."""
    return store.info.tokenizer_fingerprint in codes_fingerprints(path_or_id)
