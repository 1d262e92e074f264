"""Teach the shipped AR model two new classes, with its tokenizer as it is.

Shows: extraction with an existing tokenizer, `init`, and that a new class table starts from what the model knows. The
images are generated ones, of two classes in strange colours, so that there is nothing to download; put your own
folder in their place.

    python examples/finetune.py
"""

import argparse
from pathlib import Path

from PIL import Image, ImageOps

from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer
from detailflow.pictures import grid
from detailflow.training.config import Extraction, GPTTraining, LoopConfig
from detailflow.training.extract import extract
from detailflow.training.gpt import train_gpt

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=64, help="of each class")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()
photos, run = Path("outputs/strange"), Path("outputs/strange-run")
source = "shipped"  # the model to start from; a folder or a hub name as well

pipe = DetailFlowPipeline.from_pretrained()
for old, new in (("horse", "blue horse"), ("ship", "negative ship")):
    (photos / new).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pipe(old, num_images_per_class=options.images, seed=5)):
        red, green, blue = image.split()
        strange = Image.merge("RGB", (blue, green, red)) if new == "blue horse" else ImageOps.invert(image)
        strange.save(photos / new / f"{i:03d}.png")

extract(Extraction(data=str(photos), tokenizer=source, crops="two"), run / "tokens")

loop = LoopConfig(steps=options.steps, batch_size=16, learning_rate=1e-3, precision="fp32", trackers=())
config = pipe.gpt.config  # the sizes must be those of the model to start from
settings = GPTTraining(
    tokens=str(run / "tokens"), tokenizer=source, init=source, loop=loop,
    width=config.width, depth=config.depth, heads=config.heads, sampling=config.sampling, ema=0.9,
)  # fmt: skip
train_gpt(settings, run / "gpt")

tuned = DetailFlowPipeline(DetailFlowTokenizer.from_pretrained(), DetailFlowGPT.from_pretrained(run / "gpt"))
images = tuned(tuned.labels.names, num_images_per_class=6, seed=1)
captions = [name for name in tuned.labels.names for _ in range(6)]
grid(images, columns=6, labels=captions).save("outputs/strange.png")
print("wrote outputs/strange.png")
