"""Who answers a message: this process, or the node's worker. Imported where no torch may be."""

import hashlib
import sys
from pathlib import Path
from types import FrameType
from typing import Literal

from flwr.app import Context, Message
from flwr.common.serde import context_to_proto, message_to_proto, recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from spry_app.offline import set_offline
from spry_app.worker.ask import ask
from spry_app.worker.place import Place, default_place

Action = Literal["introduce", "train", "evaluate"]
ROOT = Path(__file__).resolve().parent.parent.parent
_CALLER = "flwr.supernode.runtime.run_clientapp"
"""What Flower 1.41 calls a ClientApp from in a process that a SuperNode has started for one message. In a simulation
that is ray_transport.ray_actor, in an actor which lives as long as the run; node configs look alike in both."""


class WorkerFailed(Exception):
    """The worker met a mistake of ours; it has the traceback in its log."""


def answer(action: Action, message: Message, context: Context) -> Message:
    """The reply to `message`; `context.state` is what the node then keeps. Raises SpryError where no worker can say."""
    place = worker_of(context)
    if place is None:
        set_offline(context.run_config.get("offline") is True)  # some libraries look for more when they are imported
        from spry_app.client.answer import ANSWERS

        return ANSWERS[action](message, context)
    job = {"do": action, "code": code_of(context)}
    bodies = [message_to_proto(message).SerializeToString(), context_to_proto(context).SerializeToString()]
    header, answered = ask(place, job, bodies, str(ROOT), float(context.run_config.get("client.worker-idle-s", 900.0)))
    if "error" in header:
        raise WorkerFailed(f"{header['error']} (in the worker of this node; its log: {place.log})")
    content, state = (recorddict_from_proto(ProtoRecordDict.FromString(body)) for body in answered)
    context.state = state
    return Message(content=content, reply_to=message)


def worker_of(context: Context) -> Place | None:
    """Where the worker of this node is; None where messages are answered in this process: everywhere but in the process
    that a SuperNode starts for each, and there where the run (client.worker) or the node (worker) says "off".
    """
    own = str(context.node_config.get("worker", ""))
    if not called_by_supernode() or "off" in (own, context.run_config.get("client.worker")):
        return None
    return Place(Path(own).expanduser().absolute()) if own else default_place()


def called_by_supernode() -> bool:
    """Whether this is a process of one message: its caller is on the stack. That a module of Flower's was imported says
    nothing, as others do that too.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != _CALLER:
        frame = frame.f_back
    return frame is not None


def code_of(context: Context) -> str:
    """What a worker must run to answer this run: Spry as it is here, and where the run names code of the user's, which
    may have changed since the last run, a process of its own.
    """
    own = any(":" in str(context.run_config.get(key, "")) for key in ("method", "strategy"))
    return code_here() + (f" {context.run_id} {ROOT}" if own else "")


def code_here() -> str:
    """Digest of every file of Spry, as it was imported."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "spry_app").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
