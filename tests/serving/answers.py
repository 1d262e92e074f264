"""The images of requests and answers."""

import base64
import io

import numpy as np
from PIL import Image

KEY = "a-key-of-the-tests"


def opened(b64: str | None) -> Image.Image:
    assert b64
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    assert image.format == "PNG"
    return image


def same(shown: str | None, expected: Image.Image) -> bool:
    """Whether an answer's image is this one, up to rounding in another batch."""
    image = opened(shown)
    difference = np.asarray(image, int) - np.asarray(expected, int)
    return image.size == expected.size and abs(difference).max() <= 1


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def photograph() -> Image.Image:
    return Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 100).convert("RGB")
