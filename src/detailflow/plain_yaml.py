"""YAML text as plain values: no key twice, decimal numbers, no small text for very many values."""

import re
from typing import Any

import yaml

MOST_VALUES = 100_000  # that aliases may stand for
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NOT_DECIMAL = re.compile(r"[-+]?0\w|.*:")


class _Loader(yaml.SafeLoader):
    """Take no key twice and decimal numbers alone: YAML has the last of two values, 0100 for 64 and 1:30 for 90."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping whose keys differ; what it merges from others may have them, too."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """Return a number, or the text of one that is not decimal: where it is used, it is an error with its name."""
        if _NOT_DECIMAL.match(node.value):
            return node.value
        return (self.construct_yaml_int if node.tag == _INT else self.construct_yaml_float)(node)


_Loader.add_constructor(_INT, _Loader.construct_number)
_Loader.add_constructor(_FLOAT, _Loader.construct_number)


def load_yaml(text: str) -> Any:
    """Return the plain values in YAML text; numbers are decimal, others such as 0100, 0x10 and 1:30 are text.

    Raises:
        yaml.YAMLError: if it is not valid, has a key twice, is nested too deeply, or a small text for very many values.
    """
    try:
        content = yaml.load(text, _Loader)
        total = _count_values(content, {})
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise yaml.YAMLError(
            str(error)
        ) from error  # PyYAML lets errors through, as of a number of five thousand digits
    if total > MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
    return content


def _count_values(value: Any, known: dict[int, int]) -> int:
    """Count the values in nested containers, each as often as it appears; endless nesting is a `RecursionError`."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(value)]
