"""What a folder of files means: which of them are data, which splits they make, and what is left aside."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from detailflow.data.decode import PLUGINS, image_suffixes
from detailflow.errors import DetailFlowError, printable
from detailflow.pictures import is_overview

MANY = (".parquet", ".tar")  # files of many images
METADATA = ("metadata.csv", "metadata.jsonl")
_METADATA_IN_PARQUET = "metadata.parquet"

SPLITS = {  # as the `datasets` library names them, and a few more
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout"), "test"),
}
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

# What systems and programs leave beside people's files; hidden files and folders are no data either.
_SYSTEM = frozenset((
    "@eadir", "#recycle", "@recycle", "@__thumb", "__macosx", "lost+found", "$recycle.bin", "system volume information",
    "#snapshot", "~snapshot", "@recently-snapshot", "@tmp", "recycler", "recycled", "__pycache__",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
))  # fmt: skip
_THUMBNAILS = ("thumbnails", "thumbs")  # smaller copies of the images beside them
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
_NAMES_SHOWN, _KINDS_SHOWN = 3, 6  # of what was left aside; the rest is counted


@dataclass
class Notes:
    """What else there is to say of a set.

    Attributes:
        split: the split that was taken; `None` if there are none. `splits` has the names of all.
        left_aside: what is there but was not taken: kind, such as ".txt" or "archive" → names.
        warnings: what is probably a mistake, a sentence each.
        question: what the user may have meant instead.
    """

    split: str | None = None
    splits: tuple[str, ...] = ()
    left_aside: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    question: str = ""

    def leave(self, kind: str, *names: str) -> None:
        """Add to what was left aside."""
        if names:
            self.left_aside.setdefault(kind, []).extend(map(printable, names))

    def aside(self) -> str:
        """Return "2 archives (a.zip, b.zip), 40 .heic", or "" if nothing was left aside."""
        kinds = sorted(self.left_aside.items(), key=lambda item: item[0].startswith("."))
        parts = [counted(*item) for item in kinds[:_KINDS_SHOWN]]
        if more := sum(len(names) for _, names in kinds[_KINDS_SHOWN:]):
            parts.append(f"{more:,} of other kinds")
        return ", ".join(parts)


def counted(kind: str, names: Sequence[str]) -> str:
    """Return "2 archives (a.zip, b.zip)" or "40 .heic (read by pillow-heif)"."""
    number = f"{len(names):,} {plural(kind) if len(names) != 1 else kind}"
    if kind in PLUGINS:
        return f"{number} ({why(kind)})"
    few = not kind.startswith(".") and len(names) <= _NAMES_SHOWN
    return f"{number} ({', '.join(names)})" if few else number


def why(kind: str) -> str:
    """Return why files of a kind are left aside; "" if the kind itself says it."""
    if kind in PLUGINS:
        return f"read by {PLUGINS[kind]}"
    if kind == "archive":
        return "images in archives are not read between image files: unpack them, or give the archives alone"
    return "not the suffix of an image file" if kind.startswith(".") else ""


def plural(kind: str) -> str:
    """Return "links to a folder" of "link to a folder"."""
    return re.sub(r"\b(archive|folder|file|image|link)\b", r"\1s", kind, count=1)


class Found(NamedTuple):
    """What a user's `data` and `split` mean.

    Attributes:
        kind: "folder" (of image files), ".parquet", ".tar", "saved" (by `save_to_disk`) or "hub".
        where: the folder that holds the files, or the name on the hub.
        metadata: files that may give the labels of a folder's images.
        folders: a folder's subfolders; those of images are its classes.
    """

    kind: str
    where: str
    files: list[Path]
    notes: Notes
    metadata: list[str] = []  # noqa: RUF012  # never changed
    folders: tuple[str, ...] = ()


def find_in_folder(folder: Path, split: str | None) -> Found:
    """Return what there is to be read in a folder.

    Raises:
        DetailFlowError: if there is nothing, no such split, or the folder cannot be read.
    """
    notes, top = Notes(), str(folder)
    if _is_saved(top):
        return _saved(folder, split, notes)
    entries = [entry for entry in _entries(top) if not _is_system(entry.name)]
    subfolders = [entry.name for entry in entries if _is_folder(entry) and entry.name.lower() not in _THUMBNAILS]
    metadata = [entry.path for entry in entries if entry.name.lower() in METADATA and _is_file(entry)]
    splits = _split_folders(subfolders)
    if splits:
        chosen = pick_split(top, splits, split, notes)
        notes.leave("folder beside the splits", *(name for name in subfolders if name not in splits))
        files = [entry.name for entry in entries if _is_file(entry)]
        notes.leave("file beside the splits", *(name for name in files if name.lower() not in METADATA))
        split, top = None, os.path.join(top, chosen)
    else:
        notes.question = _ask_for_a_split(top, subfolders)

    found = _sorted_out(top, split, notes, metadata)
    if split is not None and not notes.splits:
        raise DetailFlowError(f"{top} has no split {split!r}: it has no train, test or val subfolder")
    return found


def _sorted_out(top: str, split: str | None, notes: Notes, metadata: list[str]) -> Found:
    """The files of one folder: images, or files of many images; the others are left aside."""
    files, folders = _walk(top, notes)
    suffixes = [_suffix(file) for file in files]
    images = [file for file, suffix in zip(files, suffixes, strict=True) if suffix in image_suffixes()]
    pictures = {file for file in images if is_overview(file)}
    images = [file for file in images if file not in pictures]
    many = {kind: [file for file, suffix in zip(files, suffixes, strict=True) if suffix == kind] for kind in MANY}
    if images:
        many[".parquet"] = [file for file in many[".parquet"] if os.path.basename(file) != _METADATA_IN_PARQUET]
    kind = max(MANY, key=lambda kind: len(many[kind]))
    if many[kind] and not _images_win(top, images, many[kind]):
        taken = _files_of_split(top, many[kind], split, notes)
        _leave_others(top, files, {*taken, *many[kind]}, notes)
        return Found(kind, top, [Path(file) for file in taken], notes)
    metadata += [file for file in files if os.path.basename(file).lower() in METADATA and file not in metadata]
    if not metadata and any(os.path.basename(file) == _METADATA_IN_PARQUET for file in files):
        notes.question = notes.question or f"{_METADATA_IN_PARQUET} is not read: write metadata.csv"
    notes.leave("file of several images", *(within(file, top) for file in sorted(pictures)))
    _leave_others(top, files, {*images, *pictures, *metadata}, notes)
    if not images:
        holds = f"; it holds {notes.aside()}" if notes.left_aside else ""
        raise DetailFlowError(
            f"{top} holds no images: put some there, in one subfolder per class if they have any{holds}"
        )
    return Found("folder", top, [Path(file) for file in images], notes, metadata, folders)


def _images_win(top: str, images: list[str], many: list[str]) -> bool:
    """Whether a folder is one of images, with archives in between, or one of parquet files or shards, with some pictures."""
    classes = {within(image, top).split(os.sep)[0] for image in images if os.path.dirname(image) != top}
    return len(images) > len(many) or len(classes) > 1


def _leave_others(top: str, files: Iterable[str], taken: set[str], notes: Notes) -> None:
    for file in files:
        if file not in taken:
            suffix = _suffix(file)
            kind = "archive" if suffix in _ARCHIVES else suffix or "file without a suffix"
            notes.leave(kind, within(file, top))


def _is_saved(folder: str) -> bool:
    """Whether `save_to_disk` of the `datasets` library has written a folder."""
    names = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all(os.path.isfile(os.path.join(folder, name)) for name in some) for some in names)


def _saved(folder: Path, split: str | None, notes: Notes) -> Found:
    """A folder by `save_to_disk`: one set, or one in a subfolder for each split."""
    if os.path.isfile(folder / "dataset_dict.json"):
        names = [entry.name for entry in _entries(str(folder)) if _is_folder(entry) and _is_saved(entry.path)]
        if not names:
            raise DetailFlowError(f"{folder} holds no images: it has dataset_dict.json and no split that was saved")
        folder = folder / pick_split(str(folder), {name: _split_of(name) or name for name in names}, split, notes)
    elif split is not None:
        raise DetailFlowError(f"{folder} has no split {split!r}: it was saved as one set")
    return Found("saved", str(folder), sorted(folder.glob("*.arrow")), notes)


# --- splits --------------------------------------------------------------------------------------------------------------


def _parsed(name: str, pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """Return the split that a name means, and the letters before and after the word for it."""
    name = _IN_TWO_WORDS.sub(lambda match: "".join(filter(None, match.groups())), name.strip().lower())
    match = pattern.fullmatch(name)
    return match and (
        SPLITS[match["word"]],
        "|".join("".join(_LETTERS.findall(match[part])) for part in ("before", "after")),
    )


def _split_of(name: str) -> str | None:
    """Return the split that a name means if it says nothing else."""
    split, rest = _parsed(name, _SPLIT_NAME) or ("", "")
    return split if rest == "|" else None


def _split_folders(names: Sequence[str]) -> dict[str, str]:
    """Return folder → split; empty if these are classes: one of them may be called train, between bus and truck.

    Two different splits are enough if their names are otherwise alike; if the word for the split is part of a longer word, all
    names have to be.
    """
    for pattern in (_SPLIT_NAME, _WORD_WITHIN):
        alike: dict[str, dict[str, str]] = {}
        for name in names:
            if parsed := _parsed(name, pattern):
                alike.setdefault(parsed[1], {})[name] = parsed[0]
        groups = [group for group in alike.values() if len(set(group.values())) > 1]
        plain = alike.get("|", {})
        if plain in groups or (plain and len(names) == 1):
            return plain
        if len(groups) == 1 and (pattern is _SPLIT_NAME or len(groups[0]) == len(names)):
            return groups[0]
    return {}


def _ask_for_a_split(top: str, names: Sequence[str]) -> str:
    """Return the question that the names of folders raise if they are read as classes, or ""."""
    plain = [name for name in names if _split_of(name)]
    if len(plain) == 1:
        return f"did you mean the split {printable(os.path.join(top, plain[0]))}?"
    if len(names) > 1 and all(_parsed(name, _SPLIT_NAME) for name in names):
        return f"did you mean one of the splits {', '.join(map(printable, names[:_NAMES_SHOWN]))}?"
    return ""


def _files_of_split(top: str, files: list[str], split: str | None, notes: Notes) -> list[str]:
    """Those of one split, as names such as train-00000-of-00002.parquet, imagenet-train-0.tar or val/0.tar say."""
    words = [_split_word(within(file, top)) for file in files]
    known = {word: SPLITS[word] for word in sorted(filter(None, words))}
    if not known or (None in words and len(set(known.values())) == 1):
        return files
    picked = pick_split(top, known, split, notes)
    without = (file for file, word in zip(files, words, strict=True) if word is None)
    notes.leave("file of no split", *(within(file, top) for file in without))
    return [file for file, word in zip(files, words, strict=True) if word == picked]


def _split_word(path: str) -> str | None:
    parts = reversed(path.lower().split(os.sep))  # the file's own name says it before its folders do
    return next((word for part in parts for word in re.split(r"[-_. ]", part) if word in SPLITS), None)


def pick_split(where: str, names: dict[str, str], split: str | None, notes: Notes) -> str:
    """Return the one of `names` (name → train, val or test) that `split` means; train or the only one for `None`.

    Raises:
        DetailFlowError: if it is none, or several.
    """
    order = ("train", "val", "test")
    ordered = sorted(names, key=lambda name: order.index(names[name]) if names[name] in order else len(order))
    notes.splits = tuple(name.lower() for name in ordered)
    wanted = "train" if split is None else split.lower()
    chosen = [name for name in names if name.lower() == wanted] or [
        name for name, meaning in names.items() if meaning == SPLITS.get(wanted, wanted)
    ]
    if not chosen and split is None:
        chosen = list(names) if len(names) == 1 else []
    if not chosen:
        have = ", ".join(notes.splits)
        if split is None:
            raise DetailFlowError(f"{where} has no train split: choose one of {have}")
        raise DetailFlowError(f"{where} has no split {split!r}: it has {have}")
    if len(chosen) > 1:
        raise DetailFlowError(
            f"{where} has several splits for {wanted}: choose one of {', '.join(map(printable, chosen))}"
        )
    notes.split = chosen[0].lower()
    return chosen[0]


# --- walking -------------------------------------------------------------------------------------------------------------


def _walk(top: str, notes: Notes) -> tuple[list[str], tuple[str, ...]]:
    """Every file below `top` in a fixed order, and the names of the folders in it.

    Links to files are followed, and links to folders elsewhere; a folder is read once. So no loop of links is endless, and
    no image is read twice because of one.
    """
    home = os.path.realpath(top)
    files: list[str] = []
    folders: list[str] = []
    seen = {_identity(top)}
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            entries = _entries(folder)
        except DetailFlowError as error:
            if folder == top:
                raise
            notes.warnings.append(f"{error}: its images are left out")
            continue
        below = []
        for entry in entries:
            if _is_system(entry.name):
                continue
            if _is_folder(entry):
                if entry.name.lower() in _THUMBNAILS:
                    notes.leave("folder of thumbnails", within(entry.path, top))
                elif entry.is_symlink() and _overlap(os.path.realpath(entry.path), home):
                    notes.leave("link to a folder of the set itself", within(entry.path, top))
                elif (identity := _identity(entry.path)) in seen:
                    notes.leave("link to a folder that is read already", within(entry.path, top))
                else:
                    seen.add(identity)
                    below.append(entry.path)
            elif _is_file(entry):
                files.append(entry.path)
            elif entry.is_symlink():
                notes.leave("dangling link", within(entry.path, top))
                if _suffix(entry.name) not in image_suffixes():  # perhaps a whole class
                    notes.warnings.append(
                        f"{entry.path} is a link to {_target(entry.path)}, which is not there: it is left out"
                    )
            else:
                notes.leave("special file", within(entry.path, top))
        if folder == top:
            folders = [os.path.basename(path) for path in below]
        waiting += reversed(below)
    return files, tuple(folders)


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DetailFlowError(f"{folder} cannot be read ({error.strerror})") from error


def _is_system(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _SYSTEM


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _identity(folder: str) -> object:
    try:
        found = os.stat(folder)
        return found.st_dev, found.st_ino
    except OSError:
        return folder


def _overlap(one: str, other: str) -> bool:
    """Whether one of two folders is the other or in it."""
    one, other = os.path.join(one, ""), os.path.join(other, "")
    return one.startswith(other) or other.startswith(one)


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return "something"


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def in_folders(files: Iterable[Path], top: str) -> Iterator[str | None]:
    """Yield for each file the name of the folder in `top` that holds it; `None` if `top` itself does."""
    for file in files:
        first, below, _ = within(str(file), top).partition(os.sep)
        yield first if below else None


def within(path: str, top: str) -> str:
    """Return a path below `top` without `top`; a hundred times as fast as `os.path.relpath`."""
    start = os.path.join(top, "")
    return path[len(start) :] if path.startswith(start) else os.path.relpath(path, top)
