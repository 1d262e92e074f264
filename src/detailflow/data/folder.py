"""What a folder of files means: which of them are data, which splits they make, and what is left aside."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detailflow.data.image_files import image_suffixes
from detailflow.data.notes import MADE, Notes
from detailflow.errors import DetailFlowError, explained
from detailflow.pictures import is_made, is_overview
from detailflow.words import printable, some_names

MANY = (".parquet", ".tar")  # files of many images
_METADATA = ("metadata.csv", "metadata.jsonl")
_METADATA_IN_PARQUET = "metadata.parquet"

# What systems and programs leave beside people's files; hidden files and folders are not data either.
_SYSTEM = frozenset((
    "@eadir", "#recycle", "@recycle", "@__thumb", "__macosx", "lost+found", "$recycle.bin", "system volume information",
    "#snapshot", "~snapshot", "@recently-snapshot", "@tmp", "recycler", "recycled", "__pycache__",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
))  # fmt: skip
_THUMBNAILS = ("thumbnails", "thumbs")  # smaller copies of the images beside them
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")

_SPLITS = {  # as the `datasets` library names them, and a few more
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout"), "test"),
}
_ORDER = ("train", "val", "test")
_NAMES_SHOWN = 3
_IN_TWO_WORDS = re.compile(r"(train)[-_. ](val)|(hold)[-_. ](out)")
_WORDS = "|".join(sorted(_SPLITS, key=len, reverse=True))
# train, Train2017, train_images, images-train; my_train and train-v2 if the other splits are called alike
_AFFIX = r"(?:images?|imgs?|data|set|split|\d+)"
_SPLIT_NAME = re.compile(
    rf"(?P<before>(?:.*?[^a-z])??)(?:{_AFFIX}[-_. ]?)?(?P<word>{_WORDS})(?:[-_. ]?{_AFFIX})*(?P<after>(?:[^a-z].*)?)",
    re.DOTALL,
)
_WORD_WITHIN = re.compile(rf"(?P<before>.*?)(?P<word>{_WORDS})(?P<after>.*)", re.DOTALL)  # xtrain, Trainings
_NUMBERED = re.compile(r"(.*?)(\d+)-of-(\d+)")  # train-00001-of-00003.parquet
_LETTERS = re.compile(r"[^\W\d_]+")


class DataFiles(NamedTuple):
    """The files that a user's `data` and `split` mean.

    Attributes:
        kind: "folder" (of image files), ".parquet", ".tar", "saved" (by `save_to_disk`) or "hub".
        where: the folder that the files are in, or the name on the hub.
        metadata: files that may give the labels of a folder's images.
        folders: a folder's subfolders; those with images are its classes.
    """

    kind: str
    where: str
    files: list[str]
    notes: Notes
    metadata: Sequence[str] = ()
    folders: Sequence[str] = ()
    split: str = "train"

    @property
    def name(self) -> str:
        """Return what to call files of many images in a message."""
        if len(self.files) == 1:
            return self.files[0]
        many = "shards" if self.kind == ".tar" else "parquet files"
        return f"{os.path.dirname(self.files[0]) or '.'} ({len(self.files)} {many})"


def find_in_folder(top: str, split: str | None) -> DataFiles:
    """Return the files to be read in a folder."""
    notes = Notes()
    if _is_saved(top):
        return _find_saved(top, split, notes)
    entries = [entry for entry in _entries(top) if not is_system(entry.name)]
    subfolders = [entry.name for entry in entries if _kind(entry) == "folder" and entry.name.lower() not in _THUMBNAILS]
    files = [entry.path for entry in entries if _kind(entry) == "file"]
    metadata = [file for file in files if os.path.basename(file).lower() in _METADATA]
    if splits := _split_folders(subfolders):
        chosen = _pick_split(top, splits, split, notes)
        notes.leave("folder beside the splits", *(name for name in subfolders if name not in splits))
        notes.leave("file beside the splits", *(os.path.basename(file) for file in files if file not in metadata))
        split, top = None, os.path.join(top, chosen)
    else:
        notes.question = _ask_for_a_split(top, subfolders)
    found = _sort(top, split, notes, metadata)
    if split is not None and not notes.splits:
        raise DetailFlowError(
            f"{top} has no split {split!r}: it has no train, test or val subfolder, so leave out the split"
        )
    return found


def _sort(top: str, split: str | None, notes: Notes, metadata: list[str]) -> DataFiles:
    """Return a folder's images, or its files of many images; the others are left aside."""
    files, folders = _walk(top, notes)
    images = [file for file in files if _suffix(file) in image_suffixes()]
    pictures = {file for file in images if is_overview(file)}
    images = [file for file in images if file not in pictures]
    kind, many = most_of_one_kind(
        [file for file in files if not (images and os.path.basename(file) == _METADATA_IN_PARQUET)]
    )
    if many and not _images_win(top, images, many):
        taken = _files_of_split(top, [within(file, top) for file in many], split, notes)
        leave_others(top, files, set(many), notes)
        notes.warnings += _missing(top, taken)
        return DataFiles(kind, top, [os.path.join(top, name) for name in taken], notes)
    metadata += [file for file in files if os.path.basename(file).lower() in _METADATA and file not in metadata]
    if not metadata and any(os.path.basename(file) == _METADATA_IN_PARQUET for file in files):
        notes.question = notes.question or f"{_METADATA_IN_PARQUET} is not read: write metadata.csv"
    made = set() if metadata else {file for file in images if is_made(file)}
    if len(made) < len(images):  # a folder of samples alone is read
        images = [file for file in images if file not in made]
        notes.leave(MADE, *(within(file, top) for file in sorted(made)))
    notes.leave("file of several images", *(within(file, top) for file in sorted(pictures)))
    leave_others(top, files, {*images, *pictures, *made, *metadata}, notes)
    if not images:
        holds = f"; it holds {notes.aside()}" if notes.left_aside else ""
        raise DetailFlowError(
            f"{top} holds no images: put some there, in one subfolder per class if they have any{holds}"
        )
    return DataFiles("folder", top, images, notes, metadata, folders)


