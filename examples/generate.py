"""Generate images of classes with the shipped model.

Shows: class names and numbers, several images of each, the strength of guidance, and that a seed gives its images
again.

    python examples/generate.py
"""

from pathlib import Path

from detailflow import DetailFlowPipeline
from detailflow.pictures import grid

output = Path("outputs")
output.mkdir(exist_ok=True)

pipe = DetailFlowPipeline.from_pretrained()  # the model in the package: no download
print("classes:", ", ".join(pipe.labels.names))

images = pipe(["cat", "ship", 7], num_images_per_class=4, seed=1)  # 7 is the horse
again = pipe(["cat", "ship", 7], num_images_per_class=4, seed=1)
assert [image.tobytes() for image in images] == [image.tobytes() for image in again]
captions = [name for name in ("cat", "ship", "horse") for _ in range(4)]
grid(images, columns=4, labels=captions).save(output / "classes.png")

scales = [1, 2, 4, 8]  # no guidance, then more and more: clearer, less varied
rows = [image for scale in scales for image in pipe("dog", num_images_per_class=6, guidance_scale=scale, seed=2)]
captions = [f"guidance {scale}" for scale in scales for _ in range(6)]
grid(rows, columns=6, labels=captions).save(output / "guidance.png")
print(f"wrote {output / 'classes.png'} and {output / 'guidance.png'}")
