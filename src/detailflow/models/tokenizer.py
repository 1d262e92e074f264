"""The 1-D tokenizer (Sec. 3.1 and 3.3): an image to an ordered token sequence, and its first n tokens back."""

import copy
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from detailflow import graphs
from detailflow.data.transforms import to_uint8
from detailflow.device import to_device, within_memory
from detailflow.errors import DetailFlowError
from detailflow.models.ids import all_finite, check_plain, checked_ids
from detailflow.models.layers import (
    Block,
    KeyValue,
    ViTConfig,
    cosine_grid,
    has_patches,
    initial_normal,
    initial_positions,
    patchify,
    resize_grid,
    resize_positions,
    run_blocks,
    unpatchify,
)
from detailflow.models.pretrained import Pretrained
from detailflow.models.quantizer import VectorQuantizer
from detailflow.schedule import TokenSchedule
from detailflow.settings import Must, NotNegativeInt, PositiveInt, Settings, checked

POSITION_SCALE = 0.5  # std of query tokens and positions at the start: as large as what is added to them
LARGEST_PIXEL = 1.5  # 1 is white, and the output of a decoder or a resize goes somewhat beyond
SEARCHED = 2**21  # numbers of one of the decoder's activations that a search works on at once
WRONG_CANDIDATES = 50  # a planted mistake is one of this many nearest codes (docs/method.md#self-correction)


@dataclass(frozen=True)
class TokenizerConfig(Settings):
    """Sizes of a `DetailFlowTokenizer` (docs/method.md#symbols); the defaults are those of DetailFlow-16.

    >>> config = TokenizerConfig(encoder=ViTConfig(64, 2, 4), decoder=ViTConfig(64, 2, 4), image_size=64, num_tokens=32)
    >>> config.schedule.decode_size(8), config.schedule.decode_size(32)
    (32, 64)

    The last three are neither in the paper nor in the published layout (docs/method.md#beyond-the-paper).

    Attributes:
        encoder: sizes of the encoder.
        decoder: sizes of the decoder.
        image_size: R, side of the images in pixels.
        patch_size: f, side of a patch in pixels.
        num_tokens: N, tokens of an image.
        group_size: g, tokens predicted in parallel.
        causal_tokens: c, tokens before the groups; null is g.
        alpha: exponent of the resolution map.
        codebook_size: K, number of codes.
        codebook_dim: d, dimensions of a code.
        causal_encoder: queries attend to earlier ones only; if false to all, the baseline of the paper's table 2.
        linear_path: add a learned linear map beside attention; from patches to queries, and from codes to the canvas.
        pixel_channels: numbers per pixel from the last linear layer; above 3, two small convolutions turn them into
            the picture, across patch edges.
        absent_token: a learned vector for tokens that are not given; so a few tokens can be decoded at full size
            (nested dropout: FlexTok, arXiv 2502.13967).
    """

    encoder: ViTConfig
    decoder: ViTConfig
    image_size: int = 256
    patch_size: int = 16
    num_tokens: int = 128
    group_size: int = 8
    causal_tokens: int | None = None
    alpha: float = 1.5
    codebook_size: PositiveInt = 8192
    codebook_dim: PositiveInt = 8
    causal_encoder: bool = True
    linear_path: bool = False
    pixel_channels: Annotated[int, Must("3 (no convolutions) or more", lambda value: value >= 3)] = 3
    absent_token: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "causal_tokens", self.schedule.causal_tokens)

    @property
    def schedule(self) -> TokenSchedule:
        """The order of the tokens and the resolutions they stand for."""
        return TokenSchedule(
            self.num_tokens, self.group_size, self.causal_tokens, self.image_size, self.patch_size, self.alpha
        )


class Patches(NamedTuple):
    """An image's patches as every set of queries uses them."""

    blocks: list[KeyValue]  # keys and values in each block
    linear: Tensor | None  # (B, N, width): what the linear path adds to the queries

    @property
    def images(self) -> int:
        """B."""
        return len(self.blocks[0][0])

    def first(self, images: int) -> "Patches":
        """Return those of the first images."""
        blocks = [(k[:images], v[:images]) for k, v in self.blocks]
        return Patches(blocks, None if self.linear is None else self.linear[:images])


