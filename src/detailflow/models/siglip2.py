"""SigLIP2's vision tower (NaFlex): the tokenizer's encoder starts from it, and it is the teacher of the alignment loss.

Tschannen et al., SigLIP 2 (arXiv 2502.14786); docs/method.md#tokenizer. Its blocks are those of the tokenizer, under
the same names.
"""

import math
import os
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from detailflow import hub_client
from detailflow.device import choose_device, choose_dtype
from detailflow.errors import DetailFlowError
from detailflow.models.layers import Block, ViTConfig, has_patches, initial_positions, patchify, resize_positions
from detailflow.models.tokenizer import Encoder
from detailflow.published import heads_of, layer_count
from detailflow.published_names import vit_names
from detailflow.settings import parse_settings
from detailflow.tensors import TENSOR_FILES, read_headers, read_tensors
from detailflow.words import some_names

SIGLIP2 = "google/siglip2-so400m-patch16-naflex"
_PREFIX = "vision_model."  # of the tower in a whole model; one that is saved alone has none
Names = dict[str, tuple[str, ...]]  # our name of a tensor → those stacked in it


class SigLIP2(nn.Module):
    """Image patches in a transformer; see `from_pretrained`, `forward` and `alignment_target`."""

    def __init__(self, config: ViTConfig, patch_size: int = 16) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_embed = nn.Linear(patch_size * patch_size * 3, config.width)
        self.pos_embed = nn.Parameter(initial_positions(config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path = SIGLIP2,
        depth: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> "SigLIP2":
        """Load the frozen tower, in evaluation mode; its sizes are those of the stored tensors.

        Args:
            path_or_id: a folder with model.safetensors or its shards, one .safetensors file, or a hub id (owner/name).
            depth: read only so many layers; `None` is all.
            device: `None` is the GPU if there is one, else the CPU.
            dtype: of the weights, also as text; `None` is float32.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype or torch.float32, device)
        path, names, tower = _find(path_or_id, depth)
        tower.load_state_dict(_read(path, names, dtype), assign=True)
        return tower.requires_grad_(False).eval().to(device)

    @classmethod
    def without_weights(cls, path_or_id: str, device: torch.device | str, dtype: torch.dtype) -> "SigLIP2":
        """Return a tower of random weights; one that is not on this machine is assumed to have `SIGLIP2`'s sizes."""
        config, patch_size = ViTConfig(1152, 27, 16, 4304), 16
        if os.path.exists(os.path.expanduser(path_or_id)):
            sizes = _sizes(tower := _find(path_or_id, None)[2])
            config = ViTConfig(sizes["width"], len(tower.blocks), sizes["heads"], sizes["MLP size"])
            patch_size = tower.patch_size
        tower = cls(config, patch_size)
        tower.load_state_dict({name: tensor.to(dtype) for name, tensor in tower.state_dict().items()}, assign=True)
        return tower.requires_grad_(False).eval().to(device)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] → (B, H/f · W/f, width), the last hidden state after the final LN."""
        patch = self.patch_size
        if not has_patches(images, patch):
            raise DetailFlowError(
                f"images must be floats of shape (B, 3, H, W) in [-1, 1], H and W multiples of {patch}, "
                f"not {tuple(images.shape)} {images.dtype}"
            )
        rows, columns = images.shape[2] // patch, images.shape[3] // patch
        patches = patchify(images, patch).to(self.pos_embed.dtype)
        x = self.patch_embed(patches) + resize_positions(self.pos_embed, rows, columns)
        for block in self.blocks:
            x, _ = block(x)
        return self.norm(x)

    @property
    def width(self) -> int:
        """The width of `alignment_target`."""
        return self.pos_embed.shape[1]

    @torch.no_grad()
    def alignment_target(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] → (B, width) float32, the mean over patches (docs/method.md#losses)."""
        return self(images).float().mean(1)


def initialise_encoder(encoder: Encoder, path_or_id: str | Path = SIGLIP2) -> None:
    """Copy the patch embedding, the position grid, as many layers as the encoder has and the final LN into it.

    Its query tokens, their positions and `refine` stay as they are (docs/method.md#tokenizer).
    """
    path, names, tower = _find(path_or_id, len(encoder.blocks))
    ours, theirs = _sizes(encoder), _sizes(tower)
    differing = [what for what in ours if ours[what] != theirs[what]]
    if differing:
        has, had = (", ".join(f"{what} {sizes[what]}" for what in differing) for sizes in (ours, theirs))
        raise DetailFlowError(f"the encoder cannot start from {path_or_id}: it has {has}, and that has {had}")
    encoder.load_state_dict(_read(path, names, encoder.pos_embed.dtype), strict=False)  # the rest is not there


def _sizes(network: Encoder | SigLIP2) -> dict[str, int]:
    block = cast(Block, network.blocks[0])
    return {
        "width": network.pos_embed.shape[1],
        "heads": block.attn.heads,
        "MLP size": block.mlp.fc1.out_features,
        "patch size": network.patch_size,
    }


def _find(path_or_id: str | Path, depth: int | None) -> tuple[Path, Names, SigLIP2]:
    """Return the path of the tensors, their names, and a tower without weights (on the meta device) that they fit."""
    name = str(path_or_id)
    path = Path(os.path.expanduser(name))
    if not name or not os.path.exists(path):  # os.path, which takes an impossible name for a missing one
        if not isinstance(path_or_id, str) or not hub_client.is_hub_name(name):
            raise DetailFlowError(f"there is no such folder or file: {name!r}")
        path = hub_client.fetch(name, TENSOR_FILES)
    headers = read_headers(path)
    prefix = _PREFIX if any(header.startswith(_PREFIX) for header in headers) else ""
    layers = layer_count(headers, f"{prefix}encoder.")
    if not layers:
        raise DetailFlowError(f"{name} holds no SigLIP2 vision tower: it has no tensors under {_PREFIX}encoder.layers")
    depth = layers if depth is None else depth
    if not isinstance(depth, int) or not 1 <= depth <= layers:
        raise DetailFlowError(f"depth must be 1 to {layers}, the number of layers in {name}, not {depth}")
    names = dict(vit_names("", prefix, depth))
    wanted = {theirs for sources in names.values() for theirs in sources}
    if not wanted <= headers.keys():
        raise DetailFlowError(
            f"{name} holds no whole SigLIP2 vision tower: it lacks {some_names(wanted - headers.keys())}"
        )
    shapes = {theirs: headers[theirs][1] for theirs in wanted}
    with torch.device("meta"):
        tower = SigLIP2(*_config(shapes, names, depth, name))
    for ours, tensor in tower.state_dict().items():
        for theirs in names[ours]:
            kind, found = headers[theirs]
            expected = (tensor.shape[0] // len(names[ours]), *tensor.shape[1:])
            if found != expected or not kind.startswith(("F", "BF")):
                raise DetailFlowError(
                    f"{theirs} in {name} must be floats of shape {expected}, not {kind} of shape {found}"
                )
    return path, names, tower


def _config(shapes: dict[str, tuple[int, ...]], names: Names, depth: int, source: str) -> tuple[ViTConfig, int]:
    """Return the sizes and the patch size, from the shapes of two tensors."""
    (patches,), (hidden,) = names["patch_embed.weight"], names["blocks.0.mlp.fc1.weight"]
    for name in (patches, hidden):
        if len(shapes[name]) != 2:
            raise DetailFlowError(
                f"{name} in {source} must be a matrix, as in a NaFlex SigLIP2, not of shape {shapes[name]}"
            )
    mlp, width = shapes[hidden]
    config = parse_settings(ViTConfig, dict(width=width, depth=depth, heads=heads_of(width), mlp=mlp), source)
    return config, math.isqrt(shapes[patches][1] // 3)


def _read(path: Path, names: Names, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read the tensors that `_find` has checked, and no others, under our names."""
    stored = read_tensors(path, dtype, {theirs for sources in names.values() for theirs in sources})
    tensors = {}
    for ours, sources in names.items():
        parts = [stored.pop(theirs) for theirs in sources]
        tensors[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return tensors
