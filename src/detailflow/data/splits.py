"""Train, val and test: which split a folder or file means by its name."""

import os
import re
from collections.abc import Sequence

from detailflow.data.summary import Notes
from detailflow.errors import DetailFlowError, printable

SPLITS = {  # as the `datasets` library names them, and a few more
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout"), "test"),
}
_ORDER = ("train", "val", "test")
_NAMES_SHOWN = 3
_IN_TWO_WORDS = re.compile(r"(train)[-_. ](val)|(hold)[-_. ](out)")
_WORDS = "|".join(sorted(SPLITS, key=len, reverse=True))
# train, Train2017, train_images, images-train; my_train and train-v2 if the other splits are called alike
_AFFIX = r"(?:images?|imgs?|data|set|split|\d+)"
_SPLIT_NAME = re.compile(
    rf"(?P<before>(?:.*?[^a-z])??)(?:{_AFFIX}[-_. ]?)?(?P<word>{_WORDS})(?:[-_. ]?{_AFFIX})*(?P<after>(?:[^a-z].*)?)",
    re.DOTALL,
)
_WORD_WITHIN = re.compile(rf"(?P<before>.*?)(?P<word>{_WORDS})(?P<after>.*)", re.DOTALL)  # xtrain, Trainings
_LETTERS = re.compile(r"[^\W\d_]+")


def _parse(name: str, pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """Return the split that a name means, and the letters before and after the word for it, as "before|after"."""
    name = _IN_TWO_WORDS.sub(lambda match: "".join(filter(None, match.groups())), name.strip().lower())
    if not (match := pattern.fullmatch(name)):
        return None
    return SPLITS[match["word"]], "|".join("".join(_LETTERS.findall(match[part])) for part in ("before", "after"))


def split_of(name: str) -> str | None:
    """Return the split that a name means if it says nothing else."""
    split, rest = _parse(name, _SPLIT_NAME) or ("", "")
    return split if rest == "|" else None


def split_folders(names: Sequence[str]) -> dict[str, str]:
    """Return folder → split; empty if these are classes: one of them may be called train, between bus and truck.

    Two different splits are enough if their names are otherwise alike; if the word for the split is part of a longer
    word, all names have to be.
    """
    for pattern in (_SPLIT_NAME, _WORD_WITHIN):
        alike: dict[str, dict[str, str]] = {}
        for name in names:
            if parsed := _parse(name, pattern):
                alike.setdefault(parsed[1], {})[name] = parsed[0]
        groups = [group for group in alike.values() if len(set(group.values())) > 1]
        plain = alike.get("|", {})
        if plain in groups or (plain and len(names) == 1):
            return plain
        if len(groups) == 1 and (pattern is _SPLIT_NAME or len(groups[0]) == len(names)):
            return groups[0]
    return {}


def ask_for_a_split(top: str, names: Sequence[str]) -> str:
    """Return a question if these folders, which are read as classes, may be splits; else ""."""
    plain = [name for name in names if split_of(name)]
    if len(plain) == 1:
        return f"did you mean the split {printable(os.path.join(top, plain[0]))}?"
    if len(names) > 1 and all(_parse(name, _SPLIT_NAME) for name in names):
        return f"did you mean one of the splits {', '.join(map(printable, names[:_NAMES_SHOWN]))}?"
    return ""


def files_of_split(top: str, names: list[str], split: str | None, notes: Notes) -> list[str]:
    """Return the files of one split by their names: train-0-of-2.parquet, imagenet-train-0.tar, val/0.tar."""
    words = [_split_word(name) for name in names]
    known = {word: SPLITS[word] for word in sorted(filter(None, words))}
    if not known or (None in words and len(set(known.values())) == 1):
        return names
    picked = pick_split(top, known, split, notes)
    notes.leave("file of no split", *(name for name, word in zip(names, words, strict=True) if word is None))
    return [name for name, word in zip(names, words, strict=True) if word == picked]


def _split_word(path: str) -> str | None:
    parts = reversed(path.lower().split(os.sep))  # a file's own name comes before its folders'
    return next((word for part in parts for word in re.split(r"[-_. ]", part) if word in SPLITS), None)


def pick_split(where: str, names: dict[str, str], split: str | None, notes: Notes) -> str:
    """Return the one of `names` (name → train, val or test) that `split` means; for `None`, train or the only one."""
    ordered = sorted(names, key=lambda name: _ORDER.index(names[name]) if names[name] in _ORDER else len(_ORDER))
    notes.splits = tuple(name.lower() for name in ordered)
    wanted = "train" if split is None else split.lower()
    chosen = [name for name in names if name.lower() == wanted]
    chosen = chosen or [name for name, meaning in names.items() if meaning == SPLITS.get(wanted, wanted)]
    if not chosen and split is None and len(names) == 1:
        chosen = list(names)
    if len(chosen) > 1:
        several = ", ".join(map(printable, chosen))
        raise DetailFlowError(f"{where} has several splits for {wanted}: choose one of {several}")
    if not chosen:
        have = ", ".join(notes.splits)
        if split is None:
            raise DetailFlowError(f"{where} has no train split: choose one of {have}")
        raise DetailFlowError(f"{where} has no split {split!r}: it has {have}")
    notes.split = chosen[0].lower()
    return chosen[0]
