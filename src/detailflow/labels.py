"""Class labels: which class a number, a name or a WordNet id means, and what the classes are called."""

import operator
import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from detailflow.errors import DetailFlowError, explained

Label = int | str
UNLABELLED = ("image",)  # the class names of a set of images without labels


class ClassId(int):
    """A class number; of a model without classes, that of the null class, which no label means."""


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """Return the WordNet id and the names of ImageNet's 1,000 classes, such as "n01440764" and "tench, Tinca tinca"."""
    lines = Path(__file__).with_name("imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    return tuple((wnid, names) for wnid, names in (line.split("\t") for line in lines))


def default_names(count: int) -> tuple[str, ...] | None:
    """Return the names of `count` classes if a model has none: ImageNet's for 1,000, else none."""
    classes = imagenet_classes()
    return tuple(names for _, names in classes) if count == len(classes) else None


class ClassLabels:
    """The classes of a model: `names`, or () if they have none, and `wnids`, or () if no class has a WordNet id.

    A class that was given as a WordNet id, as ImageNet's folders are, has ImageNet's names. A name of ImageNet's, such
    as "tench, Tinca tinca", stands for each of its synonyms too; any other is taken whole. Case matters only if two
    classes differ in nothing else. An integer is always a class's number; text that is a number is one, too, unless a
    class's name is a number. A model without classes has the null class alone, whose number is 0.
    """

    def __init__(self, names: Sequence[str] | None, count: int) -> None:
        given, by_id = tuple(names or ()), dict(imagenet_classes())
        known = set(by_id.values())
        self.count = count
        self.names = tuple(by_id.get(_key(name), name) for name in given)
        is_imagenet = given == tuple(by_id.values())
        ids = tuple(by_id) if is_imagenet else tuple(_key(name) if _key(name) in by_id else "" for name in given)
        self.wnids: tuple[str, ...] = ids if any(ids) else ()
        self._synonyms = [name.split(", ") if name in known else [name] for name in self.names]
        self.numbered = any(map(_is_number, self.names))
        self._exact: dict[str, list[int]] = {}  # whole name as it is written → classes
        self._indices: dict[str, list[int]] = {}  # name, synonym, WordNet id or number in lower case → classes
        for i, (name, synonyms) in enumerate(zip(self.names, self._synonyms, strict=True)):
            self._exact.setdefault(name.strip(), []).append(i)
            for key in {_key(text) for text in (name, *synonyms, *self.wnids[i : i + 1])} - {""}:
                self._indices.setdefault(key, []).append(i)
        for i, name in enumerate(self.names):
            if _is_number(name) and (value := str(int(name))) not in self._exact:  # "007" is 7
                self._indices.setdefault(value, []).append(i)

    @property
    def ids(self) -> list[ClassId]:
        """The numbers of all classes; of a model without classes, that of the null class."""
        return [ClassId(i) for i in range(self.count or 1)]

    def index(self, label: Label) -> int:
        """Return the number of the class that a number, a name, a synonym or a WordNet id means."""
        if isinstance(label, ClassId) and 0 <= label < (self.count or 1):
            return int(label)
        if not self.count:
            raise DetailFlowError(f"this model has no classes: leave out {label!r}")
        if not isinstance(label, str):
            return self._check(_integer(label))
        matches = self._matches(label)
        if len(matches) > 1:
            known_by = [self.wnids[i] if self.wnids else "" for i in matches]
            way = "number or WordNet id" if any(known_by) else "number"
            ways = [f"{i} ({wnid}{wnid and ': '}{self.names[i]})" for i, wnid in zip(matches, known_by, strict=True)]
            where = ", as an integer in Python or JSON (numbers in text are names here)" if self.numbered else ""
            raise DetailFlowError(
                f"{len(matches)} classes are called {label!r}: give the {way}, one of {', '.join(ways)}{where}"
            )
        if matches:
            return matches[0]
        if _is_number(label) and not self.numbered:
            return self._check(int(label))
        raise DetailFlowError(f"unknown class {label!r}: {self._advice(label)}")

    def _matches(self, name: str) -> list[int]:
        """Return the classes of exactly this name, else those of this name in another case."""
        return self._exact.get(name.strip()) or self._indices.get(_key(name), [])

    def find(self, name: str) -> int | None:
        """Return the one class that a name, a synonym or a WordNet id means; `None` if there is none or several."""
        matches = self._matches(name)
        return matches[0] if len(matches) == 1 else None

    def name(self, class_id: int) -> str:
        """Return a short name of a class: the first of its synonyms, or its number if the classes have no names.

        An image of a model without classes is called "image".
        """
        if not self.count:
            return UNLABELLED[0]
        number = self._check(_integer(class_id))
        return self._synonyms[number][0] if self.names else str(number)

    def search(self, word: str) -> list[int]:
        """Return the numbers of the classes with `word` in one of their names, or else of the one that it means."""
        return [i for i, name in enumerate(self.names) if _key(word) in _key(name)] or [self.index(word)]

    def _check(self, number: int) -> int:
        if not 0 <= number < self.count:
            raise DetailFlowError(f"unknown class {number}: the numbers are 0 to {self.count - 1}")
        return int(number)

    def _advice(self, label: str) -> str:
        """Return what to write instead of an unknown name."""
        if not self.names:
            return f"this model's classes have no names, only the numbers 0 to {self.count - 1}"
        some = ", ".join(self.name(i) for i in range(self.count if self.count <= 20 else 5))
        classes = f"the classes are {some}{'' if self.count <= 20 else f', … ({self.count} in all)'}"
        if self.numbered and _is_number(label):
            return f"numbers in text are names here, and {classes}"
        known = {_key(name): name for synonyms in self._synonyms for name in synonyms}
        with_word = [key for key in known if _key(label) in key.split()]
        close = with_word[:3] or get_close_matches(_key(label), known)
        advice = f"did you mean {' or '.join(known[key] for key in close)}?" if close else classes
        if "," in label or (" " in label.strip() and not any(" " in key for key in close)):
            advice += f"{'' if close else ';'} a label is one class; there are no text prompts"
        return advice


def listed(labels: Any) -> list[Label]:
    """Return one label or several, which may be an array or a tensor of numbers, as a list."""
    if isinstance(labels, set | frozenset):
        raise DetailFlowError("labels must be a list: a set has no order that images could come in")
    if hasattr(labels, "ndim") and hasattr(labels, "tolist"):
        with explained("labels must be numbers or names", Exception):  # of a tensor without numbers, on `meta`
            labels = labels.tolist()
    one = isinstance(labels, str | bytes) or not isinstance(labels, Iterable)
    return [labels] if one else list(labels)  # `ClassLabels.index` checks each


def _integer(label: Any) -> int:
    """Return a label that is not text as an integer; a truth value is none, though Python takes it for one."""
    plain = label.tolist() if hasattr(label, "tolist") else label
    try:
        if isinstance(plain, bool):
            raise TypeError
        return operator.index(plain)
    except TypeError:
        raise DetailFlowError(f"a class label must be a number or a name, not {label!r}") from None


def _is_number(text: str) -> bool:
    return re.fullmatch("-?[0-9]{1,18}", text.strip()) is not None


def _key(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip().casefold())  # folders of some systems have é as two characters
