"""How sentences name things."""

import os

import pytest

from detailflow.errors import DetailFlowError
from detailflow.words import one_line, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("photos/café", "photos/café"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        (os.fsdecode(b"caf\xe9"), "caf\N{REPLACEMENT CHARACTER}"),
        ("\ud800", "\N{REPLACEMENT CHARACTER}"),  # as JSON may hold
        ("\x1b[2Jcat", "\\x1b[2Jcat"),
        ("bell\a, back\b, home\r, \x7f, \x9b", "bell\\x07, back\\x08, home\\x0d, \\x7f, \\x9b"),
        ("cat\N{RIGHT-TO-LEFT OVERRIDE}gnp", "cat\\u202egnp"),
    ],
)
def test_names_can_be_printed_anywhere(name, shown):
    assert printable(name) == shown == str(DetailFlowError(name))
    shown.encode()


def test_a_name_in_a_table_is_one_line():
    assert one_line("two\nlines\tand a \x1btab") == "two\\x0alines\\x09and a \\x1btab"