class Encoder(nn.Module):
    """Image patches, which are computed once per image, and one or two passes of queries, in one transformer."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width, patch = config.encoder.width, config.patch_size
        self.patch_size, self.causal = patch, config.causal_encoder
        self.patch_embed = nn.Linear(patch * patch * 3, width)
        self.pos_embed = nn.Parameter(initial_positions(width))
        self.query_tokens = initial_normal(config.num_tokens, width, std=POSITION_SCALE)
        self.refined_tokens = initial_normal(config.num_tokens, width, std=POSITION_SCALE)
        self.query_pos_embed = initial_normal(config.num_tokens, width, std=POSITION_SCALE)
        self.refine = nn.Linear(config.codebook_dim, width)
        self.blocks = nn.ModuleList(Block(config.encoder) for _ in range(config.encoder.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear: nn.Parameter | None = None
        if config.linear_path:
            grid = 0.5 * cosine_grid(config.num_tokens)
            grid[0] = 1 / (8 * grid.shape[1])  # the mean of all patches
            self.linear = nn.Parameter(grid)

    def patches(self, images: Tensor, native: bool = False) -> Patches:
        """(B, 3, H, W) pixels → their patches in every block; `native` as for `run_blocks`."""
        rows, columns = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        embedded = self.patch_embed(patchify(images, self.patch_size))
        linear = None
        if self.linear is not None:  # scaled to be as large on any grid as on its own
            scale = self.linear.shape[1] / (rows * columns) ** 0.5
            linear = (resize_grid(self.linear, rows, columns) * scale).to(embedded.dtype) @ embedded
        x = embedded + resize_positions(self.pos_embed, rows, columns)
        return Patches(run_blocks(self.blocks, x, keep=True, native=native)[1], linear)

    def queries(self, queries: Tensor, patches: Patches, schedule: TokenSchedule, native: bool = False) -> Tensor:
        """(B, n, width) queries without positions → (B, n, width) latents."""
        n, mask = queries.shape[1], None
        if self.causal:
            mask = torch.ones(n, patches.blocks[0][0].shape[2] + n, dtype=torch.bool, device=queries.device)
            mask[:, -n:] = schedule.attention_mask(n, queries.device)
        x = queries + self.query_pos_embed[:n]
        return self.norm(run_blocks(self.blocks, x, patches.blocks, mask, native=native)[0])


class Decoder(nn.Module):
    """Mask tokens, one per output patch, and latents in one transformer without an attention mask."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width, patch = config.decoder.width, config.patch_size
        self.patch_size = patch
        self.project = nn.Linear(config.codebook_dim, width)
        self.latent_pos_embed = initial_normal(config.num_tokens, width, std=POSITION_SCALE)
        self.mask_token = initial_normal(width, std=POSITION_SCALE)
        self.pos_embed = nn.Parameter(initial_positions(width))
        self.blocks = nn.ModuleList(Block(config.decoder) for _ in range(config.decoder.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_pixels = nn.Linear(width, patch * patch * config.pixel_channels)
        self.linear = nn.Parameter(cosine_grid(config.num_tokens)) if config.linear_path else None
        self.absent = initial_normal(width, std=POSITION_SCALE) if config.absent_token else None
        self.refine_pixels: nn.Module | None = None
        if config.pixel_channels > 3:
            first, last = (nn.Conv2d(config.pixel_channels, out, 3, padding=1) for out in (config.pixel_channels, 3))
            self.refine_pixels = nn.Sequential(first, nn.GELU(), last)

    def forward(self, quantized: Tensor, height: int, width: int, native: bool = False) -> Tensor:
        """(B, n, d) unit vectors → (B, 3, height, width) pixels; `native` as for `run_blocks`."""
        return self.picture(self.canvas(quantized, height, width, native=native), height, width)

    def canvas(
        self, quantized: Tensor, height: int, width: int, present: Tensor | None = None, native: bool = False
    ) -> Tensor:
        """As `forward`, but return (B, patches, width) outputs of the transformer, one per patch."""
        rows, columns = height // self.patch_size, width // self.patch_size
        projected = self.project(quantized)
        latents = projected + self.latent_pos_embed[: quantized.shape[1]]
        if self.absent is not None:
            latents, projected = self._with_absent(latents, projected, present)
        canvas = self.mask_token + resize_positions(self.pos_embed, rows, columns)
        canvas = canvas.expand(latents.shape[0], -1, -1).to(latents.dtype)
        if self.linear is not None:
            linear = resize_grid(self.linear, rows, columns)[: projected.shape[1]].T
            canvas = canvas + linear.to(projected.dtype) @ projected
        x, _ = run_blocks(self.blocks, torch.cat((canvas, latents), 1), native=native)
        return self.norm(x[:, : rows * columns])

    def picture(self, canvas: Tensor, height: int, width: int) -> Tensor:
        """Return (B, 3, height, width) pixels of what `canvas` returns."""
        pixels = unpatchify(self.to_pixels(canvas), height, width, self.patch_size)
        return pixels if self.refine_pixels is None else pixels[:, :3] + self.refine_pixels(pixels)

    def _with_absent(self, latents: Tensor, projected: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """Put the learned vector in place of absent latents (B, n, width), up to all N; they have no linear path."""
        assert self.absent is not None
        absent = self.absent.to(latents.dtype)
        if present is not None:
            latents = torch.where(present[..., None], latents, absent)
            projected = projected * present[..., None].to(projected.dtype)
        missing = len(self.latent_pos_embed) - latents.shape[1]
        return torch.cat((latents, absent.expand(len(latents), missing, -1)), 1), projected


class DetailFlowTokenizer(Pretrained):
    """Images to token sequences and back; see `encode`, `decode` and `encode_correction`.

    >>> tokenizer = DetailFlowTokenizer.from_pretrained(device="cpu")  # the model in the package
    >>> images = torch.zeros(2, 3, 32, 32)  # grey, in [-1, 1]
    >>> ids = tokenizer.encode(images)
    >>> ids.shape, tokenizer.decode(ids[:, :8]).shape
    (torch.Size([2, 48]), torch.Size([2, 3, 8, 8]))
    """

    kind, config_type = "tokenizer", TokenizerConfig
    keys: ClassVar = dict.fromkeys(
        ("encoder.query_tokens", "encoder.refined_tokens", "encoder.query_pos_embed", "decoder.latent_pos_embed"),
        "num_tokens",
    ) | {"quantizer.codebook": "codebook_size"}
    config: TokenizerConfig

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        self.schedule = config.schedule
        self.encoder = Encoder(config)
        self.quantizer = VectorQuantizer(config.encoder.width, config.codebook_size, config.codebook_dim)
        self.decoder = Decoder(config)
        self.apply(_initialise)

    def fingerprint(self) -> str:
        """Return what names its tokens, to token files and AR models: a checksum of the encoder's and codebook's signs.

        No rounding to another dtype changes it, and a decoder may learn on.
        """
        return self._checksum({name: x for name, x in self.state_dict().items() if not name.startswith("decoder.")})

    @torch.no_grad()
    def encode(self, images: Tensor, *, num_tokens: int | None = None, search: int = 0) -> Tensor:
        """Encode images: (B, 3, H, W) pixels in [-1, 1] → (B, n) int64 codes, the first `num_tokens` (`None` is all N).

        H and W are usually R. Other multiples of f work as well; those with √(H·W) near R suit the model best.
        `search` takes so many steps to find codes that rebuild the images better, all N of them together
        (docs/method.md#code-search).
        """
        return deque(self.encode_steps(images, num_tokens, search), maxlen=1)[0]

    @torch.no_grad()
    def encode_steps(self, images: Tensor, num_tokens: int | None = None, search: int = 0) -> Iterator[Tensor]:
        """As `encode`, but yield the codes so far, those of the encoder first and then after each step of a search."""
        n, search = self.schedule.check_count(num_tokens), checked("search", search, NotNegativeInt)
        if search:
            self.schedule.check_all(n, "a search")
        images = self._checked(images)
        z = all_finite("the encoder's latents", self.encode_latents(self.encode_patches(images), n))
        yield from self.search_steps(images, z, search)

    def search(self, images: Tensor, z: Tensor, steps: int, given: Tensor | None = None) -> Tensor:
        """Return the last of `search_steps`."""
        return deque(self.search_steps(images, z, steps, given), maxlen=1)[0]

    def search_steps(self, images: Tensor, z: Tensor, steps: int, given: Tensor | None = None) -> Iterator[Tensor]:
        """Yield (B, n) codes: those nearest to the latents z (B, n, d), then ones that rebuild the images better.

        After each step for some of the images come all codes as they are then. `given` as in `VectorQuantizer.search`.
        """
        nearest = self.quantizer.nearest(z)
        first = nearest if given is None else torch.where(given < 0, nearest, given)
        yield first
        if not steps:
            return
        height, width = images.shape[2:]
        positions = height * width // self.config.patch_size**2 + z.shape[1]
        at_once = max(1, SEARCHED // (positions * self.config.decoder.width))
        decode = partial(self._decoder_without_gradients(), height=height, width=width)
        found = list(first.split(at_once))
        for i, (some, wanted) in enumerate(zip(z.split(at_once), images.float().split(at_once), strict=True)):
            kept = None if given is None else given[i * at_once : (i + 1) * at_once]
            for better in self.quantizer.search(some, wanted, decode, steps, kept):
                found[i] = better
                yield torch.cat(found)

    def _decoder_without_gradients(self) -> Decoder:
        """Return a decoder with the same weights in memory, which gradients pass but do not stay in."""
        with torch.inference_mode(False):  # where no weight may be of inference mode
            weights = [(p, p.clone() if p.is_inference() else p.detach()) for p in self.decoder.parameters()]
            return copy.deepcopy(self.decoder, {id(p): nn.Parameter(w, requires_grad=False) for p, w in weights})

    @torch.no_grad()
    def decode(self, ids: Tensor, *, size: int | tuple[int, int] | None = None) -> Tensor:
        """Decode (B, n) codes to (B, 3, s, s) pixels in about [-1, 1].

        `size` is s or (height, width), `None` is D(n); `TokenSchedule.decode_shape` has the D(n) of images that are not
        square.
        """
        ids = checked_ids("codes", ids, 2, self.config.codebook_size)
        n = self.schedule.check_count(ids.shape[1])
        size = self.schedule.decode_size(n) if size is None else size
        sides, patch = size if isinstance(size, tuple) else (size, size), self.config.patch_size
        if len(sides) != 2 or any(not isinstance(s, Integral) or not 0 < s < 2**31 or s % patch for s in sides):
            raise DetailFlowError(
                f"size must be a positive multiple of {patch} pixels, or (height, width) of such, not {size}"
            )
        with within_memory(f"a batch of {len(ids)} images at a size of {size}", "give fewer codes or a smaller size"):
            return self.decode_quantized(self.quantizer.lookup(ids.to(self.device)), (int(sides[0]), int(sides[1])))

    @torch.no_grad()
    def decode_bytes(self, ids: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Decode (B, n) codes of a model's own making, not checked, to bytes (B, H, W, 3) on its device.

        Checks would wait for a GPU. Whole images of a batch size that comes up again are decoded by a CUDA graph.
        """
        side = self.schedule.decode_size(ids.shape[1])
        height, width = size or (side, side)
        ids = to_device(ids, self.device)
        if ids.shape[1] == self.config.num_tokens and (height, width) == (side, side) and self.uses_graphs:
            proxy: Any = weakref.proxy(self)  # or both would live on
            decode = partial(DetailFlowTokenizer._bytes, proxy, size=(side, side))
            make, at_once = partial(graphs.Function, decode, ids), self.engine == "graphs"
            if program := self.graphs.lend(len(ids), self, make, at_once=at_once):
                return program(ids)
        pixels = self.decode_quantized(self.quantizer.lookup(ids), (height, width))
        return to_uint8(all_finite("the decoder's pixels", pixels) if pixels.device.type == "cpu" else pixels)

    def _bytes(self, ids: Tensor, size: tuple[int, int]) -> Tensor:
        return to_uint8(self.decode_quantized(self.quantizer.lookup(ids), size))

    @torch.no_grad()
    def encode_correction(self, images: Tensor, *, position: int, wrong_tokens: Tensor) -> Tensor:
        """Encode images with wrong tokens at `position`, which later tokens make up for (Sec. 3.3).

        Args:
            images: (B, 3, H, W) pixels in [-1, 1], as for `encode`.
            position: p, any token below c, from c on the start of a group.
            wrong_tokens: (B, 1) codes if p < c, else (B, g).

        Returns:
            (B, N) int64: clean before p, then `wrong_tokens`, then corrected.
        """
        images, end = self._checked(images), self.schedule.check_span(position)
        wrong_tokens = checked_ids("wrong_tokens", wrong_tokens, 2, self.config.codebook_size)
        expected = (images.shape[0], end - position)
        if wrong_tokens.shape != expected:
            raise DetailFlowError(
                f"wrong_tokens at position {position} must have shape {expected}, not {tuple(wrong_tokens.shape)}"
            )
        patches = self.encode_patches(images)
        z = self.encode_latents(patches, self.config.num_tokens)
        given = self.quantizer.nearest(all_finite("the encoder's latents", z))
        given[:, position:end] = wrong_tokens.to(self.device)
        return self.correct(patches, given, end)

    def _checked(self, images: Tensor) -> Tensor:
        """Check the range of images, which waits for the GPU, and move them to the device and dtype of the weights."""
        check_plain("images", images, "a tensor (pipe.tokens takes images and paths)")
        if has_patches(images, self.config.patch_size):  # else `encode_patches` says what is wrong
            low, high = (value.item() for value in torch.aminmax(images)) if images.numel() else (0.0, 0.0)
            if not (low >= -LARGEST_PIXEL and high <= LARGEST_PIXEL):  # also if they are NaN
                raise DetailFlowError(
                    f"the pixels of images must be in [-1, 1], not {low:g} to {high:g}: "
                    "of bytes, take bytes / 127.5 - 1"
                )
            images = images.to(self.device, self.decoder.mask_token.dtype)
        return images

    def encode_patches(self, images: Tensor) -> Patches:
        """(B, 3, H, W) pixels → their patches in every block of the encoder."""
        side, patch = self.config.image_size, self.config.patch_size
        if not has_patches(images, patch):
            raise DetailFlowError(
                f"images must be floats of shape (B, 3, {side}, {side}) in [-1, 1], or with other multiples of {patch} "
                f"as sides, not {tuple(images.shape)} {images.dtype}"
            )
        return self.encoder.patches(images, self.uses_native)

    def encode_latents(self, patches: Patches, n: int) -> Tensor:
        """Return (B, n, d) unit vectors before quantization, with gradients."""
        needed = n if self.config.causal_encoder else self.config.num_tokens  # else later queries affect the first n
        queries = self.encoder.query_tokens[:needed].expand(patches.images, -1, -1)
        if patches.linear is not None:
            queries = queries + patches.linear[:, :needed]
        latents = self.encoder.queries(queries, patches, self.schedule, self.uses_native)
        return self.quantizer.unit_latents(latents)[:, :n]

    def correct(self, patches: Patches, given: Tensor, end: Tensor | int) -> Tensor:
        """Return (B, N) codes: `given` before `end`, mistakes included, then corrected; see `correct_latents`."""
        corrected = self.quantizer.nearest(self.correct_latents(patches, given, end))
        return torch.where(torch.arange(given.shape[1], device=given.device) < end, given, corrected)

    def correct_latents(self, patches: Patches, given: Tensor, end: Tensor | int) -> Tensor:
        """Return (B, N, d) unit vectors of the self-correction pass (Sec. 3.3); those from `end` on are new.

        Args:
            patches: of the images.
            given: (B, N) codes; those before `end` are written already, mistakes included, the rest is ignored.
            end: one position for all images, or (B, 1) positions.
        """
        written = torch.arange(self.config.num_tokens, device=given.device) < end
        refined = self.encoder.refine(self.quantizer.lookup(given).detach())
        pending = self.encoder.refined_tokens.to(refined.dtype)
        if patches.linear is not None:
            pending = pending + patches.linear.to(refined.dtype)
        queries = torch.where(written.expand(given.shape)[..., None], refined, pending)
        return self.quantizer.unit_latents(self.encoder.queries(queries, patches, self.schedule, self.uses_native))

    def plant_mistakes(
        self, z: Tensor, candidates: int = WRONG_CANDIDATES, generator: torch.Generator | None = None
    ) -> Tensor:
        """(B, m, d) unit vectors → (B, m) codes, each drawn uniformly from that vector's nearest `candidates` codes."""
        near = self.quantizer.nearest_k(z, candidates)
        choice = torch.randint(near.shape[-1], near.shape[:-1], generator=generator).to(near.device)
        return near.gather(-1, choice[..., None])[..., 0]

    def decode_quantized(self, quantized: Tensor, size: int | tuple[int, int]) -> Tensor:
        """(B, n, d) unit vectors → (B, 3, size, size) pixels, or (B, 3, height, width)."""
        height, width = size if isinstance(size, tuple) else (size, size)
        full = (self.compiled_for, self.config.num_tokens, self.config.image_size, self.config.image_size)
        if self.program is not None and (*quantized.shape[:2], height, width) == full:
            return self.program(quantized, height, width)
        return self.decoder(quantized, height, width, self.uses_native)

    @property
    def uses_native(self) -> bool:
        """Whether the native engine runs the blocks where it can (docs/speed.md#engines)."""
        return self.engine in ("auto", "native")

    def compile_decoding(self, batch_size: int) -> None:
        """Compile the decoding of `batch_size` images at a time, from all tokens at side R; see `DetailFlowGPT`."""
        self.compile_for(batch_size, self.decoder)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear) and not module.weight.is_meta:  # arithmetic there would import a compiler
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)
    if isinstance(module, Decoder) and isinstance(module.refine_pixels, nn.Sequential):  # starts as nothing
        for parameter in module.refine_pixels[-1].parameters():
            nn.init.zeros_(parameter)
