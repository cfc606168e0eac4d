"""From a message to its reply. A SpryError becomes a refusal that the server shows; our own mistakes still raise."""

import dataclasses
import functools
import math
from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message, RecordDict

from spry_app.autodiff.budget import Slices
from spry_app.autodiff.gradients import GRADIENTS
from spry_app.autodiff.memory import is_out_of_memory, return_freed_memory
from spry_app.client.catch_up import tensors_of
from spry_app.client.device import device_of
from spry_app.client.node import Node, load_node
from spry_app.client.privacy import check_scoring, protected
from spry_app.client.slicing import budget_mib, give_less, most_at_once, slices_of, slices_to_score
from spry_app.client.training import train as train_node
from spry_app.client.trust import check_gradient, trusted
from spry_app.config import RunConfig
from spry_app.errors import OutOfMemory, SpryError
from spry_app.methods import BY_MEMORY, Layout, Method, get_method, is_dealt
from spry_app.methods.global_state import digest
from spry_app.models import SENT, Fixed, difference
from spry_app.offline import set_offline
from spry_app.protocol import (
    Introduction,
    Score,
    Task,
    TrainReply,
    expected_fingerprint,
    frame_in,
    from_arrays,
    mismatch,
    refusal,
    to_arrays,
)

Answer = Callable[[Message, Context], Message]
Work = Callable[[Node, Message, Method, RunConfig, RecordDict], Introduction | TrainReply | Score]
"""The last one is what Flower keeps for this node during the run."""


def _answer(work: Work) -> Answer:
    @functools.wraps(work)
    def answer(message: Message, context: Context) -> Message:
        try:
            config = RunConfig.from_flower(context.run_config)
            set_offline(config.offline)
            method = get_method(config)
            node = load_node(config, context.node_config, _frame(message, config, context.state))
            _check_base(node.adapted.fingerprint, expected_fingerprint(message), config)
            method = method.on(Layout(node.adapted.depths(), len(node.adapted.blocks)), config.client)
            if not is_dealt(config, method):
                check_gradient(node, method.gradient, most_at_once(node, config))
            return work(node, message, method, config, context.state).to_message(message)
        except SpryError as error:
            return refusal(message, error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        return_freed_memory()  # out of the handler: what it caught holds every tensor of the step
        return refusal(message, _out_of_memory(context, give_less(context.state)))

    return answer


@_answer
def introduce(node: Node, message: Message, method: Method, config: RunConfig, state: RecordDict) -> Introduction:
    if not is_dealt(config, method):
        slices_of(node, method, config, state)  # a budget that is too small is refused before the first round
    return Introduction(
        partition=node.partition,
        fingerprint=node.adapted.fingerprint,
        examples=len(node.train),
        heldout=len(node.heldout),
        digest=digest(node.start),
        memory_mib=budget_mib(node, config) if is_dealt(config, method) else node.memory_mib,
        gradients=trusted(node, method.gradient, most_at_once(node, config), is_dealt(config, method)),
        device=device_of(node, config),
    )


@_answer
def train(node: Node, message: Message, method: Method, config: RunConfig, state: RecordDict) -> TrainReply:
    task = Task.from_message(message)
    task = dataclasses.replace(task, tensors=tensors_of(task, node, method, config, state))
    check_task(task, node, config)
    method = method.taking(task.gradient)
    check_gradient(node, method.gradient, most_at_once(node, config))
    units = task.units if method.assign in BY_MEMORY else ()
    reply = train_node(node, task, method, config, slices_of(node, method, config, state, units))
    return protected(reply, task, method, config)


@_answer
def evaluate(node: Node, message: Message, method: Method, config: RunConfig, state: RecordDict) -> Score:
    check_scoring(config)
    task = Task.from_message(message)
    task = dataclasses.replace(task, tensors=tensors_of(task, node, method, config, state))
    check_task(task, node, config)
    node.adapted.load_tensors(task.tensors)
    return node.score(config.client, slices_to_score(node, method, config, state))


ANSWERS: dict[str, Answer] = {"introduce": introduce, "train": train, "evaluate": evaluate}


def _out_of_memory(context: Context, less: Slices | None) -> OutOfMemory:
    now = (
        f" From now on it takes {less.micro_batch} examples and {less.directions_at_once} directions at once."
        if less
        else ""
    )
    budget = context.node_config.get("memory-budget-mib") or context.run_config.get("client.memory-budget-mib")
    return OutOfMemory(
        f"This node was out of memory. Its budget for a step is {f'{budget} MiB' if budget else 'not set'}: set "
        "client.memory-budget-mib (or the node config's memory-budget-mib) to less than is free beside the model, or "
        f'"auto", or lower client.batch-size.{now}'
    )


def _frame(message: Message, config: RunConfig, state: RecordDict) -> Fixed | None:
    """What the server computes of the adapter and sends once, kept in `state`; None where nodes need none."""
    if config.adapter.frame not in SENT:
        return None
    sent = frame_in(message)
    if sent is not None:
        state["frame"] = to_arrays(sent)
    kept = state.get("frame")
    if not isinstance(kept, ArrayRecord):
        raise SpryError(
            f"This node does not hold the frame of the run (adapter.frame={config.adapter.frame!r}), which the server "
            "sends with its first message; it sends it again."
        )
    return Fixed.of(from_arrays(kept))


def check_task(task: Task, node: Node, config: RunConfig) -> None:
    """That this node can do what it is asked. Raises SpryError."""
    known = {name: value for name, value in node.start.items() if name in task.update}
    reason = mismatch(task.tensors, node.start) or mismatch(task.update, known)
    if unknown := sorted(set(task.units) - node.adapted.units.keys()):
        reason = f"units that this model has not: {len(unknown)}, {unknown[0][:200]!r} among them"
    numbers = (task.round, task.client, task.number, task.sharing, task.steps)
    if not (1 <= task.directions <= config.client.directions and all(0 <= number < 2**63 for number in numbers)):
        reason = f"{task.directions} directions, or one of the numbers {numbers}, are out of bounds"
    if not 0 <= task.deadline_s < math.inf:
        reason = f"a deadline of {task.deadline_s} s is none"
    if task.gradient and task.gradient not in GRADIENTS:
        reason = f"no gradient is called {task.gradient[:200]!r}"
    if reason:
        raise SpryError(
            f"This node cannot do what the server asks ({reason}): run the same version of Spry everywhere."
        )


def _check_base(here: str, there: str, config: RunConfig) -> None:
    """That both adapt the same weights, in the same way."""
    if found := difference(here, there):
        remedies = {
            "base model": f"Every node must load the same weights of model.name={config.model.name!r}: pin "
            "model.revision, or replace this node's copy, by a whole one: 1_Pooling/config.json is part of it where "
            'model.pooling is "auto".',
            "fixed part of the adapter": f"With adapter.subspace={config.adapter.subspace!r} it follows from seed, "
            "adapter.* and the names of the model's layers, or comes from the server: run the same version of Spry "
            "everywhere.",
        }
        raise SpryError(
            f"The {found.what} of this node is not the server's (fingerprint {found.here}, the server has "
            f"{found.there}). {remedies[found.what]}"
        )
