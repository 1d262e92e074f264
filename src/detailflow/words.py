"""Numbers of things in words."""


def several(number: int, word: str) -> str:
    """Return "1 crop", "2,000 crops" or "3 classes"."""
    return f"{number:,} {word}" + ("" if number == 1 else "es" if word.endswith("s") else "s")
