"""griffe extension: examples and citations of the method's page in docstrings, as the site shows them."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$).*\n?)*)", re.MULTILINE)  # to the next empty line
CITATION = re.compile(r"docs/(method\.md#[\w-]+)")


class Docstrings(griffe.Extension):
    """Fence the examples that doctest runs, and link what is cited."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            text = CITATION.sub(r"[\1](../\1)", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)
