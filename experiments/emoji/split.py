"""Hold out 300 emoji by name, all skin tones of a name together.

    python experiments/emoji/split.py fluent-3d-64.parquet --output DIR

Writes DIR/train.parquet and DIR/test.parquet. Of the names that are held out the test set has two images each at most,
so that a few people with many skin tones don't fill it; their other images are in neither file. DIR/balanced.parquet
has the training images, those without skin tones three times, so that people are not most of what an epoch shows.
"""

import argparse
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq

TEST_IMAGES, PER_NAME, LARGEST = 300, 2, 30  # a name with more images than the last is nobody's name
REPEATS = 3  # of an emoji that has no skin tones
SKIN_TONE = re.compile(
    r"[:,]?\s*(MEDIUM-LIGHT|MEDIUM-DARK|LIGHT|MEDIUM|DARK) SKIN TONE|EMOJI MODIFIER FITZPATRICK TYPE-[-0-9]+", re.I
)


def without_tone(name: str | None) -> str:
    """Return an emoji's name without its skin tone, in lower case."""
    return re.sub(r"\W+", " ", SKIN_TONE.sub("", name or "")).strip().lower()


def split(names: list[str | None]) -> tuple[list[int], list[int]]:
    """Return the indices of the training and the test images."""
    groups = defaultdict(list)
    for index, name in enumerate(names):
        groups[without_tone(name)].append(index)
    order, draws = sorted(groups), random.Random(5)
    draws.shuffle(order)
    test: list[int] = []
    out: set[int] = set()
    for name in order:
        if len(test) >= TEST_IMAGES:
            break
        if len(groups[name]) <= LARGEST:
            out.update(groups[name])
            test += draws.sample(groups[name], min(PER_NAME, len(groups[name])))
    return [i for i in range(len(names)) if i not in out], test[:TEST_IMAGES]


def balanced(names: list[str | None]) -> list[int]:
    """Return the indices of all images, several times where a name has one image (or is nobody's name)."""
    plain = [without_tone(name) for name in names]
    counts = Counter(plain)
    return [i for i, name in enumerate(plain) for _ in range(1 if 1 < counts[name] <= LARGEST else REPEATS)]


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the emoji with their names")
    parser.add_argument("--output", required=True, type=Path, help="a folder")
    args = parser.parse_args()
    table = pq.read_table(args.data)
    args.output.mkdir(parents=True, exist_ok=True)
    train, test = split(table["name"].to_pylist())
    more = [train[i] for i in balanced(table["name"].take(train).to_pylist())]
    for part, rows in {"train": train, "test": test, "balanced": more}.items():
        pq.write_table(table.take(rows), args.output / f"{part}.parquet")
        print(f"{args.output / part}.parquet: {len(rows):,} images")


if __name__ == "__main__":
    main()
