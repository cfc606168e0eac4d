"""The tensors of a task on a client that keeps them from one round to the next. What it does with them is elsewhere."""

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from spry_app.client.node import Node
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.methods import Method
from spry_app.methods.global_state import GlobalState
from spry_app.protocol import Task, Tensors, from_arrays, to_arrays


def tensors_of(task: Task, node: Node, method: Method, config: RunConfig, kept: RecordDict) -> Tensors:
    """Every trainable tensor as the server has it: as sent, or rebuilt from what `kept` holds and the task's log.

    kept: what Flower keeps for this node during the run; local training never touches it, so there are no provisional
    steps to take back before the server's are repeated (DeComFL, arXiv:2405.15861, Algorithm 2). Raises SpryError where
    the log does not follow on what is held or leads elsewhere than on the server; the server then sends every tensor.
    """
    catch_up = task.catch_up
    if catch_up is None:
        return task.tensors
    state = GlobalState(node.start, node.adapted.units, method, config)
    if catch_up.moments is not None:
        state.load(catch_up.since, task.tensors, catch_up.moments)
    else:
        _restore(state, kept)
        if state.round < catch_up.since:
            held = f"the tensors of round {state.round}" if state.round else "those of the start"
            raise SpryError(f"This node holds {held}; the slope log begins after round {catch_up.since}.")
        for entry in catch_up.entries:
            if entry.round > state.round:
                state.follow(entry)
        state.optimizer.load(task.tensors)
    if state.digest() != catch_up.digest:
        raise SpryError(
            "The tensors rebuilt from the slope log are not the server's, so this node computes otherwise than it; "
            'with send="weights" that does not matter.'
        )
    _keep(state, kept)
    return state.tensors


def _keep(state: GlobalState, kept: RecordDict) -> None:
    kept["tensors"], kept["moments"] = to_arrays(state.tensors), to_arrays(state.optimizer.moments)
    kept["held"] = ConfigRecord({"round": state.round})


def _restore(state: GlobalState, kept: RecordDict) -> None:
    held, tensors, moments = kept.get("held"), kept.get("tensors"), kept.get("moments")
    if isinstance(held, ConfigRecord) and isinstance(tensors, ArrayRecord) and isinstance(moments, ArrayRecord):
        state.load(int(str(held["round"])), from_arrays(tensors), from_arrays(moments))
