"""What all runs of a comparison share, and how long they are: a variant's own keys in, a whole run config out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.cells import Cell
from benchmarks.rows import Split, data_keys, partition_keys
from spry_app.config import Scalar

SEARCH_SEED = 1000
"""Of all searching runs; no run of a table has it."""
SEARCH_PART = 3
"""A searching run has one of so many rounds, unless a plan says otherwise."""
TOP_BLOCKS = ",".join(f"{block}.attention.self.{name}" for block in (4, 5) for name in ("query", "value"))
"""The upper two of MiniLM's six: what lies below is computed once for all directions of a task, not once for each."""
METHOD_KEYS: dict[str, dict[str, Scalar]] = {
    "spry-per-iteration": {"client.local-steps": 1, "client.optimizer": "sgd"},
    "decomfl": {"client.optimizer": "sgd"},
    "fedsgd": {"client.local-steps": 1},
    "fedspzo": {"client.cut": 5, "client.directions": 2, "client.upper-directions": 2},
}
"""What belongs to a method's definition but is not in its row: SPRY per iteration and FedSGD talk to the server after
every batch, DeComFL's steps are linear in its scalars. FedSPZO cuts between the two blocks that are trained, and has as
many slopes as the others.
"""


@dataclass(frozen=True)
class Variant:
    """keys: what sets it apart. like: the keys with which its step sizes are searched, where not with its own. longer:
    how many times as many rounds a run for a table has.
    """

    keys: Mapping[str, Scalar]
    like: Mapping[str, Scalar] | None = None
    longer: int = 1

    @property
    def searched(self) -> Mapping[str, Scalar]:
        return self.keys if self.like is None else self.like


@dataclass(frozen=True)
class Plan:
    """shared: keys of every run, and the defaults of what variants vary. rounds: of a run with the shared number of
    local steps; others have as many more as they take fewer, so that all see as many examples. evaluations: after
    training has begun. nodes: over which the rows are dealt. search_part: a searching run has one of so many rounds;
    the more of them it leaves out, the larger the steps it prefers. own: node config of each node, none for all alike.
    """

    split: Split
    alpha: str
    nodes: int
    clients: int
    rounds: int
    evaluations: int
    shared: Mapping[str, Scalar]
    search_part: int = SEARCH_PART
    own: Sequence[Mapping[str, Scalar]] = ()

    def cell(self, keys: Mapping[str, Scalar]) -> Cell:
        """The run of a whole run config on these nodes."""
        return Cell(keys, self.nodes, self.own)

    def final(self, keys: Mapping[str, Scalar], seed: int, longer: int = 1) -> dict[str, Scalar]:
        """A run for a table, scored on the evaluation file."""
        known = data_keys(self.split, self.split.test)
        return known | self._whole(keys, longer * self.rounds, longer * self.evaluations, seed)

    def searching(self, keys: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """A short run for choosing a step size, scored on rows of the training file."""
        rounds = -(-self.rounds // self.search_part)
        known = data_keys(self.split, self.split.choice)
        return known | self._whole(keys, rounds, self.evaluations, SEARCH_SEED)

    def _whole(self, keys: Mapping[str, Scalar], rounds: int, evaluations: int, seed: int) -> dict[str, Scalar]:
        method = METHOD_KEYS.get(str(keys.get("method", "")), {})
        whole = {
            "preset": "",
            "server.fraction-train": 1 / self.nodes,
            "server.min-train-nodes": self.clients,  # exactly so many, with the least fraction
            **partition_keys(self.alpha),
            **self.shared,
            **method,
            **keys,
        }
        steps = rounds * int(self.shared["client.local-steps"]) / int(whole["client.local-steps"])
        every = max(1, round(steps / evaluations))
        return whole | {
            "seed": seed,
            "num-server-rounds": every * evaluations,
            "server.evaluate-every": every,
            "server.fraction-evaluate": 0.0,
        }
