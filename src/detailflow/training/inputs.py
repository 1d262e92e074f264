"""The inputs of a run: images, tokens and models are known by their content, wherever they are."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detailflow import hub
from detailflow.data.source import ImageSource
from detailflow.data.streams import StreamSource
from detailflow.data.tokens import TokenStore
from detailflow.files import reading
from detailflow.published import Kind

MOST_CLASSES = 2000  # whose counts are kept
SHOWN = 12  # of a fingerprint's digits
_WEIGHTS = (".safetensors", ".json", ".bin", ".pt", ".pth")  # of a network that is given by its folder


@dataclass(frozen=True)
class Input:
    """What a setting names.

    Attributes:
        read: returns its "fingerprint"; for images also their number as "images" and, if there are not too many
            classes, the number of each class as "classes".
        at_start: whether only the start of a run needs it, so that a run can go on without it.
    """

    read: Callable[[], dict[str, Any]]
    at_start: bool = False


def images_input(source: ImageSource | StreamSource) -> Input:
    """Return the identity of a set of images: the listing of its files."""
    return Input(lambda: _counted_input(source.fingerprint, source.counts))


def tokens_input(store: TokenStore) -> Input:
    """Return the identity of a token store."""
    return Input(lambda: _counted_input(store.fingerprint, store.counts))


def _counted_input(fingerprint: str, counts: Mapping[str, int]) -> dict[str, Any]:
    classes = dict(counts) if len(counts) <= MOST_CLASSES else {}
    return {"fingerprint": fingerprint, "images": sum(counts.values()), "classes": classes}


def model_input(path_or_id: str, kind: Kind, at_start: bool = True) -> Input:
    """Return the identity of a model, mostly one to start from: its config and weights."""
    return Input(lambda: {"fingerprint": hub.fingerprint(*hub.load(path_or_id, kind))}, at_start)


def files_input(path_or_name: str | None, at_start: bool = False) -> Input | None:
    """Return the identity of weights in a file or a folder of files; `None` if it is neither, as a name on the hub."""
    path = Path(path_or_name or "").expanduser()
    if not path_or_name or not path.exists():
        return None
    return Input(lambda: {"fingerprint": _digest(path)}, at_start)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(_weight_files(path)):
        with reading(file), file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{'' if path.is_file() else file.name} {content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _weight_files(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if entry.is_file() and entry.name.endswith(_WEIGHTS):
            yield Path(entry.path)


def difference(name: str, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str | None:
    """Return how an input differs, as "other images (40 images in 2 classes then, …)"; `None` if it does not."""
    if theirs.get("fingerprint") == mine.get("fingerprint"):
        return None
    what = {"data": "images", "tokens": "tokens"}.get(name)
    if what is None:
        prints = " and now ".join(str(one.get("fingerprint"))[:SHOWN] for one in (theirs, mine))
        return f"another {name} (its fingerprint was {prints})"
    before, now = ({str(k): int(v) for k, v in dict(one.get("classes") or {}).items()} for one in (theirs, mine))
    changed = [
        f"{k} {before.get(k, 0):,} → {now.get(k, 0):,}" for k in {**before, **now} if before.get(k) != now.get(k)
    ]
    facts = [f"{_number(theirs)} then, {_number(mine)} now"]
    if changed:
        facts.append(f"changed: {', '.join(changed[:3])}{f' and {len(changed) - 3} more' if len(changed) > 3 else ''}")
    elif before:
        facts.append("as many of each class, in other files")
    return f"other {what} ({'; '.join(facts)})"


def _number(one: Mapping[str, Any]) -> str:
    classes = f" in {len(one['classes']):,} classes" if one.get("classes") else ""
    return f"{one.get('images')} images{classes}"
