"""Which names are taken for those of labels, and what may not be in an object twice."""

import pytest

from detailflow.data.columns import ask_for_labels, parse_json
from detailflow.errors import DetailFlowError


def test_names_that_labels_may_have():
    for name in ("labels", "Label", " LABEL ", "fine_label", "class_id", "img-class", "Categories"):
        assert ask_for_labels("a", "label", {name, "text"}) == (
            f"a has no column label: did you mean {name} (label_column: {name})?"
        )
    assert "did you mean label_id (" in ask_for_labels("a", "label", ["Classification score", "label_id"])
    assert ask_for_labels("a", "label", ["text", "glass", "unlabelled", ""]) == ""
    assert ask_for_labels("a.json", "b", ["label", "class"], "entry").startswith(
        "a.json has no entry b: did you mean cl"
    )


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"A": 1, "A": 2}', '{"b": {"c": 2}, "a": 1, "d": {}, "a": 2}'])
def test_an_entry_twice(text):
    with pytest.raises(DetailFlowError, match="^x has several entries called a: keep one of them$"):
        parse_json(text, {"a"}, "x")


def test_other_entries_twice():
    assert parse_json('{"a": 1, "b": 2, "b": 3}', {"a"}, "x") == {"a": 1, "b": 3}
    assert parse_json('{"b": {"a": 1, "a": 2}, "a": 3}', {"a"}, "x") == {"b": {"a": 2}, "a": 3}
    assert parse_json('[{"a": 1, "a": 2}]', {"a"}, "x") == [{"a": 2}]
