"""The global model scored by clients, where the server has no test set: whom to ask, and the sum of what they answer.
Nothing here trains.
"""

from collections.abc import Callable, Iterable

from flwr.app import Message, MetricRecord
from flwr.serverapp import Grid

from spry_app.autodiff.directions import Tensors
from spry_app.config import RunConfig
from spry_app.protocol import MalformedReply, Score, Task, size_bytes
from spry_app.server.fleet import Fleet
from spry_app.server.letters import Letters
from spry_app.server.record import Recorder
from spry_app.server.stopping import decide


def is_due(config: RunConfig, recorder: Recorder, round_: int) -> bool:
    """Whether clients are to score the tensors after this round."""
    last = decide(config, recorder)
    return bool(config.server.fraction_evaluate) and (last or config.evaluates(round_))


def scoring_tasks(
    config: RunConfig, fleet: Fleet, grid: Grid, round_: int, tensors: Tensors, fingerprint: str
) -> dict[int, Task]:
    """Node -> what it is asked: a seeded choice of `server.fraction-evaluate` of those that are connected."""
    nodes = fleet.sample(fleet.available(grid), config.server.fraction_evaluate, 1, (config.seed, round_, 1))
    return {
        node: Task(round=round_, client=index, tensors=tensors, units=(), fingerprint=fingerprint)
        for index, node in enumerate(nodes)
    }


def summed(
    replies: Iterable[Message], recorder: Recorder, letters: Letters, check: Callable[[Message, int], None]
) -> MetricRecord | None:
    """Make the sum of the clients' scores that of the round; None where there is none.

    letters: what was asked. check: raises MalformedReply for a node that has not answered.
    """
    task = recorder.task
    total = Score(loss=0.0, sums={}, examples=0)
    for message in replies:
        node = message.metadata.src_node_id
        try:
            recorder.received(size_bytes(message))
            node = letters.sender(message)
            check(message, node)
            total += Score.from_message(message, task.sums)
        except MalformedReply as error:
            recorder.refuse(node, str(error))
    recorder.silent(letters.given_up())
    if not total.examples:
        return None
    recorder.score = total
    return MetricRecord({"loss": total.loss / total.numbers()[task.loss_over], **recorder.metrics_of(total)})
