"""Hidden states that enter a block below which nothing changes, so that they are computed once. Used by client and
server; never what is trained on them.
"""

import functools
import logging
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from spry_app.models import AdaptedModel, Entering, NoPrefixError
from spry_app.tasks import Encoded

logger = logging.getLogger(__name__)


class PrefixCache:
    """As long as it lives, the model's tensors below `depth` must stay as they are, and dropout off where they have it.

    memory_bytes: for the batch at hand and, as far as they fit beside it, all rows seen so far; disk_bytes: for the
    rows after those, in a temporary folder (of TMPDIR), which `close` removes. below: what enters a lower block, where
    that is kept too.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        rows: Encoded,
        depth: int,
        memory_bytes: int,
        disk_bytes: int = 0,
        below: "PrefixCache | None" = None,
    ) -> None:
        self._adapted, self._rows, self.depth, self._below = adapted, rows, depth, below
        self._memory, self._disk = memory_bytes, disk_bytes
        self._batch = 0
        """Bytes of the hidden states of the batch at hand."""
        self._kept: dict[int, Tensor | Path] = {}
        self._computed = 0
        """Blocks that ran, summed over examples."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def entering(self, slices: Sequence[Sequence[int]]) -> list[Entering | None]:
        """What enters block `depth` for each micro-batch; None where the memory ends: that one starts at the bottom."""
        self._batch, found = 0, []
        for rows in slices:
            hidden = self._hidden(rows) if self._batch < self._limit else None
            if hidden is not None:
                self._batch += hidden.nbytes
            found.append(None if hidden is None or self._batch > self._limit else Entering(self.depth, hidden))
        return found

    @property
    def _limit(self) -> int:
        """Bytes that the batch at hand may have."""
        return self._memory

    @property
    def forwards(self) -> float:
        """What has been computed so far, `below` included, in forward passes of one example through all blocks."""
        return self._computed / len(self._adapted.blocks) + (self._below.forwards if self._below else 0.0)

    def close(self) -> None:
        """Forget everything."""
        self._kept.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _hidden(self, rows: Sequence[int]) -> Tensor:
        """Shape (rows, longest of them, width), on the model's device."""
        new = [row for row in rows if row not in self._kept]
        # With padding on the left, positions may depend on the other rows of the batch, so nothing is kept.
        if new and self._rows.padding_side == "left":
            return self._pass(rows)
        fresh = self._compute(new, rows) if new else {}
        return pad_sequence([fresh[row] if row in fresh else self._read(row) for row in rows], batch_first=True)

    def _compute(self, new: Sequence[int], rows: Sequence[int]) -> dict[int, Tensor]:
        """Row -> its hidden states, of all that are `new` among the `rows` of a micro-batch."""
        fresh = self._each(new)
        at_hand = self._batch + len(rows) * max(map(self._rows.length, rows)) * fresh[new[0]][0].nbytes
        self._keep(fresh, at_hand)
        return fresh

    def _each(self, rows: Sequence[int]) -> dict[int, Tensor]:
        """All in one pass, each without its padding."""
        return {row: states[: self._rows.length(row)] for row, states in zip(rows, self._pass(rows), strict=True)}

    def _pass(self, rows: Sequence[int]) -> Tensor:
        start = self._below.entering([rows])[0] if self._below else None
        self._computed += len(rows) * (self.depth - (start.depth if start else 0))
        return self._adapted.prefix(self._rows.inputs(rows), self.depth, entering=start).hidden

    def _keep(self, fresh: Mapping[int, Tensor], beside: int = 0) -> None:
        """Each in memory where it fits with so many bytes `beside` it, else on disk, else nowhere."""
        for row, states in fresh.items():
            if beside + states.nbytes <= self._memory:
                self._memory -= states.nbytes
                self._kept[row] = states.clone()
            elif states.nbytes <= self._disk:
                self._disk -= states.nbytes
                self._kept[row] = self._write(row, states)

    def _write(self, row: int, states: Tensor) -> Path:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="spry-prefix-")
        path = Path(self._folder.name) / f"{row}.safetensors"
        save_file({"hidden": states.contiguous()}, path)
        return path

    def _read(self, row: int) -> Tensor:
        kept = self._kept[row]
        return kept if isinstance(kept, Tensor) else load_file(kept)["hidden"].to(self._adapted.device)


