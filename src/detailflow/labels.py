"""Class labels: which class a number, a name or a WordNet id means, and what the classes are called. Knows no network."""

import operator
import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from detailflow.errors import DetailFlowError

Label = int | str


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
    """The classes of a model: `names`, or () where they have none, and `wnids`, or () where they are not ImageNet's.

    A name of ImageNet's, such as "tench, Tinca tinca", stands for each of its synonyms too; any other is taken whole.
    Upper and lower case are the same.
    """

    def __init__(self, names: Sequence[str] | None, count: int) -> None:
        wnids, imagenet = zip(*imagenet_classes(), strict=True)
        self.names, self.count = tuple(names or ()), count
        self.wnids: tuple[str, ...] = wnids if self.names == imagenet else ()
        known = set(imagenet)
        self._synonyms = [name.split(", ") if name in known else [name] for name in self.names]
        self._indices: dict[str, list[int]] = {}  # of the classes with that name, synonym or WordNet id
        for i, (name, synonyms) in enumerate(zip(self.names, self._synonyms, strict=True)):
            for key in {_key(text) for text in (name, *synonyms, *self.wnids[i : i + 1])}:
                self._indices.setdefault(key, []).append(i)

    def index(self, label: Label) -> int:
        """The number of the class that a number, as a string too, or a name, a synonym or a WordNet id means.

        Raises:
            DetailFlowError: if no class is meant, or more than one.
        """
        if not isinstance(label, str):
            return self._number(label)
        matches = self._indices.get(_key(label), [])
        if len(matches) > 1:
            way = "number or WordNet id" if self.wnids else "number"
            ways = ", ".join(f"{i} ({': '.join((*self.wnids[i : i + 1], self.names[i]))})" for i in matches)
            raise DetailFlowError(f"{len(matches)} classes are called {label!r}: give the {way}, one of {ways}")
        if matches:
            return matches[0]
        if re.fullmatch("-?[0-9]{1,18}", _key(label)):
            return self._number(int(label))
        raise DetailFlowError(f"unknown class {label!r}: {self._advice(label)}")

    def find(self, name: str) -> int | None:
        """The one class that a name, a synonym or a WordNet id means, but not a number; `None` where there is none or several."""
        matches = self._indices.get(_key(name), [])
        return matches[0] if len(matches) == 1 else None

    def name(self, class_id: int) -> str:
        """A short name of a class, the first of its synonyms, or its number where the classes have no names.

        Raises:
            DetailFlowError: for a number out of range.
        """
        number = self._number(class_id)
        return self._synonyms[number][0] if self.names else str(number)

    def search(self, word: str) -> list[int]:
        """The numbers of the classes that have `word` in one of their names, or else of the one that it means.

        Raises:
            DetailFlowError: if there is none.
        """
        return [i for i, name in enumerate(self.names) if _key(word) in _key(name)] or [self.index(word)]

    def _number(self, label: int) -> int:
        try:
            number = operator.index(label)
        except TypeError:
            raise DetailFlowError(f"a class label must be a number or a name, not {label!r}") from None
        if not 0 <= number < self.count:
            raise DetailFlowError(f"unknown class {number}: the numbers are 0 to {self.count - 1}")
        return number

    def _advice(self, label: str) -> str:
        """What to write instead of an unknown name."""
        if not self.names:
            return f"this model's classes have no names, only the numbers 0 to {self.count - 1}"
        known = {_key(name): name for synonyms in self._synonyms for name in synonyms}
        holding = [key for key in known if _key(label) in key.split()]
        if close := holding[:3] or get_close_matches(_key(label), known):
            return f"did you mean {' or '.join(known[key] for key in close)}?"
        some = [self.name(i) for i in range(self.count if self.count <= 20 else 5)]
        return f"the classes are {', '.join(some)}{'' if self.count <= 20 else f', … ({self.count} in all)'}"


def _key(text: str) -> str:
    return text.strip().casefold()
