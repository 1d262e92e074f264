"""Vary an image: its first tokens stay, and the AR model writes the others.

Shows: what few and many kept tokens keep, and how an image of one class is written on as another.

    python examples/vary.py photo.jpg truck
"""

import sys
from pathlib import Path

from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.pictures import grid

output = Path("outputs")
output.mkdir(exist_ok=True)

pipe = DetailFlowPipeline.from_pretrained()
image = Image.open(sys.argv[1]) if len(sys.argv) > 1 else pipe("automobile", seed=3)[0]
label = sys.argv[2] if len(sys.argv) > 2 else "truck"

tokens = pipe.tokens(image)
rebuilt = pipe.reconstruct(image)[-1].images[0]  # all that the tokens know of it
images, captions = [], []
for keep in (2, 8, 16, 32):
    images += [rebuilt, *pipe.vary(tokens, keep=keep, label=label, num_images=4, seed=1)]
    captions += ["the image", *[f"{keep} kept, {label}"] * 4]
grid(images, columns=5, labels=captions).save(output / "variations.png")
print(f"wrote {output / 'variations.png'}")
