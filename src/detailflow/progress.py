"""The one progress bar: shown on a terminal, by the main process, if the work takes longer than two seconds."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

LONG_RUN: dict[str, Any] = {"delay": 0, "leave": True, "disable": False}  # a run's own bar: at once, also in a log file
PERCENT = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # for decoding steps, which say nothing to users


def bar_width() -> dict[str, Any]:
    """Return tqdm's options for a bar as wide as the terminal; on one with no columns it would show nothing."""
    with suppress(OSError, ValueError, AttributeError):  # it is not a terminal
        if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            return {"ncols": 80, "nrows": 24}
    return {"dynamic_ncols": True}


def progress_bar(
    items: Iterable[Any] | None = None, *, desc: str, unit: str = "it", total: int | None = None, main: bool = True,
    **options: Any,
) -> Any:  # fmt: skip
    """Return tqdm's bar over `items`, or one to update.

    Args:
        main: whether this is the main process.
        options: tqdm's, such as `leave` and `delay`.
    """
    from tqdm import tqdm

    options = {"delay": 2, "leave": False, "disable": None, **bar_width(), **options}
    return tqdm(items, desc=desc, unit=unit, total=total, **options | ({} if main else {"disable": True}))
