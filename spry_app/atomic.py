"""Text files that are whole at any time, whoever reads them meanwhile. What is in them is not known here."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace the file, or, where there is no room for the new one, leave it as it is. Raises OSError."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)
