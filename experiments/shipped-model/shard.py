"""Write a set of images, as they are stored, as one WebDataset shard, which is read without the package `datasets`.

python experiments/shipped-model/shard.py --data train.parquet --output train.tar
"""

import argparse
import io
import tarfile
from pathlib import Path

from PIL import Image

from detailflow.data.images import open_images
from detailflow.errors import exit_on_error
from detailflow.files import replacing


def main() -> None:
    """Write `INDEX.png` (or whatever the image is) and its class name in `INDEX.cls` for each image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as of `detailflow train`")
    parser.add_argument("--split", help="of the data")
    parser.add_argument("--output", required=True, type=Path, help="a .tar file")
    args = parser.parse_args()
    source = open_images(args.data, split=args.split)
    with replacing(args.output) as path, tarfile.open(path, "w") as archive:
        for index in range(len(source)):
            stored = source.stored_bytes(index)
            suffix = (Image.open(io.BytesIO(stored)).format or "png").lower()
            for kind, content in (("cls", source.class_names[source.labels[index]].encode()), (suffix, stored)):
                member = tarfile.TarInfo(f"{index:09d}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    print(f"wrote {len(source):,} images to {args.output}")


if __name__ == "__main__":
    with exit_on_error():
        main()
