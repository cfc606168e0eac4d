"""Flower's entry point on a client, nothing else. On a SuperNode a new process imports this for every message, so no
torch comes in here: the node's worker has it.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from spry_app.worker.dispatch import answer

app = ClientApp()


@app.query("introduce")
def introduce(message: Message, context: Context) -> Message:
    """Load model and rows, test them, and say what is here."""
    return answer("introduce", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the units that the message names."""
    return answer("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the global model on the held-out rows."""
    return answer("evaluate", message, context)
