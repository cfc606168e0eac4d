"""One local step's gradient: rows in, estimate out, within the slices that the node's memory allows. No optimizer."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from spry_app.autodiff.budget import Slices
from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.exact import estimate_with_exact
from spry_app.autodiff.gradients import Estimate, Gradient
from spry_app.autodiff.slopes import Batch
from spry_app.autodiff.workspace import workspace
from spry_app.client.examples import ByExample
from spry_app.client.node import Node
from spry_app.models import Entering
from spry_app.objectives import batch_of, head_cut
from spry_app.prefix import PrefixCache


@dataclass(frozen=True)
class Step:
    """What is the same for all steps of a task.

    exact: tensors whose gradient is exact although the others have slopes. directions: K in the papers. prefix: the
    hidden states below the lowest unit; None where every pass begins at the bottom. suffix: part of the blocks above
    the lowest tensor, on which the cost depends. alone: where rows are protected one by one, which then pass so.
    """

    node: Node
    gradient: Gradient
    exact: Set[str]
    directions: int
    slices: Slices
    prefix: PrefixCache | None = None
    suffix: float = 1.0
    alone: ByExample | None = None

    def estimate(self, rows: Sequence[int], tensors: Tensors, seed: Seed) -> tuple[Estimate, float]:
        """The gradient of the mean loss of these rows at `tensors`, and its cost in passes of one example. Where rows
        are `alone`, it is that of the mean over rows, whatever their terms, as far as it may be known.

        Hidden states of the prefix cost where they are computed (prefix.py), not here.
        """
        kept = list[tuple[int, float]]()

        def entering(slices: Sequence[Sequence[int]]) -> list[Entering | None]:
            starts: list[Entering | None] = [None] * len(slices)
            if self.prefix is not None:
                starts = self.prefix.entering(slices)
            for part, start in zip(slices, starts, strict=True):
                kept.append((len(part), start.depth / len(self.node.adapted.blocks) if start else 0.0))
            return starts

        cut = head_cut(self.gradient, self.node.adapted, self.node.train, self.exact, tensors)
        with workspace(self.slices.workspace_bytes):
            examples = 1 if self.alone else self.slices.micro_batch
            batch = batch_of(self.node.adapted, self.node.train, rows, examples, seed, entering)

            def of(some: Batch) -> Estimate:
                at_once = self.slices.directions_at_once
                return estimate_with_exact(
                    self.gradient, some, tensors, self.exact, seed, self.directions, at_once, cut
                )

            if self.alone is None:
                estimate = of(batch)
            else:
                estimate = self.alone.estimate(of, batch, self.gradient, self.exact, tensors, seed)
        return estimate, sum(examples * estimate.cost.forwards(self.suffix, part) for examples, part in kept)
