"""The adversarial loss: the discriminators and how they learn (Sec. 3.4, docs/method.md#losses)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from detailflow.device import autocast, precision_dtype
from detailflow.distributed import World, in_group
from detailflow.errors import DetailFlowError, missing_package
from detailflow.models.efficientnet import CHANNELS, EfficientNetLite0
from detailflow.models.loading import load_weights, timm_weights
from detailflow.training.augment import DRAWS, diff_augment
from detailflow.training.classifier import FEATURE_WIDTHS, FeatureNetwork
from detailflow.training.config import PATCH, PROJECTED, PROJECTED_BOTH, TokenizerTraining
from detailflow.training.losses import consistency_loss, discriminator_loss, generator_loss, lecam_loss
from detailflow.training.optimizer import Updater, no_sync

BACKBONE = "vit_small_patch16_224.dino"  # timm's name, and on the hub timm/…
SIDE = 224  # of the images that DINO was trained on
BLOCKS = (2, 5, 8, 11)  # after which features are taken, and after the patch embedding
CROP_DRAWS = 3  # for one call: whether larger images are cropped, and where
_INSTEAD = "or train with adversarial_network: patch"


class PatchDiscriminator(nn.Module):
    """Spectral-norm convolutions that judge overlapping patches of an image; trained from scratch."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(3, width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 2 * width, 3, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 1, 3, padding=1)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) → (B, 1, R/4, R/4) logits, high for real."""
        return self.layers(images.contiguous(memory_format=torch.channels_last))


class ProjectedDiscriminator(nn.Module):
    """Judges images by features of EfficientNet-Lite0 at four depths, unmixed (Sauer et al. 2021, arXiv 2111.01007).

    The frozen networks are not registered as submodules, as in `DINODiscriminator`.

    Args:
        load: as there.
        both: judge by the features of a classifier of the images' classes as well: `classifier`, to be set.
    """

    backbone_name = "EfficientNet-Lite0"

    def __init__(self, load: bool = True, both: bool = False, width: int = 128) -> None:
        super().__init__()
        self.both, self._classifier = both, tuple[FeatureNetwork, ...]()
        what = "the adversarial loss (projected discriminator)"
        self._unregistered = (EfficientNetLite0.from_package(what, _INSTEAD, load=load),)
        depths = [*zip(CHANNELS[1:], (2, 1, 0, 0), strict=True)]  # so that all have about as many logits
        if both:
            depths += zip(FEATURE_WIDTHS, (3, 2, 1, 0), strict=True)
        self.heads = nn.ModuleList(_projected_head(inputs, width, halvings) for inputs, halvings in depths)

    @property
    def backbone(self) -> EfficientNetLite0:
        """The frozen network of features."""
        return self._unregistered[0]

    def set_classifier(self, classifier: FeatureNetwork) -> None:
        """Give the frozen classifier that `both` asks for."""
        self._classifier = (classifier,)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] → (B, L) logits, high for real, depth by depth."""
        maps = self.backbone.to(images.device).features(images)[1:]
        maps = [x / scale for x, scale in zip(maps, _FEATURE_SCALES, strict=True)]
        if self.both:
            (classifier,) = self._classifier
            maps += classifier.features(images)
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, maps, strict=True)], 1)


_FEATURE_SCALES = (8.1, 7.1, 6.3, 2.9)  # root mean squares of the maps' values on photographs


def _projected_head(channels: int, width: int, halvings: int) -> nn.Sequential:
    """(B, channels, h, w) → (B, 1, h / 2^halvings, w / 2^halvings) logits."""
    layers: list[nn.Module] = []
    for i in range(max(halvings, 1)):
        inputs = width if i else channels
        kernel, stride = (4, 2) if halvings else (3, 1)
        layers += [spectral_norm(nn.Conv2d(inputs, width, kernel, stride, padding=1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(width, 1, 3, padding=1)))


class DINODiscriminator(nn.Module):
    """Judges every patch of an image at five depths of DINO ViT-S/16.

    The backbone is not registered as a submodule, so that optimisers, checkpoints, DistributedDataParallel, `train` and
    `requires_grad_` see the heads alone; it follows the images to their device.

    Args:
        weights: a local file of the backbone's weights, as on the hub (.safetensors, or a folder with it) or DINO's own
            (.pth); `None` downloads them, once, to the hub's cache.
        load: whether to read weights at all; the network of a plan has random ones.
    """

    backbone_name = "DINO ViT-S/16"
    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: str | None = None, load: bool = True) -> None:
        super().__init__()
        try:
            import timm
            from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        except ImportError as error:
            raise missing_package("the adversarial loss (DINO discriminator)", "timm", _INSTEAD) from error
        backbone: Any = timm.create_model(BACKBONE, num_classes=0)
        try:
            if load:
                load_weights(backbone, timm_weights(BACKBONE, weights), weights or BACKBONE)
        except DetailFlowError as error:
            raise DetailFlowError(
                "the adversarial loss (DINO discriminator) needs DINO ViT-S/16's weights: get model.safetensors of "
                f"timm/{BACKBONE} on the Hugging Face hub and give its path as adversarial_network, {_INSTEAD} "
                f"({error})"
            ) from error
        self._unregistered = (backbone.requires_grad_(False).eval(),)
        self.heads = nn.ModuleList(_head(backbone.embed_dim) for _ in range(1 + len(BLOCKS)))
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("deviation", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, 2 * torch.tensor(values)[:, None, None], persistent=False)
        self.mean -= 1  # as the pixels are in [-1, 1]

    @property
    def backbone(self) -> Any:
        """The frozen vision transformer."""
        return self._unregistered[0]

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] → (B, 5·196) logits, high for real, head by head.

        Args:
            draws: (CROP_DRAWS,) uniform in [0, 1), on the CPU: whether larger images are all cropped instead of
                resized, and where; `None` never crops. Ranks that share a batch pass the same.
        """
        features = self._features((_to_side(images, draws) - self.mean) / self.deviation)
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, features, strict=True)], 1)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Normalised (B, 3, 224, 224) → (B, width, 196) at each depth, patch tokens plus class token."""
        vit = self.backbone.to(images.device)
        x = vit.patch_embed(images)
        x = torch.cat((vit.cls_token.expand(len(x), -1, -1), x), 1) + vit.pos_embed
        depths = [x]
        for index, block in enumerate(vit.blocks):
            x = block(x)
            if index in BLOCKS:
                depths.append(x)
        return [(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in depths]


def _to_side(images: Tensor, draws: Tensor | None) -> Tensor:
    """(B, 3, H, W) → (B, 3, 224, 224): crop half of the larger images, if there are draws, and resize all others."""
    height, width = images.shape[-2:]
    if min(height, width) > SIDE and draws is not None and float(draws[0]) < 0.5:
        top, left = (int(u * (size - SIDE + 1)) for u, size in zip(draws[1:].tolist(), (height, width), strict=True))
        return images[..., top : top + SIDE, left : left + SIDE]
    if height == width == SIDE:
        return images
    return F.interpolate(images, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)


def _convolution(inputs: int, outputs: int, kernel: int = 1) -> nn.Module:
    return spectral_norm(nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="circular"))


def _activated(width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(_convolution(width, width, kernel), BatchNorm(width), nn.LeakyReLU(0.2))


def _head(width: int) -> nn.Sequential:
    """(B, width, L) → (B, 1, L) logits."""
    return nn.Sequential(_activated(width, 1), _Residual(_activated(width, 9)), _convolution(width, 1))


class _Residual(nn.Module):
    """(x + f(x)) / √2, which keeps the variance."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x)) * 0.5**0.5


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of (B, C, L) with the statistics of all ranks' batches, which must have one size.

    Each rank's gradient is that of the sum of all losses, as in `nn.SyncBatchNorm`, which works only on GPUs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) → the same."""
        world_size = dist.get_world_size() if in_group() else 1
        if world_size == 1 or not self.training:
            return super().forward(x)
        assert isinstance(self.momentum, float) and self.running_mean is not None and self.running_var is not None
        values = x.float()
        mean = _Sum.apply(values.mean((0, 2))) / world_size
        centred = values - mean[:, None]
        variance = _Sum.apply(centred.square().mean((0, 2))) / world_size
        count = world_size * values.numel() // values.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None] + self.bias[:, None]).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all ranks; the gradient is that of all ranks' uses of it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


