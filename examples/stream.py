"""Watch images take shape, and keep it as an animation.

Shows: `stream`, which yields a stage after every decoding step. Early stages are small, so each is enlarged to one
size.

    python examples/stream.py horse
"""

import sys
from pathlib import Path

from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.pictures import strip

label = sys.argv[1] if len(sys.argv) > 1 else "horse"
output = Path("outputs")
output.mkdir(exist_ok=True)

pipe = DetailFlowPipeline.from_pretrained()
stages = list(pipe.stream(label, seed=1))
for stage in stages:
    print(f"{stage.num_tokens:3d} tokens: {stage.size} pixels a side")

frames = [stage.images[0].resize((256, 256), Image.Resampling.NEAREST) for stage in stages]
durations = [150] * (len(frames) - 1) + [2000]  # milliseconds; the last stays
frames[0].save(output / f"{label}.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)
strip([stage for stage in stages if stage.num_tokens in (1, 2, 4, 8, 16, 32, 48)]).save(output / f"{label}-strip.png")
print(f"wrote {output / f'{label}.gif'} and {output / f'{label}-strip.png'}")
