"""One line of a plan: what a way takes and gives on a device. How it comes about is elsewhere."""

from dataclasses import dataclass, field

from spry_app.config import Scalar


@dataclass(frozen=True, kw_only=True)
class Row:
    """gradient, hand: what it is called, and whose units it trains (ways.HANDS). keys: run-config keys beside the run's
    own that make it so, with the slices below.

    examples_at_once, directions_at_once, workspace_kib: its slices (autodiff.budget), the smallest where nothing fits.
    *_mib: of the device, adding up to total_mib. forwards: a step, in passes of one example. seconds: of a step, None
    where the speed of the device is not known. steps: a round. *_bytes: a round and client. directions, perturbed: K,
    and the numbers that slopes are for; both 0 where the gradient is exact. holders: clients of a round with the same
    units, whose estimates are averaged. most_examples, most_tokens: that fit at once (at this length), and in one
    example; 0 where it was not asked. error: why it is not possible at all.
    """

    gradient: str
    hand: str
    keys: dict[str, Scalar] = field(default_factory=dict)
    error: str = ""
    fits: bool = False
    examples_at_once: int = 0
    directions_at_once: int = 0
    workspace_kib: int = 0
    weights_mib: float = 0.0
    activations_mib: float = 0.0
    tangents_or_graph_mib: float = 0.0
    optimizer_mib: float = 0.0
    workspace_mib: float = 0.0
    total_mib: float = 0.0
    forwards: float = 0.0
    step_s: float | None = None
    steps: int = 0
    round_s: float | None = None
    up_bytes: int = 0
    down_bytes: int = 0
    directions: int = 0
    directions_kind: str = "gaussian"
    perturbed: int = 0
    holders: int = 1
    most_examples: int = 0
    most_tokens: int = 0
