"""What a step costs, in forward passes through the whole model, by its matrix products. The only place that counts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """One step on some examples, where all weights but a few small ones are frozen.

    passes: forward passes. sweeps: what else goes through the blocks above the lowest differentiated tensor: a tangent
    carried along (forward mode), a backward pass, a forward pass done again (checkpointing). With a frozen weight each
    of them is one matrix product, as the forward pass is; adapters, head and optimizer are too small to count.
    stretches: forward passes through some of the blocks alone, as (how many, from, to), the last two in parts of all
    blocks from the bottom.
    """

    passes: float
    sweeps: float = 0.0
    stretches: tuple[tuple[float, float, float], ...] = ()

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.passes + other.passes, self.sweeps + other.sweeps, self.stretches + other.stretches)

    def forwards(self, suffix: float, kept: float = 0.0) -> float:
        """Forward passes through the whole model.

        suffix: part of the blocks that is above the lowest differentiated tensor. kept: part of the blocks at the
        bottom whose result was at hand, so that no pass went through them.
        """
        partial = sum(count * max(0.0, top - max(bottom, kept)) for count, bottom, top in self.stretches)
        return self.passes * (1 - kept) + partial + self.sweeps * suffix


def suffix_above(depth: int, blocks: int) -> float:
    """Part of the blocks from number `depth` (0 is the lowest) upwards; 0 for what lies above all of them."""
    return 1 - depth / blocks if blocks else 0.0
