"""From PIL images to crops to tensors and back, and the coarse targets of tokenizer training.

Crops are uint8 arrays (H, W, 3); networks see RGB in [-1, 1], channels first. Every resize here is bicubic with
antialiasing, done by Pillow straight from the region that the crop needs, so a large photo is never resized whole.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def _crop_of_resized(image: Image.Image, side: int, left: float, top: float, size: int) -> np.ndarray:
    """Return the size×size crop at (left, top) of `image` as resized to a shorter side of `side`."""
    scale = min(image.size) / side  # source pixels per resized pixel
    if scale == 1:
        return np.asarray(image.crop((int(left), int(top), int(left) + size, int(top) + size)))
    right = min((left + size) * scale, image.width)  # rounding must not step over the edge
    bottom = min((top + size) * scale, image.height)
    box = (left * scale, top * scale, right, bottom)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _slack(image: Image.Image, side: int, size: int) -> tuple[int, int]:
    """Return how far (in x, in y) a crop of `size` can move in `image` as resized to a shorter side of `side`."""
    shorter = min(image.size)
    return image.width * side // shorter - size, image.height * side // shorter - size


def random_crop(
    image: Image.Image, size: int, draws: np.ndarray, max_scale: float = 1.25, flip: bool = True
) -> np.ndarray:
    """Return a training crop (docs/method.md#losses): uint8 (size, size, 3).

    The shorter side is resized to a random integer in [size, size·max_scale]; `flip` mirrors half of the crops. `draws`
    are four random numbers in [0, 1).
    """
    scale_draw, x_draw, y_draw, flip_draw = draws
    side = size + int(scale_draw * (_largest_side(size, max_scale) - size + 1))
    slack_x, slack_y = _slack(image, side, size)
    crop = _crop_of_resized(image, side, int(x_draw * (slack_x + 1)), int(y_draw * (slack_y + 1)), size)
    return crop[:, ::-1] if flip and flip_draw < 0.5 else crop


def zooms(size: int, max_scale: float) -> bool:
    """Return whether crops differ in scale; if not, those of a square image differ by their flip alone."""
    return _largest_side(size, max_scale) > size


def _largest_side(size: int, max_scale: float) -> int:
    return int(size * max_scale + 1e-6)


def side_for_crops(size: int, max_scale: float = 1.25) -> int:
    """Return a shorter side at which an image is still as good for `random_crop`: twice the largest resized side.

    Crops of photographs then differ by 47 dB or more on average; bicubic from Lanczos by 44.
    """
    return 2 * _largest_side(size, max_scale)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` and return the centre: uint8 (size, size, 3)."""
    slack_x, slack_y = _slack(image, size, size)
    return _crop_of_resized(image, size, slack_x // 2, slack_y // 2, size)


def resized(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Return the whole image at this size: uint8 (height, width, 3)."""
    whole = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(whole)


def two_crops(image: Image.Image, size: int) -> np.ndarray:
    """Return the centre crop and its mirror image: uint8 (2, size, size, 3)."""
    crop = center_crop(image, size)
    return np.stack([crop, crop[:, ::-1]])


def six_crops(image: Image.Image, size: int) -> np.ndarray:
    """Return the centre crop, two moved along the diagonal, then their mirror images: uint8 (6, size, size, 3).

    They move by a sixteenth of the size, up and left, then down and right; what they uncover is mirrored at the edge.
    For small images that fill their frame: nothing is resized.
    """
    crop, by = center_crop(image, size), size // 16
    wide = np.pad(crop, ((by, by), (by, by), (0, 0)), "reflect")
    crops = np.stack([wide[at : at + size, at : at + size] for at in (by, 2 * by, 0)])
    return np.concatenate([crops, crops[:, :, ::-1]])


def ten_crops(image: Image.Image, size: int) -> np.ndarray:
    """Return the crops of token extraction (docs/method.md#extraction): uint8 (10, size, size, 3).

    From the centre crop of side int(1.1·size), the top left, top right, bottom left, bottom right and centre crops,
    then the mirror images of these five.
    """
    large = center_crop(image, int(1.1 * size))
    end = len(large) - size
    middle = round(end / 2)
    corners = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]  # (top, left)
    crops = np.stack([large[top : top + size, left : left + size] for top, left in corners])
    return np.concatenate([crops, crops[:, :, ::-1]])


def crops_of(image: Image.Image, size: int, count: int) -> np.ndarray:
    """Return the 10, 6 or 2 crops of a token store, or half of them: those that aren't mirrored. See the functions."""
    make = {10: ten_crops, 6: six_crops, 2: two_crops}
    return make[count](image, size) if count in make else make[2 * count](image, size)[:count]


def to_tensor(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Convert bytes (…, H, W, 3) to float32 (…, 3, H, W) in [-1, 1]: bytes/127.5 − 1."""
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(pixels.copy() if not pixels.flags.writeable or min(pixels.strides) < 0 else pixels)
    return pixels.movedim(-1, -3).contiguous().float().div_(127.5).sub_(1.0)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Convert (B, 3, H, W) in [-1, 1] to bytes (B, H, W, 3): clamp(127.5·x + 128, 0, 255), truncated."""
    return pixels.float().mul(127.5).add_(128.0).clamp_(0.0, 255.0).to(torch.uint8).movedim(-3, -1).contiguous()


def coarse_target(x: torch.Tensor, resolution: int, size: int) -> torch.Tensor:
    """Return what the first t tokens should show (docs/method.md#coarse-targets): (B, 3, size, size).

    `x` (B, 3, R, R) is area-downsampled to `resolution` = R(t), then bicubic-upsampled to `size` = D(t). At full
    resolution this is `x` itself.
    """
    if resolution != x.shape[-1]:
        x = F.interpolate(x, size=(resolution, resolution), mode="area")
    if size != resolution:
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)
    return x