class LastingPrefixCache(PrefixCache):
    """For more than one task, so that which rows are at hand depends on what the process has done before; the hidden
    states, to the bit, do not.

    Which others pass beside a row decides its last bits. So which rows are kept is settled beforehand, the shortest
    ones (of which most fit), and so are the groups of `at_once` in which these pass: where one is wanted, all are
    computed. The others pass with those of their micro-batch, every time. Half of the memory is for the batch at hand.
    """

    def __init__(
        self, adapted: AdaptedModel, rows: Encoded, depth: int, memory_bytes: int, disk_bytes: int, at_once: int
    ) -> None:
        super().__init__(adapted, rows, depth, memory_bytes // 2, disk_bytes)
        self._at_hand, self._at_once = self._memory, at_once

    @property
    def _limit(self) -> int:
        return self._at_hand

    def _of(self, group: Sequence[int]) -> dict[int, Tensor]:
        """The hidden states of a group; those of an earlier run, counted like others, where runs share them."""
        if _shared is None:
            return self._each(group)
        inputs = self._rows.inputs(group)
        key = self.depth, *((name, values.shape, values.numpy().tobytes()) for name, values in inputs.items())
        if key in _shared:
            self._computed += len(group) * self.depth
        else:
            _shared[key] = [states.clone() for states in self._each(group).values()]
        return dict(zip(group, _shared[key], strict=True))

    @functools.cached_property
    def _group(self) -> dict[int, tuple[int, ...]]:
        """Row -> those with which it is computed and kept; no row that is not. What a token takes, the first tell."""
        order = self._rows.by_length(range(len(self._rows)))
        groups = [tuple(order[start : start + self._at_once]) for start in range(0, len(order), self._at_once)]
        states = self._of(groups[0])
        width = states[order[0]][0].nbytes
        room = {"memory": self._memory, "disk": self._disk}
        found = dict[int, tuple[int, ...]]()
        for group in groups:
            for row in group:
                needed = self._rows.length(row) * width
                place = next((place for place, left in room.items() if needed <= left), None)
                if place is None:
                    return found
                room[place] -= needed
            found |= dict.fromkeys(group, group)
            if group is groups[0]:
                self._keep(states)
        return found

    def _compute(self, new: Sequence[int], rows: Sequence[int]) -> dict[int, Tensor]:
        groups = self._group
        fresh = dict[int, Tensor]()
        for group in dict.fromkeys(groups[row] for row in new if row in groups and row not in self._kept):
            fresh |= self._of(group)
        self._keep(fresh)
        others = [row for row in new if row not in groups]
        return fresh | (self._each(others) if others else {})


Shared = dict[Hashable, list[Tensor]]
"""Depth and tokens of a group -> its hidden states."""
_shared: Shared | None = None


@contextmanager
def shared(between: Shared) -> Iterator[None]:
    """Meanwhile what `frozen` keeps for a run is kept in `between` too, and taken from there: for benchmarks, whose
    runs are many and alike.

    All of them must have the same model. Nothing else of a run changes: its bits, its counts of passes, and what it
    may keep itself stay as they are; this memory is beside that, and has no bound.
    """
    global _shared
    _shared = between
    try:
        yield
    finally:
        _shared = None


def frozen(
    adapted: AdaptedModel, rows: Encoded, memory_bytes: int, disk_bytes: int, at_once: int
) -> PrefixCache | None:
    """For what enters the lowest block with a trainable tensor, which no training changes and no dropout reaches.

    at_once: how many rows may pass beside each other. None where that is the lowest block of all, or passes cannot
    begin there.
    """
    depth = adapted.depth(name for names in adapted.units.values() for name in names)
    if not memory_bytes or not may_start_at(adapted, rows, depth):
        return None
    return LastingPrefixCache(adapted, rows, depth, memory_bytes, disk_bytes, at_once)


_usable: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()
"""Depths at which a model was tried, and whether its passes may begin there."""


def may_start_at(adapted: AdaptedModel, rows: Encoded, depth: int) -> bool:
    """Whether a pass from block `depth` gives what the whole one does; tried once a process, logged if not."""
    if not 0 < depth <= len(adapted.blocks):
        return False
    known = _usable.setdefault(adapted.model, {})
    if depth not in known:
        reason = _difference(adapted, rows, depth)
        if reason:
            logger.warning("Passes begin at the bottom of the model (%s), not at block %d.", reason, depth)
        known[depth] = not reason
    return known[depth]


@torch.no_grad()
def _difference(adapted: AdaptedModel, rows: Encoded, depth: int) -> str:
    inputs = rows.inputs(range(min(2, len(rows))))
    whole = adapted.features({}, inputs)
    try:
        short = adapted.features({}, inputs, adapted.prefix(inputs, depth))
    except NoPrefixError as error:
        return str(error)
    if whole.is_meta:  # the way is there, and nothing to compare
        return ""
    close = torch.allclose(whole, short, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    return "" if close else "what happens above it depends on more than its hidden states"
