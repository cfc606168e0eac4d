"""Which labels each shard has, as a table and as a picture. Nothing is dealt out here."""

from collections.abc import Sequence
from pathlib import Path

from spry_app.config import DataConfig
from spry_app.data.partition import label_counts, shards
from spry_app.errors import SpryError

_MOST_NAMES = 20
"""More classes are not told apart in a legend."""


def dealt(config: DataConfig, seed: int, count: int) -> tuple[tuple[str, ...], list[list[int]]]:
    """Names of the classes, and how many rows of each every shard has. Rows without labels are of one class, "rows".

    Raises SpryError where they cannot be dealt out so.
    """
    return label_counts(config, seed, count) or (("rows",), [[len(shard)] for shard in shards(config, seed, count)])


def draw(names: Sequence[str], rows: Sequence[Sequence[int]], path: Path) -> None:
    """A bar a shard, its classes (see dealt) one upon the other. Raises SpryError for a file that cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, min(0.3 * len(rows), 24.0)), 4.0), layout="constrained")
    axes, below = figure.subplots(), [0] * len(rows)
    for label, name in enumerate(names):
        heights = [row[label] for row in rows]
        shade = f"C{label}" if len(names) <= 10 else _shade(label / len(names))
        axes.bar(range(len(heights)), heights, bottom=below, width=0.9, label=name, color=shade)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(xlabel="device", ylabel="training rows", title="What each device holds")
    if 1 < len(names) <= _MOST_NAMES:
        figure.legend(loc="outside right upper", reverse=True)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise SpryError(f"--picture is {str(path)!r}, which cannot be written: {error}.") from error


def _shade(part: float) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["turbo"](part)
