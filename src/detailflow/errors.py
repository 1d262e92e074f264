"""The one exception for what a user can put right, and how its sentences list things."""


class DetailFlowError(ValueError):
    """Bad input: a file, config, flag, checkpoint or image. The message, one sentence, names it and says what would be right."""


def some_names(names: set[str]) -> str:
    """The first few of many names, for a sentence."""
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
