"""What a job is: a message and the node's context, answered as in Flower's own process. Nothing of sockets is here."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.common.serde import context_from_proto, message_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity

from spry_app.autodiff.memory import return_freed_memory
from spry_app.client.answer import ANSWERS
from spry_app.client.node import forget_nodes, models_loaded
from spry_app.client.slicing import give_less
from spry_app.config import RunConfig
from spry_app.errors import SpryError
from spry_app.worker.wire import Bodies, Header

logger = logging.getLogger(__name__)


class Jobs:
    """Does one after the other, with the rows that the run's last one has loaded, and the model where it is the same.

    A new run reads the rows again: a node's own file may have grown. at_work: a file that says whose training is going
    on; where the worker before this one has left it, the system may have ended that for its memory.
    """

    def __init__(self, at_work: Path) -> None:
        self._at_work = at_work
        self._model = ""
        self._loads = 0
        self._run: tuple[object, ...] = ()
        self._loaded: tuple[object, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The model that is loaded, and how often one was."""
        return {"model": self._model, "loads": self._loads + models_loaded()}

    def __call__(self, header: Header, bodies: Bodies) -> tuple[Header, Bodies]:
        """Content of the reply, and state of the node; or what went wrong, and no bodies."""
        try:
            action = ANSWERS[header["do"]]
            message, context = _read(bodies)
            self._make_room(context)
            with self._marked(header["do"], context):
                reply = action(message, context)
            return {}, [recorddict_to_proto(records).SerializeToString() for records in (reply.content, context.state)]
        except Exception as error:  # ours or the caller's: the worker stays
            logger.exception("A job failed")
            return {"error": _short(error)}, []

    @contextmanager
    def _marked(self, action: str, context: Context) -> Iterator[None]:
        """Give less to a node whose training has ended its worker."""
        whose = f"run {context.run_id}, node {context.node_id}"
        if self._at_work.exists():
            less = give_less(context.state) if self._at_work.read_text() == whose else None
            logger.warning("The worker before this one ended while it trained; now: %s", less or "another run or node")
            self._at_work.unlink()
        try:
            if action == "train":
                self._at_work.write_text(whose)
            yield
        finally:
            self._at_work.unlink(missing_ok=True)

    def _make_room(self, context: Context) -> None:
        """Let go of what only other runs need, before this one loads: both at once may be too much."""
        try:
            config = RunConfig.from_flower(context.run_config)
        except SpryError:  # is told to the server in answer to the message
            return
        model = str(context.node_config.get("model", "") or config.model.name)
        run, loaded = (context.run_id, config), (config.model, config.adapter, config.seed, model, _stamps(model))
        if run != self._run or loaded != self._loaded:
            other = loaded != self._loaded
            self._loads += models_loaded() if other else 0
            forget_nodes(models=other)
            return_freed_memory()
        self._model, self._run, self._loaded = model, run, loaded


def _read(bodies: Bodies) -> tuple[Message, Context]:
    message, context = bodies
    here = context_from_proto(ProtoContext.FromString(context))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = here.run_id, here.node_id, 0
    return message_from_proto(ProtoMessage.FromString(message)), here


def _stamps(model: str) -> tuple[object, ...]:
    """What tells that the files of a local checkpoint have been replaced; nothing for a name."""
    files = sorted(Path(model).iterdir()) if Path(model).is_dir() else ()
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
