"""What a node holds for as long as its process lives: the model, its rows, encoded. Training is elsewhere."""

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from spry_app.autodiff.budget import Slices
from spry_app.autodiff.directions import Tensors
from spry_app.autodiff.memory import MIB
from spry_app.autodiff.workspace import workspace
from spry_app.config import AdapterConfig, ClientConfig, ModelConfig, RunConfig
from spry_app.data import label_names, load_shard
from spry_app.errors import SpryError
from spry_app.models import AdaptedModel, Fixed, load_model
from spry_app.objectives import refuse_too_long, score
from spry_app.prefix import PrefixCache, frozen
from spry_app.protocol import Score
from spry_app.tasks import Encoded, LearningTask, encode_rows, get_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """A model and one shard of rows, ready to work.

    start: the trainable tensors before all training. partition: number of the shard, -1 where the node has its own
    file. memory_mib: what a training step may take on this machine above the loaded model; forward_ms: how long a
    forward pass of an example takes; each 0.0 where the node config does not say.
    """

    adapted: AdaptedModel
    train: Encoded
    heldout: Encoded
    start: Tensors
    partition: int
    memory_mib: float = 0.0
    forward_ms: float = 0.0
    _frozen: dict[int, PrefixCache | None] = field(default_factory=dict, repr=False, compare=False)

    def frozen(self, rows: Encoded, config: ClientConfig) -> PrefixCache | None:
        """What enters the lowest trained block for rows of this node, kept as long as the node; with half of the memory
        that is allowed, as the other half is for what lies above. Within a memory budget rows pass one by one.
        """
        if id(rows) not in self._frozen:
            memory, disk = config.prefix_cache_mib * MIB // 2, config.prefix_cache_disk_mib * MIB // 2
            at_once = 1 if self.memory_mib or config.memory_budget_mib else config.micro_batch or config.batch_size
            self._frozen[id(rows)] = frozen(self.adapted, rows, memory, disk, at_once)
        return self._frozen[id(rows)]

    def score(self, config: ClientConfig, slices: Slices) -> Score:
        """Of the tensors now loaded, on the rows held out, in no more memory than a step in these slices."""
        bottom, at_once = self.frozen(self.heldout, config), min(config.batch_size, slices.micro_batch)
        with workspace(slices.workspace_bytes):
            return score(self.adapted, self.heldout, at_once, bottom.entering if bottom else None)


def load_node(
    config: RunConfig, node_config: Mapping[str, bool | float | int | str], frame: Fixed | None = None
) -> Node:
    """The node that Flower's `node_config` describes; model and rows are loaded once a process.

    Keys: partition-id, num-partitions (a shard of `data.source`), data (the node's own file), model (its own copy of
    the checkpoint), memory-budget-mib (what a training step may take here above the loaded model), forward-ms (how long
    a forward pass of an example takes here; else it is measured). frame: what the server has sent of the adapter.
    Raises SpryError where they do not make a usable node.
    """
    file, path = str(node_config.get("data", "")), str(node_config.get("model", ""))
    if not file and not {"partition-id", "num-partitions"} <= node_config.keys():
        raise SpryError(
            f"The node config has {', '.join(sorted(node_config)) or 'no key'}; it needs partition-id and "
            'num-partitions (a shard of data.source), or data="/path/to/its/own.jsonl".'
        )
    index, count = int(node_config.get("partition-id", -1)), int(node_config.get("num-partitions", 0))
    return _load_node(config, path, file, index, count, *(_stated(node_config, key) for key in _NUMBERS), frame)


_NUMBERS = {"memory-budget-mib": "MiB", "forward-ms": "milliseconds"}
"""What a node may say of its machine, in which unit."""


def _stated(node_config: Mapping[str, bool | float | int | str], key: str) -> float:
    """0.0 where the node says nothing."""
    if key not in node_config:
        return 0.0
    stated = node_config[key]
    if isinstance(stated, bool | str) or not 0 < stated < math.inf:
        raise SpryError(
            f"The node config has {key}={stated!r}; it must be a positive number of {_NUMBERS[key]}, e.g. {key}=64, "
            "or be left out."
        )
    return float(stated)


@functools.lru_cache(maxsize=1)
def _load_model(
    model: ModelConfig,
    adapter: AdapterConfig,
    task: LearningTask,
    labels: int,
    seed: int,
    path: str,
    frame: Fixed | None,
) -> tuple[AdaptedModel, Tensors]:
    """The model, which nodes in one process share, and its tensors as they were then."""
    adapted = load_model(model, adapter, labels, seed, path, frame, task)
    return adapted, adapted.tensors()


@functools.lru_cache(maxsize=1024)
def _load_node(
    config: RunConfig,
    path: str,
    file: str,
    index: int,
    count: int,
    memory_mib: float,
    forward_ms: float,
    frame: Fixed | None,
) -> Node:
    task, labels = get_task(config.data), len(label_names(config.data))
    adapted, start = _load_model(config.model, config.adapter, task, labels, config.seed, path, frame)
    task.prepare(adapted, config.data)
    shard = load_shard(config.data, config.seed, index, count, file)
    train, heldout = (
        encode_rows(task, rows, adapted.tokenizer, config.data, trained)
        for rows, trained in ((shard.train, True), (shard.heldout, False))
    )
    for rows, use in ((train, "train on"), (heldout, "hold back")):
        refuse_too_long(adapted, rows, f"Rows to {use}")
        if rows.lost():
            logger.warning("Rows to %s: %s", use, rows.lost())
    return Node(adapted, train, heldout, start, index, memory_mib, forward_ms)


def models_loaded() -> int:
    """How many models this process has loaded since it last forgot them."""
    return _load_model.cache_info().misses


def forget_nodes(models: bool = False) -> None:
    """Let go of all nodes: a process that serves one run after the other would keep the rows and models of each.

    models: of the model that they share too, as before a run that needs another.
    """
    _load_node.cache_clear()
    if models:
        _load_model.cache_clear()