def _missing(top: str, names: Iterable[str]) -> Iterator[str]:
    """Yield a sentence for each set of files called as 00001-of-00003 that is not whole."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if found := _NUMBERED.match(name):
            numbers.setdefault((found[1], found[3]), set()).add(int(found[2]))
    for (before, of), there in numbers.items():
        if len(there) < int(of) and max(there) <= int(of):  # else they count something else
            name = printable(f"{os.path.join(top, before)}…-of-{of}")
            yield f"of the files {name} only {len(there):,} are there: get the others, too, if they are wanted"


def _images_win(top: str, images: list[str], many: list[str]) -> bool:
    """Return whether this is a folder of images with some archives, and not the other way round."""
    return len(images) > len(many) or len({*first_folders(images, top)} - {None}) > 1


def most_of_one_kind(files: Sequence[str]) -> tuple[str, list[str]]:
    """Return the kind of files of many images that most of these are, and those of that kind, which may be none."""
    many = {kind: [file for file in files if _suffix(file) == kind] for kind in MANY}
    kind = max(MANY, key=lambda kind: len(many[kind]))
    return kind, many[kind]


def leave_others(top: str, files: Iterable[str], taken: set[str], notes: Notes) -> None:
    """Leave aside what is not among the files that are taken."""
    for file in files:
        if file not in taken:
            suffix = _suffix(file)
            notes.leave("archive" if suffix in ARCHIVES else suffix or "file without a suffix", within(file, top))


def _is_saved(folder: str) -> bool:
    """Return whether `save_to_disk` of the `datasets` library has written a folder."""
    names = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all(os.path.isfile(os.path.join(folder, name)) for name in some) for some in names)


def _find_saved(folder: str, split: str | None, notes: Notes) -> DataFiles:
    """Return the files of a folder by `save_to_disk`: one set, or one in a subfolder for each split."""
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        names = [entry.name for entry in _entries(folder) if _kind(entry) == "folder" and _is_saved(entry.path)]
        if not names:
            raise DetailFlowError(f"{folder} holds no images: it has dataset_dict.json and no split that was saved")
        folder = os.path.join(
            folder, _pick_split(folder, {name: _split_of(name) or name for name in names}, split, notes)
        )
    elif split is not None:
        raise DetailFlowError(f"{folder} has no split {split!r}: it was saved as one set")
    return DataFiles("saved", folder, sorted(map(str, Path(folder).glob("*.arrow"))), notes)


def _walk(top: str, notes: Notes) -> tuple[list[str], list[str]]:
    """Return every file below `top` in a fixed order, and the names of the folders in it.

    Links to files and to folders elsewhere are followed, but a folder is read once: no loop of links is endless.
    """
    home = os.path.realpath(top)
    files: list[str] = []
    folders: list[str] = []
    seen, pending = {_identity(top)}, [top]
    while pending:
        folder = pending.pop()
        try:
            entries = _entries(folder)
        except DetailFlowError as error:
            if folder == top:
                raise
            notes.warnings.append(f"{error}: its images are left out")
            continue
        below = []
        for entry in entries:
            if is_system(entry.name):
                continue
            if (kind := _kind(entry)) == "file":
                files.append(entry.path)
            elif kind != "folder":
                _leave_special(entry, top, notes)
            elif entry.name.lower() in _THUMBNAILS:
                notes.leave("folder of thumbnails", within(entry.path, top))
            elif entry.is_symlink() and _overlap(os.path.realpath(entry.path), home):
                notes.leave("link to a folder of the set itself", within(entry.path, top))
            elif (identity := _identity(entry.path)) in seen:
                notes.leave("link to a folder that is read already", within(entry.path, top))
            else:
                seen.add(identity)
                below.append(entry.path)
        if folder == top:
            folders = [os.path.basename(path) for path in below]
        pending += reversed(below)
    return files, folders


def _leave_special(entry: "os.DirEntry[str]", top: str, notes: Notes) -> None:
    notes.leave("dangling link" if entry.is_symlink() else "special file", within(entry.path, top))
    if entry.is_symlink() and _suffix(entry.name) not in image_suffixes():  # perhaps a whole class
        try:
            target = os.readlink(entry.path)
        except OSError:
            target = "something"
        notes.warnings.append(f"{entry.path} is a link to {target}, which is not there: it is left out")


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    with explained(f"{folder} cannot be read"), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def is_system(name: str) -> bool:
    """Return whether a name is of a hidden file or folder, or of one that a system leaves beside people's files."""
    return name.startswith(".") or name.casefold() in _SYSTEM


