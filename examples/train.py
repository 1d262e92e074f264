"""Train both models on a folder of images: 90 drawn shapes in three classes.

Shows: the layout of a folder, the three steps of training from Python, and that the run's folder is a model. With the
few steps here, images have the right colours and rough shapes; more `--steps` make them clearer.

    python examples/train.py
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

from detailflow import DetailFlowPipeline, TokenizerConfig, ViTConfig
from detailflow.data import open_images
from detailflow.pictures import grid
from detailflow.training.config import Extraction, GPTTraining, LoopConfig, TokenizerTraining
from detailflow.training.extract import extract
from detailflow.training.gpt import train_gpt
from detailflow.training.tokenizer import train_tokenizer


def draw(folder: Path) -> None:
    """Draw 30 images of each class into a subfolder of its name."""
    rng = random.Random(0)
    for name, color in (("circle", "crimson"), ("square", "royalblue"), ("triangle", "seagreen")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(30):
            image = Image.new("RGB", (48, 48), "white")
            x, y, r = rng.randint(16, 32), rng.randint(16, 32), rng.randint(8, 14)
            if name == "circle":
                ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), color)
            else:
                ImageDraw.Draw(image).regular_polygon((x, y, r), {"square": 4, "triangle": 3}[name], fill=color)
            image.save(folder / name / f"{i:02d}.png")


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300, help="of each model")
steps = parser.parse_args().steps
photos, run = Path("outputs/shapes"), Path("outputs/shapes-run")
draw(photos)
print(open_images(str(photos)).summary)

vit = ViTConfig(width=96, depth=2, heads=3)
sizes = TokenizerConfig(
    image_size=32, patch_size=4, num_tokens=16, group_size=4, codebook_size=256, codebook_dim=8,
    encoder=vit, decoder=vit, linear_path=True,  # which small models learn from in a fraction of the time
)  # fmt: skip
loop = LoopConfig(steps=steps, batch_size=16, learning_rate=2e-3, precision="fp32", trackers=())
settings = TokenizerTraining(
    data=str(photos), model=sizes, loop=loop, adversarial=0, max_scale=1, revive_every=25, val_share=0.1
)
train_tokenizer(settings, run / "tokenizer")

extract(Extraction(data=str(photos), tokenizer=str(run / "tokenizer"), crops="two", val_share=0.1), run / "tokens")

settings = GPTTraining(
    tokens=str(run / "tokens"), tokenizer=str(run / "tokenizer"), width=128, depth=3, heads=4, ema=0.95, loop=loop
)
train_gpt(settings, run / "gpt")

pipe = DetailFlowPipeline.from_pretrained(run)  # as with `detailflow generate --model outputs/shapes-run`
images = pipe(pipe.labels.names, num_images_per_class=4, seed=1)
captions = [name for name in pipe.labels.names for _ in range(4)]
grid(images, columns=4, labels=captions).save("outputs/shapes.png")
print("wrote outputs/shapes.png; each run's report.md has its figures and curves")
