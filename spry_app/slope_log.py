"""What the clients of each round measured: the scalars from which every later adapter can be rebuilt, as numbers for a
message and as lines of a file. What they stand for is decided elsewhere (methods.global_state).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from spry_app.atomic import write_whole
from spry_app.errors import SpryError

FORMAT = "spry slopes 2"
LARGEST = 1e12
"""Of a number in a message, either way: squares of what is made of such, and sums over all clients, still fit fp32."""


@dataclass(frozen=True)
class Measured:
    """What one client measured in a round, or the mean over several that drew the same directions.

    client, sharing: numbers in the seed of the directions. units: numbers of the units that the scalars are for, in the
    model's order. examples: that were measured on, the weight in the round's mean. slopes: K numbers for each of T
    steps.
    """

    client: int
    units: tuple[int, ...]
    examples: int
    slopes: tuple[tuple[float, ...], ...]
    sharing: int = 0


@dataclass(frozen=True)
class Entry:
    """A round that changed the adapter; rounds without a usable reply have none."""

    round: int
    measured: tuple[Measured, ...]

    @property
    def size_bytes(self) -> int:
        """Of its slopes, at eight bytes each: what it adds to a message, but for a few bytes a client."""
        return 8 * sum(len(step) for measured in self.measured for step in measured.slopes)


def pack(entries: Sequence[Entry]) -> tuple[list[int], list[float]]:
    """Whole numbers and slopes, which `unpack` reads again."""
    counts: list[int] = []
    slopes: list[float] = []
    for entry in entries:
        counts += [entry.round, len(entry.measured)]
        for measured in entry.measured:
            steps, width = len(measured.slopes), len(measured.slopes[0]) if measured.slopes else 0
            seed = [measured.client, measured.sharing]
            counts += [*seed, measured.examples, steps, width, len(measured.units), *measured.units]
            slopes += [slope for step in measured.slopes for slope in step]
    return counts, slopes


def unpack(counts: Sequence[int], slopes: Sequence[float]) -> tuple[Entry, ...]:
    """The entries that `pack` was given. Raises ValueError where the numbers are not of its making.

    Takes no more time or memory than the numbers that are there.
    """
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise ValueError("a count in a slope log is not a whole number from 0")
    if not all(type(slope) in (float, int) and abs(slope) <= LARGEST for slope in slopes):
        raise ValueError(f"a slope in a slope log is not a number up to {LARGEST:g}")
    whole, real = iter(counts), iter(map(float, slopes))

    def take(numbers: Iterator[Any], count: int) -> tuple[Any, ...]:
        return tuple(next(numbers) for _ in range(count))

    def measured() -> Measured:
        client, sharing, examples, steps, width, units = take(whole, 6)
        if steps * width > len(slopes) or (steps and not width):
            raise ValueError(f"the numbers of a slope log end too early for {steps} steps of {width} slopes")
        held = take(whole, units)
        return Measured(client, held, examples, tuple(take(real, width) for _ in range(steps)), sharing)

    entries = []
    try:
        for round_ in whole:
            (replies,) = take(whole, 1)
            entries.append(Entry(round_, tuple(measured() for _ in range(replies))))
    except RuntimeError:  # a generator that met the end of the numbers
        raise ValueError("the numbers of a slope log end too early") from None
    if next(real, None) is not None:
        raise ValueError("a slope log has more slopes than its counts say")
    return tuple(entries)


class SlopeLog:
    """The file of a run: a header, then a line a round, only ever appended to.

    Tensors that no scalar stands for are in a file beside it, as they are after the last line. entries: of the rounds
    before, with their digests, where a run goes on.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], entries: Sequence[tuple[Entry, str]] = ()) -> None:
        self._path = path
        lines = [json.dumps({"format": FORMAT, **header}) + "\n", *(_line(*entry) for entry in entries)]
        write_whole(path, "".join(lines))

    def append(self, entry: Entry, digest: str, exact: dict[str, Tensor]) -> None:
        """digest: of all tensors after the round. exact: those that no scalar stands for."""
        if exact:
            beside, fresh = exact_path(self._path), exact_path(self._path).with_suffix(".new")
            save_file(exact, fresh)
            fresh.replace(beside)
        with self._path.open("a") as file:
            file.write(_line(entry, digest))


def exact_path(log: Path) -> Path:
    """Where the tensors are that no scalar of this log stands for."""
    return log.with_name("exact.safetensors")


def read(path: Path, until: float = math.inf) -> tuple[dict[str, Any], list[tuple[Entry, str]]]:
    """Header, and entries with their digests, to round `until`. A last line that was cut short is left out.

    Raises SpryError where the file is not a slope log.
    """
    try:
        first, *lines = path.read_text().split("\n")
        header = json.loads(first)
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
        entries = [_entry(json.loads(line)) for line in lines[:-1]]  # what follows the last end of line was cut short
        return header, [found for found in entries if found[0].round <= until]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SpryError(f"{path} is not a slope log ({error}); it must be the slopes.jsonl of a run.") from None


def _line(entry: Entry, digest: str) -> str:
    counts, slopes = pack([entry])
    return json.dumps({"round": entry.round, "digest": digest, "counts": counts, "slopes": slopes}) + "\n"


def _entry(line: Mapping[str, Any]) -> tuple[Entry, str]:
    (entry,) = unpack(line["counts"], line["slopes"])
    return entry, str(line["digest"])
