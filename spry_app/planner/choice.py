"""One gradient for all nodes of a run (gradient="auto"): a row of a plan for each that they and its method can take,
and the advice among these. Talks to nobody and keeps nothing.
"""

import dataclasses
import math
from collections.abc import Sequence

from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import get_method
from spry_app.methods.by_device import EXACT, SLOPES
from spry_app.models.checkpoint import find_device
from spry_app.planner.advice import advise
from spry_app.planner.blank import model_of
from spry_app.planner.plan import Asked, Desk, clients_of, rows_of
from spry_app.planner.predict import Predictor
from spry_app.planner.rows import Row
from spry_app.planner.ways import kinds
from spry_app.server.choice import Choice


def advise_all(config: RunConfig, memory_mib: Sequence[float], gradients: Sequence[tuple[str, ...]]) -> Choice:
    """As server.choice.Advise, for nodes that are like this machine but for memory: on a GPU where this one has one."""
    limit, own = _limit_mib(memory_mib), get_method(config).gradient.name
    names = dict.fromkeys((*EXACT, own, *SLOPES))
    able = [name for name in names if all(name in known for known in gradients)]
    rows = _rows(config, limit, len(memory_mib), able)
    if not rows:
        raise SpryError(
            f'gradient="auto": there is no gradient that all {len(gradients)} nodes and method={config.method!r} can '
            f"take. All nodes can take {', '.join(able) or 'none'}: set gradient to one of them, and method to one for "
            "that."
        )
    advice = advise(rows, limit)
    if advice.row is None:
        raise SpryError(f'gradient="auto": {_what_would(rows, limit, config.data.max_length)}')
    return Choice(rows[advice.row].gradient, advice.reason)


def _what_would(rows: Sequence[Row], limit_mib: float, length: int) -> str:
    """A sentence on the least of what does not fit, or is not possible at all."""
    least = min(rows, key=lambda row: (bool(row.error), row.total_mib))
    if least.error:
        return f"{least.gradient} is not possible: {least.error}"
    return (
        f"no step fits into {limit_mib:.3g} MiB above the model. The least is that of {least.gradient} with one "
        f"example at once, {least.total_mib:.3g} MiB. Raise client.memory-budget-mib (or memory-budget-mib of the node "
        f"that has the least), or lower data.max-length (now {length})."
    )


def _rows(config: RunConfig, limit_mib: float, nodes: int, able: Sequence[str]) -> list[Row]:
    """Of the gradients that the run's method can take; of backpropagation alone where that fits: no slopes take fewer
    passes, and a row of a large model takes seconds.
    """
    client = config.client.model_copy(update={"memory_budget_mib": limit_mib})
    adapted, asked = model_of(config), Asked(nodes=nodes, limits=False)
    predictor = Predictor(adapted, host=find_device(config.model.device).type == "cpu")
    desk = Desk(predictor, math.inf, None, clients_of(config, asked), asked)
    found = kinds(config.model_copy(update={"client": client}), adapted, desk.clients, able)
    rows = list[Row]()
    for row in rows_of(desk, found):
        rows.append(_of_step(row))
        if row.fits and row.gradient == EXACT[0]:
            break
    return rows


def _of_step(row: Row) -> Row:
    """Without what is there before it and beside it, as the budget of a node is for a step alone."""
    step = row.activations_mib + row.tangents_or_graph_mib + row.workspace_mib
    return dataclasses.replace(row, weights_mib=0.0, optimizer_mib=0.0, total_mib=step)


def _limit_mib(memory_mib: Sequence[float]) -> float:
    """The least that a step may take on any node, above the loaded model."""
    least = min((stated or math.inf for stated in memory_mib), default=math.inf)
    if least == math.inf:
        raise SpryError(
            'gradient="auto" is chosen for what a step may take on a node, and nobody has said how much that is: set '
            'client.memory-budget-mib, to MiB or to "auto" (half of what is free on each node), or memory-budget-mib '
            "in the config of each node."
        )
    return least