# Views of each image in a step; those of its clean and its corrected reconstruction are neighbours.
TOKENIZERS, REAL, FAKE, STRONG_REAL, STRONG_FAKE, VIEWS = 0, 2, 3, 5, 6, 8
PLAIN_CUTOUT, STRONG_CUTOUT = 0.2, 0.5  # the latter for the consistency loss
ANCHOR_DECAY = 0.999  # of LeCAM's moving averages


class AugmentationNoise(NamedTuple):
    """A step's random numbers: (B, VIEWS, DRAWS) to augment images, (VIEWS, CROP_DRAWS) for the crops of all."""

    views: Tensor
    crops: Tensor

    @classmethod
    def make(cls, count: int) -> "AugmentationNoise":
        """Draw for `count` images from torch's generator."""
        return cls(torch.rand(count, VIEWS, DRAWS), torch.rand(VIEWS, CROP_DRAWS))

    def of(self, images: slice) -> "AugmentationNoise":
        """Return those of some images."""
        return AugmentationNoise(self.views[images], self.crops)


class _Judgement(nn.Module):
    """All logits of a discriminator's step in one call, as DistributedDataParallel needs it."""

    def __init__(self, network: nn.Module, augment: bool, consistency: bool) -> None:
        super().__init__()
        self.network, self.augment, self.consistency = network, augment, consistency

    def forward(self, real: Tensor, fake: Tensor, noise: AugmentationNoise) -> tuple[Tensor, ...]:
        """Return the logits of real and fake, and of both under strong augmentation for the consistency loss."""
        plain = (self.judge(real, noise, REAL), self.judge(fake, noise, FAKE))
        if not self.consistency:
            return plain
        return (*plain, self.judge(real, noise, STRONG_REAL, True), self.judge(fake, noise, STRONG_FAKE, True))

    def judge(self, images: Tensor, noise: AugmentationNoise, view: int, strong: bool = False) -> Tensor:
        """(B, 3, H, W) → logits; or (B + b, …), if the last b are corrected reconstructions of the first b images."""
        more = len(images) - len(noise.views)
        views = torch.cat((noise.views[:, view], noise.views[:more, view + 1])) if more else noise.views[:, view]
        if strong:
            images = diff_augment(images, views, STRONG_CUTOUT, probability=1.0)
        elif self.augment:
            images = diff_augment(images, views, PLAIN_CUTOUT)
        if isinstance(self.network, DINODiscriminator):
            return self.network(images, noise.crops[view])
        return self.network(images)


