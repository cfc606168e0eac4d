"""One local step's gradient: rows in, estimate out, within the slices that the node's memory allows. No optimizer."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from spry_app.autodiff.budget import Slices
from spry_app.autodiff.directions import Seed, Tensors
from spry_app.autodiff.exact import estimate_with_exact
from spry_app.autodiff.gradients import Estimate, Gradient
from spry_app.autodiff.workspace import workspace
from spry_app.client.node import Node
from spry_app.client.prefix import PrefixCache
from spry_app.objectives import batch_of


@dataclass(frozen=True)
class Step:
    """What is the same for all steps of a task.

    exact: tensors whose gradient is exact although the others have slopes. directions: K in the papers. prefix: the
    hidden states below the lowest unit; None where every pass begins at the bottom.
    """

    node: Node
    gradient: Gradient
    exact: Set[str]
    directions: int
    slices: Slices
    prefix: PrefixCache | None = None

    def estimate(self, rows: Sequence[int], tensors: Tensors, seed: Seed) -> Estimate:
        """The gradient of the mean loss of these rows at `tensors`."""
        entering = self.prefix.entering if self.prefix else None
        with workspace(self.slices.workspace_bytes):
            batch = batch_of(self.node.adapted, self.node.train, rows, self.slices.micro_batch, seed, entering)
            return estimate_with_exact(
                self.gradient, batch, tensors, self.exact, seed, self.directions, self.slices.directions_at_once
            )
