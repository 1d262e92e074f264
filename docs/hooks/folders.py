"""What of a folder of the repository the site lists."""

from pathlib import Path


def entries(folder: Path) -> list[Path]:
    """Return a folder's entries but hidden ones and what its own .gitignore names, such as packages of an example."""
    ignored = folder / ".gitignore"
    left_out = {line.rstrip("/") for line in ignored.read_text("utf-8").split()} if ignored.exists() else set()
    return sorted(e for e in folder.iterdir() if not e.name.startswith(("_", ".")) and e.name not in left_out)
