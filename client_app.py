"""Flower's entry point on a client: decode, call, encode. Everything is in spry_app.client."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from spry_app.client import answer

app = ClientApp()


@app.query("introduce")
def introduce(message: Message, context: Context) -> Message:
    """Load model and rows, test them, and say what is here."""
    return answer.introduce(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the units that the message names."""
    return answer.train(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the global model on the held-out rows."""
    return answer.evaluate(message, context)
