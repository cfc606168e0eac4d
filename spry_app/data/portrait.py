"""Which labels each shard has: counted, and drawn. Nothing is dealt out here."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from spry_app.config import DataConfig
from spry_app.data.corpus import load_corpus
from spry_app.data.partition import shards
from spry_app.errors import SpryError

_MOST_NAMES = 20
"""More classes are not told apart in a legend."""


@dataclass(frozen=True)
class LabelCounts:
    """rows: a shard each, with the number of its rows of each class, in the order of `names`."""

    names: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]


def label_counts(config: DataConfig, seed: int, count: int) -> LabelCounts:
    """Of `count` shards. Raises SpryError where the rows cannot be dealt out so. Rows without labels are one class."""
    corpus = load_corpus(config)
    labels = corpus.train["label"][:] if "label" in corpus.train.column_names else [0] * len(corpus.train)
    names = corpus.label_names or ("rows",)
    found = [Counter(labels[row] for row in shard) for shard in shards(config, seed, count)]
    return LabelCounts(names, tuple(tuple(one[label] for label in range(len(names))) for one in found))


def draw(counts: LabelCounts, path: Path) -> None:
    """A bar a shard, its classes one upon the other. Raises SpryError for a file that cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, min(0.3 * len(counts.rows), 24.0)), 4.0), layout="constrained")
    axes, below = figure.subplots(), [0] * len(counts.rows)
    for label, name in enumerate(counts.names):
        heights = [row[label] for row in counts.rows]
        shade = f"C{label}" if len(counts.names) <= 10 else _shade(label / len(counts.names))
        axes.bar(range(len(heights)), heights, bottom=below, width=0.9, label=name, color=shade)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(xlabel="device", ylabel="training rows", title="What each device holds")
    if 1 < len(counts.names) <= _MOST_NAMES:
        figure.legend(loc="outside right upper", reverse=True)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise SpryError(f"--picture is {str(path)!r}, which cannot be written: {error}.") from error


def _shade(part: float) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["turbo"](part)
