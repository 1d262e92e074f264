"""Encode an image, and decode it from its first 1, 2, 4, … tokens.

Shows: that each token adds detail, how near the image comes, and what the tokens are.

    python examples/reconstruct.py photo.jpg
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from detailflow import DetailFlowPipeline
from detailflow.pictures import strip
from detailflow.pipeline import fit

output = Path("outputs")
output.mkdir(exist_ok=True)
if len(sys.argv) > 1:
    image = Image.open(sys.argv[1])
else:  # a drawing: the sun above the sea
    image = Image.new("RGB", (256, 256), "skyblue")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 160, 256, 256), "navy")
    draw.ellipse((150, 30, 220, 100), "gold")

pipe = DetailFlowPipeline.from_pretrained()
stages = pipe.reconstruct(image)
for stage in stages:
    print(f"{stage.num_tokens:3d} tokens: {stage.psnr:.1f} dB")
original = fit(pipe.tokenizer.schedule, image)  # the centre square, as it was encoded
strip(stages, original=original).save(output / "reconstruction.png")

tokens = pipe.tokens(image)
bits = len(tokens) * (pipe.tokenizer.config.codebook_size - 1).bit_length()
print(f"its {len(tokens)} tokens, {bits} bits: {tokens.tolist()}")
print(f"wrote {output / 'reconstruction.png'}")