def make_discriminator(network: str, load: bool) -> nn.Module:
    """Return the discriminator of that name, or DINO's with the weights of that file."""
    if network == PATCH:
        return PatchDiscriminator()
    if network in (PROJECTED, PROJECTED_BOTH):
        return ProjectedDiscriminator(load, both=network == PROJECTED_BOTH)
    return DINODiscriminator(None if network == "dino" else network, load)


class Adversary:
    """A discriminator and its optimiser; without `load`, its pretrained weights are random, as those of a plan."""

    def __init__(self, config: TokenizerTraining, device: torch.device, world: World, load: bool = True) -> None:
        loop = config.loop
        self.device, self.precision, self.world = device, precision_dtype(loop.precision, device), world
        self.lecam, self.consistency = config.lecam, config.consistency
        self.network = make_discriminator(config.adversarial_network, load).to(device).train()
        self.any_side = isinstance(self.network, DINODiscriminator)  # or the tokenizer's full size alone
        self.judgement: nn.Module = _Judgement(self.network, config.augment, self.consistency > 0)
        self.judge = self.judgement.judge
        if world.size > 1:
            self.judgement = DistributedDataParallel(self.judgement)
        parameters = list(self.network.parameters())
        adam = torch.optim.Adam(parameters, lr=loop.learning_rate, betas=(0.9, 0.95), fused=True)
        self.updater = Updater(adam, loop, device)
        self.anchors = torch.zeros(2, device=device)  # moving averages of the logits of real and fake

    def set_classifier(self, classifier: FeatureNetwork) -> None:
        """Give a projected discriminator of both networks the frozen classifier."""
        assert isinstance(self.network, ProjectedDiscriminator)
        self.network.set_classifier(classifier)

    def generator_loss(self, pixels: Tensor, noise: AugmentationNoise) -> Tensor:
        """Return the tokenizer's loss on (B + b, 3, s, s) pixels: clean, and corrected for the first b images."""
        self.network.requires_grad_(False)
        with autocast(self.device, self.precision):
            logits = self.judge(pixels, noise, TOKENIZERS)
        self.network.requires_grad_(True)
        return generator_loss(logits.float())

    def step(self, parts: Sequence[tuple[Tensor, Tensor, AugmentationNoise]], rate: float) -> dict[str, Tensor | float]:
        """Take one step on micro-batches of (B real, B + b fake, noise), and return its loss terms to log."""
        logged: dict[str, Tensor] = {}
        means = torch.zeros(2, device=self.device)
        for i, (real, fake, noise) in enumerate(parts):
            with no_sync(self.judgement, i + 1 < len(parts)):
                with autocast(self.device, self.precision):
                    logits = [x.float() for x in self.judgement(real, fake.detach(), noise)]
                losses = {"discriminator": discriminator_loss(*logits[:2])}
                if self.lecam:
                    losses["lecam"] = lecam_loss(*logits[:2], *self.anchors.unbind())
                if self.consistency:
                    real_logits, fake_logits, strong_real, strong_fake = logits
                    of_fake = consistency_loss(fake_logits, strong_fake)
                    losses["consistency"] = consistency_loss(real_logits, strong_real) + of_fake
                weights = {"discriminator": 1.0, "lecam": self.lecam, "consistency": self.consistency}
                total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum() / len(parts)
                self.updater.backward(total)
            for name, loss in losses.items():
                logged[name] = logged.get(name, 0) + loss.detach() / len(parts)
            means += torch.stack([x.detach().mean() for x in logits[:2]]) / len(parts)
        norm = self.updater.step(rate)
        if self.lecam:  # those of bad steps do not count; the device sees itself
            means = self.world.mean(means)
            self.anchors.lerp_(torch.where(means.isfinite().all(), means, self.anchors), 1 - ANCHOR_DECAY)
        return {**logged, "discriminator_gradient_norm": norm}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {"network": self.network.state_dict(), "anchors": self.anchors, "updater": self.updater.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.network.load_state_dict(state["network"])
        self.anchors.copy_(state["anchors"])
        self.updater.restore(state["updater"])
