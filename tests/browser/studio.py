"""What people do with the studio, and what they see."""

import base64
import io
import re
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, expect

_PIXELS = "canvas => canvas.toDataURL('image/png').split(',')[1]"


class Studio:
    """The page, by its roles and names."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.classes = page.get_by_role("combobox", name="Class", exact=True)
        self.slider = page.get_by_role("slider", name="Tokens shown")
        self.banner = page.get_by_role("alert")
        self.trail = page.get_by_role("navigation", name="Where these images came from")
        self.tiles = page.locator("button.tile")

    def button(self, name: str | re.Pattern[str]) -> Locator:
        """The button of that name."""
        return self.page.get_by_role("button", name=name)

    def set(self, **fields: Any) -> None:
        """Fill number fields by their labels."""
        for label, value in fields.items():
            self.page.get_by_role("spinbutton", name=label.replace("_", "-"), exact=True).fill(str(value))

    def generate(self, name: str, number: int = 2, seed: int | None = None) -> None:
        """Generate images of a class and wait for them."""
        self.classes.fill(name)
        self.classes.press("Enter")
        self.set(Images=number)
        if seed is not None:
            self.set(Seed=seed)
        self.button("Generate").click()
        self.finish()

    def finish(self) -> None:
        """Wait until nothing runs."""
        expect(self.page.get_by_role("status")).to_have_text(re.compile("^Done"))

    def vary(self, keep: int, name: str) -> None:
        """Vary the selected image as a class, and wait for it."""
        slider = self.page.get_by_role("slider", name="Keep")
        slider.focus()
        slider.press("Home")
        while slider.get_attribute("aria-valuetext") != (f"{keep} tokens" if keep > 1 else "1 token"):
            slider.press("ArrowRight")
        self.page.get_by_role("combobox", name="As", exact=True).fill(name)
        self.page.get_by_role("combobox", name="As", exact=True).press("Enter")
        self.button("Rewrite the rest").click()
        self.finish()

    def scrub(self, count: int) -> None:
        """Move the timeline to a number of tokens."""
        self.slider.focus()
        self.slider.press("Home")
        while not self.reading.startswith(f"{count} of"):
            self.slider.press("ArrowRight")

    @property
    def reading(self) -> str:
        """What is said of the tokens that are shown."""
        return self.slider.get_attribute("aria-valuetext") or ""

    @property
    def images(self) -> list[np.ndarray]:
        """The pixels of all images, as they are shown."""
        return [pixels(tile.locator("canvas.picture")) for tile in self.tiles.all()]


def pixels(canvas: Locator) -> np.ndarray:
    """Return what a canvas shows."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(canvas.evaluate(_PIXELS)))).convert("RGB"), int)


def same(shown: list[np.ndarray], expected: list[Image.Image]) -> bool:
    """Whether images are these, up to rounding in another batch."""
    arrays = [np.asarray(image, int) for image in expected]
    return len(shown) == len(arrays) and all(
        a.shape == b.shape and abs(a - b).max() <= 1 for a, b in zip(shown, arrays, strict=True)
    )
