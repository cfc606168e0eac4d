"""One message answered by a process of its own, as a SuperNode starts one for each: `python -m benchmarks.messenger`.
benchmarks.message starts it and reads the clock. Nothing large is imported here.

Arguments: "flower", for a ClientApp that does nothing, or "spry"; and a file with two protobufs, message and context,
of four bytes of length each before them.
"""

import json
import sys
from pathlib import Path

import flwr.supernode.runtime.run_clientapp as caller
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import context_from_proto, message_from_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity


def idle() -> ClientApp:
    """What Flower's own part of a message costs."""
    app = ClientApp()

    @app.query("introduce")
    def introduce(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    return app


def spry() -> ClientApp:
    """The product's."""
    from client_app import app

    return app


APPS = {"flower": idle, "spry": spry}


def split(whole: bytes) -> list[bytes]:
    """Bodies, each behind its length."""
    found = []
    while whole:
        size = int.from_bytes(whole[:4], "big")
        found.append(whole[4 : 4 + size])
        whole = whole[4 + size :]
    return found


def main() -> None:
    """Print what came and what this process took."""
    kind, path = sys.argv[1:]
    message, context = split(Path(path).read_bytes())
    here = context_from_proto(ProtoContext.FromString(context))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = here.run_id, here.node_id, 0
    exec("def call(app, *arguments): return app(*arguments)", vars(caller))  # as if Flower called
    reply = vars(caller)["call"](APPS[kind](), message_from_proto(ProtoMessage.FromString(message)), here)
    print(json.dumps({"records": sorted(reply.content), "peak-kib": peak_kib()}))


def peak_kib() -> int:
    """Resident at the worst since this program began: ru_maxrss counts what its parent had when it forked."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])


if __name__ == "__main__":
    main()