def _kind(entry: "os.DirEntry[str]") -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "special"
    except OSError:  # a link to itself
        return "special"


def _identity(folder: str) -> object:
    try:
        found = os.stat(folder)
        return found.st_dev, found.st_ino
    except OSError:
        return folder


def _overlap(one: str, other: str) -> bool:
    """Return whether one of two folders is the other or in it."""
    one, other = os.path.join(one, ""), os.path.join(other, "")
    return one.startswith(other) or other.startswith(one)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def first_folders(files: Iterable[str], top: str) -> Iterator[str | None]:
    """Yield for each file the folder in `top` that it is in; `None` if it is in `top` itself."""
    for file in files:
        first, below, _ = within(file, top).partition(os.sep)
        yield first if below else None


def within(path: str, top: str) -> str:
    """Return a path below `top` without `top`; a hundred times as fast as `os.path.relpath`."""
    start = os.path.join(top, "")
    return path[len(start) :] if path.startswith(start) else os.path.relpath(path, top)


def file_sizes(files: Iterable[str], root: str | None = None) -> Iterator[tuple[str, int]]:
    """Yield each file's name within `root`, by default the deepest folder with all of them, and its bytes."""
    files = list(map(os.path.abspath, files))
    root = os.path.commonpath(list(map(os.path.dirname, files))) if root is None else os.path.abspath(root)
    start = len(os.path.join(root, ""))
    for file in files:
        with explained(f"{file} cannot be read", hint="it was there when the set was opened"):
            yield file[start:].replace(os.sep, "/"), os.stat(file).st_size


def _parse(name: str, pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """Return the split that a name means, and the letters before and after the word for it, as "before|after"."""
    name = _IN_TWO_WORDS.sub(lambda match: "".join(filter(None, match.groups())), name.strip().lower())
    if not (match := pattern.fullmatch(name)):
        return None
    return _SPLITS[match["word"]], "|".join("".join(_LETTERS.findall(match[part])) for part in ("before", "after"))


def _split_of(name: str) -> str | None:
    """Return the split that a name means if it says nothing else."""
    split, rest = _parse(name, _SPLIT_NAME) or ("", "")
    return split if rest == "|" else None


def _split_folders(names: Sequence[str]) -> dict[str, str]:
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


def _ask_for_a_split(top: str, names: Sequence[str]) -> str:
    """Return a question if these folders, which are read as classes, may be splits; else ""."""
    plain = [name for name in names if _split_of(name)]
    if len(plain) == 1:
        return f"did you mean the split {printable(os.path.join(top, plain[0]))}?"
    if len(names) > 1 and all(_parse(name, _SPLIT_NAME) for name in names):
        return f"did you mean one of the splits {', '.join(map(printable, names[:_NAMES_SHOWN]))}?"
    return ""


def _files_of_split(top: str, names: list[str], split: str | None, notes: Notes) -> list[str]:
    """Return the files of one split by their names: train-0-of-2.parquet, imagenet-train-0.tar, val/0.tar."""
    words = [_split_word(name) for name in names]
    known = {word: _SPLITS[word] for word in sorted(filter(None, words))}
    if not known:
        return names
    if None in words and len(set(known.values())) == 1:
        named = {name for name, word in zip(names, words, strict=True) if word}
        if split is None:
            notes.question = f"all files are read, with {some_names(named)}: is this of another split?"
            return names
        if _SPLITS.get(split.lower()) == "train":  # files of no split are those to train on
            notes.split, notes.splits = "train", tuple(sorted({"train", *known.values()}, key=_ORDER.index))
            others = named if "train" not in known.values() else set()
            notes.leave("file of another split", *sorted(others))
            return [name for name in names if name not in others]
    picked = _pick_split(top, known, split, notes)
    notes.leave("file of no split", *(name for name, word in zip(names, words, strict=True) if word is None))
    return [name for name, word in zip(names, words, strict=True) if word == picked]


def _split_word(path: str) -> str | None:
    parts = reversed(path.lower().split(os.sep))  # a file's own name comes before its folders'
    return next((word for part in parts for word in _LETTERS.findall(part) if word in _SPLITS), None)


def _pick_split(where: str, names: dict[str, str], split: str | None, notes: Notes) -> str:
    """Return the one of `names` (name → train, val or test) that `split` means; for `None`, train or the only one."""
    ordered = sorted(names, key=lambda name: _ORDER.index(names[name]) if names[name] in _ORDER else len(_ORDER))
    notes.splits = tuple(name.lower() for name in ordered)
    wanted = "train" if split is None else split.lower()
    chosen = [name for name in names if name.lower() == wanted]
    chosen = chosen or [name for name, meaning in names.items() if meaning == _SPLITS.get(wanted, wanted)]
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
