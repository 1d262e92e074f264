"""The one progress bar: shown on a terminal, by the main process, if the work takes longer than two seconds."""

from collections.abc import Iterable
from typing import Any

PERCENT = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # for decoding steps, which say nothing to users


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

    options = {"delay": 2, "leave": False, "disable": None, "dynamic_ncols": True, **options}
    return tqdm(items, desc=desc, unit=unit, total=total, **options | ({} if main else {"disable": True}))
