"""Class labels: which class a number, a name or a WordNet id means, and what the classes are called. Knows no network."""

import operator
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from detailflow.errors import DetailFlowError

Label = int | str


class ClassId(int):
    """A class's number for certain, where a plain number may be the name of another class."""


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """ImageNet's 1,000 classes in the order of ILSVRC 2012: WordNet id and names, as in "n01440764", "tench, Tinca tinca"."""
    lines = Path(__file__).with_name("imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    return tuple((wnid, names) for wnid, names in (line.split("\t") for line in lines))


def default_names(count: int) -> tuple[str, ...] | None:
    """The names of `count` classes where a model does not say them: ImageNet's for 1,000, else none."""
    classes = imagenet_classes()
    return tuple(names for _, names in classes) if count == len(classes) else None


class ClassLabels:
    """The classes of a model: `names`, or () if they have none, and `wnids`, or () if none of them is known by one.

    A class that was given as a WordNet id, as ImageNet's folders are, has ImageNet's names. A name of ImageNet's, such as "tench,
    Tinca tinca", stands for each of its synonyms too; any other is taken whole. Upper and lower case are the same unless two
    classes differ in nothing else. If a class's name is a number, numbers are always names.
    """

    def __init__(self, names: Sequence[str] | None, count: int) -> None:
        given, by_id = tuple(names or ()), dict(imagenet_classes())
        known = set(by_id.values())
        self.count = count
        self.names = tuple(by_id.get(_key(name), name) for name in given)
        ids = (
            tuple(by_id)
            if given == tuple(by_id.values())
            else [_key(name) if _key(name) in by_id else "" for name in given]
        )
        self.wnids: tuple[str, ...] = tuple(ids) if any(ids) else ()
        self._synonyms = [name.split(", ") if name in known else [name] for name in self.names]
        self.numbered = any(map(_is_number, self.names))
        self._exact: dict[str, list[int]] = {}  # the classes of each name as it is written, whole
        self._indices: dict[str, list[int]] = {}  # of the classes with that name, synonym, WordNet id or number
        for i, (name, synonyms) in enumerate(zip(self.names, self._synonyms, strict=True)):
            self._exact.setdefault(name.strip(), []).append(i)
            for key in {_key(text) for text in (name, *synonyms, *self.wnids[i : i + 1])} - {""}:
                self._indices.setdefault(key, []).append(i)
        for i, name in enumerate(self.names):
            if _is_number(name) and (value := str(int(name))) not in self._exact:  # "007" is 7
                self._indices.setdefault(value, []).append(i)

    def index(self, label: Label) -> int:
        """Return the number of the class that a number, as a string too, or a name, a synonym or a WordNet id means.

        Raises:
            DetailFlowError: if no class is meant, or more than one.
        """
        if isinstance(label, ClassId):
            return self._number(label)
        text = label if isinstance(label, str) else str(_integer(label))
        matches = self._matches(text)
        if len(matches) > 1:
            way = "number or WordNet id" if any(self.wnids[i : i + 1] for i in matches) else "number"
            ways = ", ".join(
                f"{i} ({': '.join(filter(None, (*self.wnids[i : i + 1], self.names[i])))})" for i in matches
            )
            raise DetailFlowError(f"{len(matches)} classes are called {label!r}: give the {way}, one of {ways}")
        if matches:
            return matches[0]
        if _is_number(text) and not self.numbered:
            return self._number(int(text))
        raise DetailFlowError(f"unknown class {label!r}: {self._advice(text)}")

    def _matches(self, name: str) -> list[int]:
        """The classes of a name: those that are written so, else those that are when upper and lower case are the same."""
        return self._exact.get(name.strip()) or self._indices.get(_key(name), [])

    def find(self, name: str) -> int | None:
        """The one class that a name, a synonym or a WordNet id means, but not a number; `None` if there is none or several."""
        matches = self._matches(name)
        return matches[0] if len(matches) == 1 else None

    def name(self, class_id: int) -> str:
        """A short name of a class, the first of its synonyms, or its number where the classes have no names.

        Raises:
            DetailFlowError: for a number out of range.
        """
        number = self._number(_integer(class_id))
        return self._synonyms[number][0] if self.names else str(number)

    def search(self, word: str) -> list[int]:
        """The numbers of the classes that have `word` in one of their names, or else of the one that it means.

        Raises:
            DetailFlowError: if there is none.
        """
        return [i for i, name in enumerate(self.names) if _key(word) in _key(name)] or [self.index(word)]

    def _number(self, number: int) -> int:
        if not 0 <= number < self.count:
            raise DetailFlowError(f"unknown class {number}: the numbers are 0 to {self.count - 1}")
        return int(number)

    def _advice(self, label: str) -> str:
        """What to write instead of an unknown name."""
        if not self.names:
            return f"this model's classes have no names, only the numbers 0 to {self.count - 1}"
        if self.numbered and _is_number(label):
            return f"numbers are names here, and the classes are {self._some()}"
        known = {_key(name): name for synonyms in self._synonyms for name in synonyms}
        holding = [key for key in known if _key(label) in key.split()]
        if close := holding[:3] or get_close_matches(_key(label), known):
            return f"did you mean {' or '.join(known[key] for key in close)}?"
        return f"the classes are {self._some()}"

    def _some(self) -> str:
        some = [self.name(i) for i in range(self.count if self.count <= 20 else 5)]
        return f"{', '.join(some)}{'' if self.count <= 20 else f', … ({self.count} in all)'}"


def listed(labels: Any) -> list[Label]:
    """Return the labels in one label or several, which may be an array or a tensor of numbers."""
    if hasattr(labels, "ndim") and hasattr(labels, "tolist"):
        labels = labels.tolist()
    one = isinstance(labels, str | bytes) or not isinstance(labels, Iterable)
    return [labels] if one else list(labels)  # `ClassLabels.index` looks at each


def _integer(label: Any) -> int:
    """A label that is no text as an integer; a truth value is none, though Python takes it for one."""
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
    return text.strip().casefold()
